"""``megagpt plan``: the command, what it writes, what it refuses, and published runs that it has to reproduce."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.config import deepspeed as ds
from megagpt.config.fields import parse
from megagpt.config.presets import MODELS
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.tools.plan import plan_main, wall_seconds
from megagpt.tools.plan_hardware import GPUS
from megagpt.tools.plan_measure import Measured
from megagpt.tools.plan_memory import Layout, memory
from megagpt.tools.plan_model import parameters
from megagpt.tools.plan_time import step_time
from megagpt.tools.plan_traffic import ZeroSizes, collectives, gathered_parameters

ROOT = Path(__file__).parent.parent
LADDER = ["--model", "6.7b", "--nodes", "8", "--gpus_per_node", "8", "--gpu", "h100-80gb"]
LADDER += ["--seq_len", "2048", "--global_batch_size", "1024", "--tokens", "300e9"]
SHAPES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (64, 8192, 64),
}
# GPU, model, positions, GPUs, micro-batch, accumulation, recomputed, tokens/s a GPU: FSDP with everything sharded,
# mosaicml/llm-foundry scripts/train/benchmarking/README.md, tables "H100 80GB BF16" and "A100 80GB".
PUBLISHED = [
    ("h100-80gb", "1b", 2048, 8, 14, 1, 0, 45455),
    ("h100-80gb", "1b", 2048, 64, 20, 1, 0, 44402),
    ("h100-80gb", "3b", 2048, 16, 10, 3, 0, 24142),
    ("h100-80gb", "7b", 2048, 8, 6, 1, 0, 10643),
    ("h100-80gb", "7b", 4096, 8, 16, 2, 1, 8611),
    ("h100-80gb", "13b", 2048, 8, 2, 1, 0, 4792),
    ("h100-80gb", "30b", 2048, 32, 14, 3, 1, 2308),
    ("h100-80gb", "70b", 2048, 64, 8, 4, 1, 1039),
    ("a100-80gb", "125m", 2048, 8, 32, 2, 0, 141737),
    ("a100-80gb", "350m", 2048, 8, 32, 2, 0, 58782),
    ("a100-80gb", "760m", 2048, 8, 24, 2, 0, 32434),
    ("a100-80gb", "1b", 2048, 8, 14, 4, 0, 20513),
    ("a100-80gb", "7b", 2048, 8, 6, 2, 0, 4641),
    ("a100-80gb", "13b", 2048, 8, 2, 3, 0, 2262),
    ("a100-80gb", "70b", 2048, 64, 8, 4, 1, 410),
]
# Not used for any constant: model, micro-batch, accumulation, tokens/s of eight A100 without sharding, "GPT3" table of
# Dao-AILab/flash-attention training/README.md (2,048 positions, 0.5 or 1 million tokens a step).
HELD_OUT = [
    ("125m", 32, 1, 1310e3),
    ("350m", 16, 2, 503e3),
    ("760m", 8, 4, 245e3),
    ("1b", 8, 8, 169e3),
    ("3b", 4, 16, 85e3),
]


def published_run(gpu, model, seq_len, ranks, micro_batch, accumulation, every):
    """The model, its layout and what it sends. FSDP keeps nothing gathered, as ZeRO-3 with a reuse distance of 0."""
    n_layer, d_model, n_head = SHAPES[model]
    config = GPTConfig(50368, seq_len, n_layer, n_head, d_model, attn_dropout=0.0, activation_checkpointing=every)
    sizes = ZeroSizes(d_model**2, int(0.9 * d_model**2), 10 * d_model, reuse=0)
    layout = Layout(3, "none", ranks, "bf16", micro_batch, accumulation, sizes, overlap=True)
    return config, layout, collectives(config, 3, ranks, "bf16", accumulation, sizes)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(map(str, row[:4])))
def test_published_speeds_are_reproduced_within_a_fifth(row):
    *run, published = row
    config, layout, traffic = published_run(*run)
    time = step_time(config, layout, traffic, GPUS[run[0]], max(1, layout.world_size // 8))
    rate = layout.micro_batch * layout.accumulation * config.seq_len / time.total
    assert rate == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize("row", HELD_OUT, ids=lambda row: row[0])
def test_speeds_that_no_constant_was_fitted_to_are_reproduced_within_a_fifth(row):
    model, micro_batch, accumulation, published = row
    n_layer, d_model, n_head = SHAPES[model]
    config, sizes = GPTConfig(50264, 2048, n_layer, n_head, d_model), ZeroSizes(reduce_bucket=200_000_000)
    layout = Layout(1, "none", 8, "bf16", micro_batch, accumulation, sizes, overlap=False)
    traffic = collectives(config, 1, 8, "bf16", accumulation, sizes)
    time = step_time(config, layout, traffic, GPUS["a100-80gb"], 1)
    assert 8 * micro_batch * accumulation * 2048 / time.total == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(map(str, row[:4])))
def test_published_runs_fit_their_gpu(row):
    config, layout, _ = published_run(*row[:-1])
    assert memory(config, layout, gathered_parameters(config, layout.sizes)).peak <= GPUS[row[0]].memory


def test_parameters_are_those_of_the_model():
    import torch

    from megagpt.model.gpt import GPT, decays
    from megagpt.ops import load_ops

    ops = load_ops("torch", head_width=64, dtype=torch.float32, device="cpu")
    for name, shape in MODELS.items():
        if name == "lstm":
            continue
        config = GPTConfig(**{**shape, "n_layer": 2})
        with torch.device("meta"):
            model = GPT(config, ops)
        theirs = [(n, p.numel(), decays(n)) for n, p in model.named_parameters()]
        assert [(p.name, p.numel, p.decays) for p in parameters(config)] == theirs, name
        whole = GPTConfig(**shape)
        assert sum(p.numel for p in parameters(whole)) == whole.n_params()


def test_the_plan_needs_no_torch_and_little_time(tmp_path):
    code = (
        "import sys, time\nfrom megagpt.tools.plan import plan_main\n"
        f"plan_main({[*LADDER, '--output', str(tmp_path)]!r})\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
        "print('CPU seconds', time.process_time())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Of this process alone; a core that others share computes at half its rate.
    assert float(done.stdout.split()[-1]) < 2.0


def test_what_is_written_is_what_train_py_and_sbatch_take(tmp_path, capsys):
    assert plan_main([*LADDER, "--output", str(tmp_path / "plan")]) == 0
    screen = capsys.readouterr().out
    assert "6,658,404,352 parameters" in screen
    written = (tmp_path / "plan" / "submit.sh").read_text().splitlines()[-1].removeprefix("exec ")
    assert f": {written}" in screen
    words = shlex.split(written)
    at = words.index("slurm/pretrain.sbatch")
    assert words[:at] == ["sbatch", "--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00"]
    assert (ROOT / words[at]).exists()
    settings = parse(words[at + 1 :])
    config = ds.resolve(ds.load(settings.ds_config), settings, 64, path=settings.ds_config, hidden_size=4096)
    assert config.global_batch == 1024
    assert f"micro-batch {config.micro_batch} x accumulation {config.accumulation}" in screen
    assert settings.max_steps * 1024 * 2048 <= 300e9 < (settings.max_steps + 1) * 1024 * 2048
    assert (settings.model, settings.seq_len, config.precision) == ("6.7b", 2048, "bf16")


def test_a_run_of_minutes_is_told_in_hours_and_saved_at_its_end(tmp_path, capsys):
    """It took 0.00 days, and was to be saved every 12,000 of its 1,907 steps."""
    short = ["--model", "gpt2-small", "--gpu", "h100-80gb", "--tokens", "1e9", "--output", str(tmp_path)]
    assert plan_main(short) == 0
    screen = capsys.readouterr().out
    assert re.search(r"^  run +0\.0[1-9] hours: 1,907 steps", screen, re.MULTILINE)
    assert "GB, every 1907 steps; disk" in screen
    assert "--max_steps 1907 --save_interval 1907 " in screen


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_every_recommended_file_is_one_that_training_accepts(tmp_path, offload):
    for gpu in ("h100-80gb", "v100-32gb"):
        plan_main(
            ["--model", "1.3b", "--gpu", gpu, "--offload", offload, "--tokens", "1e9", "--output", str(tmp_path / gpu)]
        )
        words = shlex.split((tmp_path / gpu / "submit.sh").read_text().splitlines()[-1])
        settings = parse(words[words.index("slurm/pretrain.sbatch") + 1 :])
        config = ds.resolve(ds.load(settings.ds_config), settings, 8, path="the file", hidden_size=2048)
        assert config.precision == ("bf16" if gpu == "h100-80gb" else "fp16")
        assert (config.offload_optimizer, config.offload_param) == {
            "none": (None, None),
            "optimizer": ("cpu", None),
            "all": ("cpu", "cpu"),
        }[offload]


def answer(capsys, *words):
    assert plan_main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_number_of_the_answer_follows_from_the_others(capsys):
    plan = answer(capsys, *LADDER, "--time", "12:00:00", "--start_minutes", "10")
    best = plan["recommended"]
    assert plan["steps"] == 300 * 10**9 // (1024 * 2048)
    assert plan["seconds"] == pytest.approx(plan["steps"] * best["seconds"]["total"])
    assert plan["requeues"] == -(-plan["seconds"] // (12 * 3600 - 600 - 300)) - 1
    assert plan["checkpoint_bytes"] == 14 * plan["n_params"]
    assert plan["disk_bytes"] == 5 * plan["checkpoint_bytes"]
    flops = (6 * plan["n_params"] + 6 * 32 * 2048 * 4096) * 1024 * 2048
    assert best["mfu"] == pytest.approx(flops / (best["seconds"]["total"] * 64 * 989.4e12))
    assert best["micro_batch_size"] * best["gradient_accumulation_steps"] * 64 == 1024
    for option in plan["options"]:
        parts = option["memory"]
        held = parts["parameters"] + parts["gradients"] + parts["optimizer"]
        most = max(parts["activations"] + parts["working"] + parts["buffers"], parts["update"])
        assert parts["peak"] == pytest.approx(held + most + parts["runtime"] + parts["margin"])
        assert option["fits"] == (parts["peak"] <= 80e9)
        assert best["seconds"]["total"] <= 1.02 * option["seconds"]["total"] or not option["fits"]


def test_more_stages_and_more_recomputation_take_less_memory(capsys):
    plan = answer(capsys, *LADDER, "--micro_batch_size", "1")
    peak = {
        (o["zero_stage"], o["offload"], o["activation_checkpointing"]): o["memory"]["peak"] for o in plan["options"]
    }
    for every in (0, 2, 1):
        assert peak[0, "none", every] > peak[1, "none", every] > peak[2, "none", every]
    for stage in (1, 2, 3):
        activations = [
            o["memory"]["activations"] for o in plan["options"] if (o["zero_stage"], o["offload"]) == (stage, "none")
        ]
        assert activations == sorted(activations, reverse=True)


@pytest.mark.parametrize(("told", "said"), [([], "not compared with what there is"), (["4000"], "pinned; of 4,000")])
def test_cpu_memory_of_which_nothing_is_known_is_said_not_to_be_looked_at(told, said, tmp_path, capsys):
    known = [word for value in told for word in ("--host_memory_gb", value)]
    output = ["--output", str(tmp_path / "plan")]
    assert plan_main([*LADDER, "--nodes", "1", "--model", "13b", "--offload", "all", *known, *output]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "CPU memory of a node" in line]
    assert said in line


def test_an_unknown_gpu_is_planned_by_its_figures(capsys):
    figures = ["--gpu_memory_gb", "80", "--gpu_tflops", "989.4", "--gpu_bandwidth_gbs", "3350", "--link_gbs", "450"]
    words = [*LADDER, *figures, "--network_gbit", "3200", "--host_gbs", "64"]
    words[words.index("h100-80gb")] = "prototype"
    theirs, ours = answer(capsys, *words), answer(capsys, *LADDER)
    theirs["gpu"].pop("peak_fp32")
    ours["gpu"].pop("peak_fp32")
    assert theirs == ours


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--gpu", "h100-80g"], "did you mean 'h100-80gb'.*--gpu_memory_gb, --gpu_tflops, --gpu_bandwidth_gbs"),
        (["--model", "6.8b"], "--model 6.8b is unknown"),
        (["--model", "lstm", "--tokens", "1e9", "--seq_len", "512"], "plan knows transformers"),
        (["--global_batch_size", "1000"], "1000 is no multiple of 64 ranks.*x 64 = 1024.*give one of these"),
        (["--micro_batch_size", "3"], "--micro_batch_size 3: .*no multiple of 3 per rank"),
        (
            ["--model", "175b", "--nodes", "1", "--offload", "none"],
            "fits under no option: the least is .*would fit: --nodes \\d+; or a ",
        ),
        (
            ["--model", "gpt1", "--host_memory_gb", "-5"],
            "--host_memory_gb -5 must be above 0",
        ),
        (
            ["--model", "175b", "--offload", "all", "--nodes", "1", "--host_memory_gb", "2000"],
            "--host_memory_gb 2000 is too little: .* at least \\d+ GB of CPU memory a node",
        ),
        (["--tokens", "1000"], "--tokens 1,000 is less than one step"),
        (["--time", "00:05:00"], "leaves no time to train"),
        (["--time", "soon"], "no limit of sbatch's"),
        (["--zero_stage", "5"], "must be 0, 1, 2 or 3"),
        (["--zero_stage", "1", "--offload", "all"], "--zero_stage 1 has no --offload all"),
        (["--gpu", "v100-32gb", "--precision", "bf16"], "no bf16"),
        (["--gpu", "a10-24gb", "--model", "gpt2-small"], "give --network_gbit"),
        (["--nodes", "0"], "--nodes 0 must be at least 1"),
        (["--gpu_tflops", "0"], "--gpu_tflops 0 must be above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_a_sentence_with_the_way_out(changes, told, tmp_path):
    words = list(LADDER)
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    with pytest.raises(ConfigError, match=told) as caught:
        plan_main([*words, "--output", str(tmp_path / "plan")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "plan").exists()


def test_what_would_fit_fits(tmp_path):
    common = ["--gpu", "a10-24gb", "--network_gbit", "100", "--gpus_per_node", "2", "--tokens", "1e9"]
    common += ["--offload", "none", "--output", str(tmp_path)]
    with pytest.raises(ConfigError) as caught:
        plan_main(["--model", "13b", *common, "--global_batch_size", "64"])
    told = str(caught.value)
    nodes = told.partition("--nodes ")[2].partition(";")[0]
    model = told.partition("--model ")[2].partition(",")[0]
    assert plan_main(["--model", "13b", "--nodes", nodes, *common, "--global_batch_size", str(64 * int(nodes))]) == 0
    assert plan_main(["--model", model, *common, "--global_batch_size", "64"]) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("01:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-01:00:10", 90010)],
)
def test_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert wall_seconds(text) == seconds


@pytest.mark.timeout(600)  # DeepSpeed starts twice
def test_a_measured_step_corrects_the_computation_alone(tmp_path, capsys):
    """On this CPU, whose figures are given: what comes out is what the two runs took."""
    figures = ["--gpu_memory_gb", "8", "--gpu_tflops", "0.1", "--gpu_bandwidth_gbs", "10"]
    small = ["--model", "tiny", "--d_model", "32", "--n_head", "2", "--seq_len", "32", "--vocab_size", "256"]
    words = [*small, "--gpu", "cpu", *figures, "--gpus_per_node", "1", "--global_batch_size", "2", "--tokens", "1e6"]
    words += ["--reserve_gb", "0.5", "--micro_batch_size", "2", "--zero_stage", "1", "--activation_checkpointing", "0"]
    before = answer(capsys, *words)
    after = answer(capsys, *words, "--measure")
    correction = after["measured"]["measured"] / after["measured"]["estimated"]
    assert after["correction"] == pytest.approx(correction)
    for name in ("products", "attention", "elementwise"):
        assert after["recommended"]["seconds"][name] == pytest.approx(
            correction * before["recommended"]["seconds"][name]
        )
    assert after["recommended"]["seconds"]["update"] == before["recommended"]["seconds"]["update"]
    assert after["measured"]["blocks"] == [2, 4]
    import torch

    gpu = torch.cuda.is_available()  # it was measured on "cpu_cores, gpus, cuda"
    assert after["measured"]["device"] == (torch.cuda.get_device_name(0) if gpu else f"{os.cpu_count()} cores of a CPU")
    told = list(Measured(**after["measured"]).lines())
    assert len(told) == (1 if gpu else 2)
    assert gpu or told[1].startswith("warning: there is no GPU here")


def test_a_table_larger_than_a_bucket_counts_as_one():
    from megagpt.tools.plan_traffic import buckets

    config = GPTConfig(**MODELS["gpt2-small"])
    P = parameters(config)
    assert buckets(P, 10**9) == 1
    assert buckets(P[:1], 1000) == 1
    assert buckets(P, 1) == len(P)
