"""Whatever a user gets wrong is one sentence, said once, with exit code 2, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpora import tiny_corpus, write_bytes_corpus
from distributed import train
from safetensors.torch import save_file

from megagpt.train import manifest


def arguments(folder: Path, **changes) -> list:
    config = folder / "ds.json"
    if not config.exists():
        config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    flags = {
        "ds_config": config,
        "model": "tiny",
        "n_layer": 1,
        "d_model": 32,
        "n_head": 2,
        "seq_len": 16,
        "data": tiny_corpus(),
        "run_dir": folder / "run",
        "max_steps": 1,
        "micro_batch_size": 2,
        **changes,
    }
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


def truncated(folder: Path, ending: str) -> Path:
    for path in Path(tiny_corpus()).parent.glob("stdlib.*"):
        if path.is_file():
            shutil.copy(path, folder)
    path = folder / f"stdlib{ending}"
    path.write_bytes(path.read_bytes()[:-7])
    return folder / "stdlib"


def absurd_header(folder: Path) -> Path:
    """An index that says 2^60 sequences: believed, it would ask for 16 exabytes."""
    prefix = truncated(folder, ".tokenizer.json")
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[18:26] = (2**60).to_bytes(8, "little")
    Path(f"{prefix}.idx").write_bytes(data)
    return prefix


def foreign(folder: Path) -> Path:
    prefix = truncated(folder, ".tokenizer.json")
    Path(f"{prefix}.idx").write_bytes(b"PK\3\4 this is a zip file, not an index" * 10)
    return prefix


def other_tokenizer(folder: Path) -> list:
    write_bytes_corpus(folder / "other", [b"some other text " * 50], tokenizer_sha256="1" * 64)
    return [f"v={folder / 'other'}"]


def too_short(folder: Path) -> Path:
    write_bytes_corpus(folder / "short", [b"tiny"])
    return folder / "short"


def without_a_second_token(folder: Path) -> list:
    write_bytes_corpus(folder / "one", [b"x"])
    return [f"v={folder / 'one'}"]


def of_an_unknown_model(folder: Path) -> Path:
    save_file({"wte.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def of_shorter_sequences(folder: Path) -> Path:
    """Weights whose position table has 16 rows."""
    shape = {"vocab_size": 256, "seq_len": 16, "n_layer": 1, "n_head": 2, "d_model": 32, "d_ff": 128, "norm": "pre"}
    path = folder / "model.safetensors"
    tables = {"wpe.weight": torch.zeros(16, 32), "wte.weight": torch.zeros(256, 32)}
    save_file(tables, path, metadata={"config": json.dumps(shape)})
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CASES = {
    "missing corpus": (lambda f: {"data": f / "nothing"}, "nothing.bin does not exist"),
    "truncated tokens": (lambda f: {"data": truncated(f, ".bin")}, "stdlib.bin"),
    "truncated index": (lambda f: {"data": truncated(f, ".idx")}, "stdlib.idx is"),
    "foreign index": (lambda f: {"data": foreign(f)}, "is not an index of tokens"),
    "absurd header": (lambda f: {"data": absurd_header(f)}, "1,152,921,504,606,846,976 sequences"),
    "another tokenizer": (lambda f: {"valid_data": other_tokenizer(f)}, "was made with another tokenizer"),
    "vocabulary too large": (lambda f: {"vocab_size": 100}, "needs a vocabulary of 256 and the model has 100"),
    "corpus shorter than a sample": (lambda f: {"data": too_short(f)}, "one sample of seq_len=16 needs 17"),
    "validation set without a prediction": (
        lambda f: {"valid_data": without_a_second_token(f)},
        "one has 1 tokens; a validation set needs at least two",
    ),
    "nothing to resume": (lambda f: {"resume": f / "nowhere"}, "nowhere does not exist"),
    "weights of an unknown model": (
        lambda f: {"init_from": of_an_unknown_model(f), "model": None},
        "does not say which model its weights are of: a model needs vocab_size",
    ),
    "sequences longer than the position table": (
        lambda f: {"init_from": of_shorter_sequences(f), "model": None, "seq_len": 32},
        "seq_len 32 (the weights have 16)",
    ),
    "weights to resume from": (
        lambda f: {"resume": of_shorter_sequences(f)},
        "--init_from starts a new run from it",
    ),
    "no length": (lambda f: {"max_steps": None}, "give --max_steps, --max_tokens or --epochs"),
    "less than a step": (lambda f: {"max_steps": None, "max_tokens": 3}, "is less than one step"),
    "unknown model": (lambda f: {"model": "gpt1x"}, "did you mean 'gpt1'"),
    "unknown schedule": (lambda f: {"schedule": "cosine_warmup"}, "--schedule cosine_warmup is unknown"),
    "warm-up longer than the run": (lambda f: {"warmup_steps": 9}, "--warmup_steps 9 does not fit"),
    "heads do not divide": (lambda f: {"n_head": 5}, "must be a multiple of n_head=5"),
    "misspelt flag": (lambda f: {"lerning_rate": 1}, "unknown flag --lerning_rate"),
    "impossible batch": (
        lambda f: {"global_batch_size": 7, "gradient_accumulation_steps": 3},
        "train_batch_size 7 is not 2 per rank x 3 steps x 2 ranks = 12",
    ),
    "fp16 on a CPU": (lambda f: {"precision": "fp16"}, "fp16 needs a GPU and none is visible"),
    "misspelt JSON key": (
        lambda f: {"ds_config": written(f / "x.json", '{"zero_optimisation": {}}')},
        "(did you mean 'zero_optimization'?)",
    ),
    "JSON key given twice": (
        lambda f: {"ds_config": written(f / "x.json", '{"bf16": {}, "bf16": {}}')},
        'the key "bf16" occurs twice',
    ),
    "no such ds_config": (lambda f: {"ds_config": f / "no.json"}, "no.json"),
    "apex that is not NVIDIA's": (lambda f: {"optimizer": "apex"}, "package called apex on PyPI is another one"),
    "kernels that cannot serve": (lambda f: {"kernels": "triton"}, "--kernels triton"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence_on_two_ranks(case, tmp_path):
    changes, words = CASES[case]
    codes, output = train(arguments(tmp_path, **changes(tmp_path)), 2)
    assert codes in ([2, 2], [3, 3]), output
    assert words in output
    assert output.count("error:") == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_one_checkpoint_is_told_before_the_first_step(tmp_path):
    """It was told by the first save, which for a run that saves at its end alone is after all the work."""
    shape = {"n_layer": 96, "d_model": 12288, "n_head": 96, "seq_len": 2048}
    codes, output = train(arguments(tmp_path, **shape, save_interval=1, keep_weights_interval=1), 2)
    assert codes == [7, 7], output
    assert "GB free and a checkpoint takes about 2" in output
    assert "GB, and the weights kept of it 6" in output
    assert output.count("error:") == 1, output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")], ids=str
)
def test_training_that_stays_not_finite_stops_with_its_own_code_and_keeps_the_checkpoints_before(
    tmp_path, stage, precision
):
    """Checkpoints of skipped updates took the place of those from before the trouble."""
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}, "gradient_clipping": 0}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    flags = {"max_steps": 60, "lr": 1e17, "warmup_steps": 0, "save_interval": 1, "log_interval": 1}
    codes, output = train(arguments(tmp_path, **flags), 1)
    assert codes == [6], output
    assert "10 updates in a row had gradients that are not finite" in output
    assert "Traceback" not in output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first_skipped = next(record["step"] for record in records if record.get("skipped_steps"))
    saved = [manifest.step_of(folder) for folder in manifest.folders(tmp_path / "run" / "checkpoints")]
    assert saved[0] == first_skipped - 1
