"""The benchmarks of the kernels, as far as a machine without a GPU can tell: what they leave, and whom they refuse."""

import csv
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    for folder in ("kernels", "kernels/benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """What a quick run of everything on the CPU leaves, kernels interpreted."""
    out = tmp_path_factory.mktemp("bench")
    providers = ["megagpt", "torch", "sdpa-flash", "sdpa-cudnn", "flex", "liger", "apex"]
    command = [sys.executable, "kernels/bench.py", "all", "--quick", "--providers", *providers, "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed.txt").write_text(done.stdout)
    return out


def rows_of(folder, **wanted):
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_without_a_gpu_it_says_so_in_one_line(quick):
    assert (quick / "printed.txt").read_text().splitlines()[0].startswith("no GPU here")


OPERATIONS = ["attention", "bias_gelu", "layer_norm", "add_layer_norm", "linear_cross_entropy"]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("provider", ["megagpt", "torch"])
def test_every_operation_is_timed_in_every_pass(quick, op, provider):
    passes = {row["pass"] for row in rows_of(quick, op=op, provider=provider, status="timed")}
    assert passes == ({"both"} if op == "linear_cross_entropy" else {"forward", "backward", "both"})


def test_a_timed_row_has_times_floors_and_an_error_within_its_limit(quick):
    rows = rows_of(quick, status="timed")
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["floor_ms"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
        assert row["bound"] in ("memory", "matmul")
        assert row["error"] <= row["error_limit"]
    assert any(row["speedup"] for row in rows)


def test_who_is_not_timed_is_listed_with_a_reason(quick):
    for row in rows_of(quick):
        assert (row["ms"] is None) == (row["status"] != "timed") == bool(row["reason"]), row
    absent = {row["provider"] for row in rows_of(quick, status="absent")}
    assert {"flex", "liger", "apex"} <= absent
    assert rows_of(quick, provider="sdpa-cudnn", status="cannot run")
    summary = (quick / "summary.md").read_text()
    assert "attention, flex: FlexAttention has" in summary


def test_the_table_holds_the_same_rows_as_the_json(quick):
    with open(quick / "bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = rows_of(quick)
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}


def test_device_and_versions_are_in_the_report(quick):
    report = json.loads((quick / "bench.json").read_text())
    assert report["on"]["torch"] == torch.__version__
    assert report["on"]["device"]
    assert report["ceilings"]["copy_bytes_per_s"] > 0
    assert set(report["ceilings"]["matmul_flops"]) == {"fp16", "bf16", "fp32"}
    assert report["failed"] == []


def test_whole_steps_tell_tokens_per_second_and_where_the_time_goes(quick):
    steps = json.loads((quick / "bench.json").read_text())["steps"]
    timed = {step["backend"]: step for step in steps if step["status"] == "timed"}
    assert {"torch", "torch, plain loop"} <= set(timed)
    (ours,) = [step for step in steps if step["backend"] == "megagpt"]
    assert ours["status"] == "timed" or ours["reason"]
    for step in timed.values():
        assert step["tokens_per_s"] == pytest.approx(2 * 16 / step["ms"] * 1e3)
        assert step["mfu"] is None  # nobody knows what this processor could do
        assert step["kinds"]["products"] > 0


def test_pictures_are_drawn(quick):
    pytest.importorskip("matplotlib")
    assert {path.name for path in quick.glob("*.png")} == {f"bench-{name}.png" for name in [*OPERATIONS, "model"]}


# -- who is wrong gets no time


def gelu(x, bias):
    return F.gelu(x + bias, approximate="tanh")


WRONG = {
    "another form": lambda x, bias: F.gelu(x + bias),
    "a wrong row": lambda x, bias: gelu(x, bias).index_fill(0, torch.tensor(0), 0.0),
    "one element unwritten": lambda x, bias: (
        gelu(x, bias) + torch.zeros_like(x).index_fill(0, torch.tensor(5), torch.nan)
    ),
    "wrong gradient": lambda x, bias: gelu(x, bias) + 0.01 * (x - x.detach()),
    "no gradient": lambda x, bias: gelu(x.detach(), bias),
    "an exception": lambda x, bias: x.nonsense(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_gets_no_time(bench, name):
    problem = next(bench("gpu_rows").gelu_problems(CPU, ("torch",), quick=True))()
    problem.providers[name] = WRONG[name]
    clock = bench("gpu_clock").Clock(CPU, warmup_ms=0, rep_ms=0)
    ceilings = bench("gpu_measure").Ceilings(1e10, {"fp32": 1e11})
    rows = bench("gpu_measure").measure(problem, clock, ceilings, rounds=1)
    assert {row["provider"] for row in rows if row["status"] == "timed"} == {"torch"}
    (refused,) = [row for row in rows if row["provider"] == name]
    assert refused["ms"] is None
    assert refused["reason"].startswith(("wrong", "cannot run"))


@pytest.mark.parametrize(
    ("p", "scale", "accepted"),
    [(0.1, 1 / 0.9, True), (0.1, 1.0, False), (0.0, 1.0, False), (0.5, 2.0, False)],
    ids=["right", "not scaled up", "nothing dropped", "another rate"],
)
def test_dropout_with_other_masks_has_to_be_right_on_average(bench, p, scale, accepted):
    *_, make = bench("gpu_attention").problems(CPU, ("torch",), quick=True)
    problem = make()
    assert problem.dropout == 0.1

    def attention(q, k, v):
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + torch.full((64, 64), -torch.inf).triu(1)).softmax(-1)
        return (weights * (torch.rand_like(weights) >= p) * scale) @ v

    problem.providers = {"mine": attention}
    problem.own_masks = frozenset(problem.providers)
    torch.manual_seed(0)
    assert bench("gpu_problem").judge(problem)["mine"].ok == accepted


def measured(shapes) -> list[dict]:
    """Rows such as a whole run on a GPU leaves, all alike."""
    everything = {
        "attention": [*shapes.MODEL_ATTENTION],
        "layer_norm": shapes.NORM_ROWS,
        "add_layer_norm": shapes.NORM_ROWS,
        "bias_gelu": shapes.GELU_ROWS,
        "linear_cross_entropy": shapes.HEADS,
    }
    values = {
        "status": "timed",
        "ms": 1.0,
        "tflops": 300.0,
        "percent_of_floor": 90.0,
        "speedup": 1.2,
        "extra_mb": 500.0,
    }
    providers = ("megagpt", "megagpt, deterministic", "torch", "liger", "liger, after the projection")
    return [
        {"op": op, "shape": shape.name, "pass": which, "dropout": p, "dtype": "bf16", "provider": provider, **values}
        for op, shapes_ in everything.items()
        for shape in shapes_
        for which in ("forward", "backward", "both")
        for p in (0.0, 0.1)
        for provider in providers
    ]


def test_goals_are_held_against_what_was_measured(bench):
    rows = measured(bench("shapes"))
    step = {"backend": "megagpt", "tokens_per_s": 550e3, "speedup": 1.2}
    cases = [("gpt2-small", "bf16", 0.0), ("gpt2-small", "fp16", 0.0), ("gpt1", "bf16", 0.1), ("1.3b", "bf16", 0.0)]
    steps = [{"model": model, "dtype": dtype, "dropout": dropout, **step} for model, dtype, dropout in cases]
    found = {goal.text: goal.met for goal in bench("gpu_goals").goals("NVIDIA H200", rows, steps)}
    assert None not in found.values()
    unmet = {text for text, met in found.items() if not met}
    assert unmet == {
        "attention, 1.3b, forward: TFLOP/s",  # 400
        "bias_gelu, gpt1, gpt2-small, forward: % of the copy bandwidth",  # 92
        *(f"bias_gelu, {name}, forward: % of the copy bandwidth" for name in ("gpt2-medium", "1.3b", "6.7b", "13b")),
        "layer_norm, 1.3b, backward: times as fast as torch",  # 1.5
        "layer_norm, 1.3b, backward: times as fast as liger",
        "linear_cross_entropy: times as fast as liger",  # 2
        "gpt1: tokens/s",  # 560,000
    }


def test_goals_of_what_was_not_measured_are_open_and_other_devices_have_none(bench):
    goals = bench("gpu_goals").goals
    assert {goal.met for goal in goals("NVIDIA H200", [], [])} == {None}
    assert goals("NVIDIA A100-SXM4-80GB", measured(bench("shapes")), []) == []


@pytest.mark.parametrize(("before", "complaints"), [(0.95, 0), (0.9, 1)], ids=["noise", "slower than before"])
def test_a_kernel_that_got_slower_is_reported(bench, quick, before, complaints):
    old = json.loads((quick / "bench.json").read_text())
    report = bench("gpu_report").Report(old["on"], None, rows=json.loads(json.dumps(old["rows"])))
    (row,) = [row for row in old["rows"] if row["provider"] == "megagpt" and row["op"] == "linear_cross_entropy"]
    row["ms"] *= before
    assert len(bench("gpu_report").slower(report, old)) == complaints


def test_a_baseline_of_another_device_is_refused(bench, tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"on": {"device": "an abacus"}, "rows": []}))
    assert bench("bench").main(["bias_gelu", "--quick", "--baseline", str(old)]) == 2
    assert "abacus" in capsys.readouterr().err


def test_one_part_goes_to_the_files_that_are_asked_for(bench, tmp_path, capsys):
    flags = ["--quick", "--providers", "torch", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "b")]
    assert bench("bench").main(["bias_gelu", *flags]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {(row["op"], row["provider"]) for row in rows} == {("bias_gelu", "torch")}
    written = {path.name for path in tmp_path.iterdir()}
    assert written in ({"a.json"}, {"a.json", "b-bias_gelu.png"})  # pictures need matplotlib
    assert "b-bias_gelu.png" in written or "matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "grace", "complaint"),
    [(["--nonsense"], 60, "its process ended with 2"), (["--quick"], 0.01, "was stopped")],
    ids=["it fails", "it hangs"],
)
def test_a_part_that_ends_badly_is_listed_and_what_was_measured_stays(
    bench, tmp_path, monkeypatch, flags, grace, complaint
):
    parts, Report = bench("gpu_parts"), bench("gpu_report").Report
    path = tmp_path / "bench.json"
    Report({"device": "an abacus"}, rows=[{"op": "earlier"}]).write_json(path)
    monkeypatch.setattr(parts, "_GRACE_S", grace)
    parts.measure_apart("bias_gelu", path, time.monotonic(), flags)
    report = Report.read(path)
    assert report.rows == [{"op": "earlier"}]
    (failed,) = report.failed
    assert failed.startswith("bias_gelu: ")
    assert complaint in failed


def test_what_there_is_no_time_for_is_listed(bench, tmp_path, capsys):
    assert bench("bench").main(["bias_gelu", "--quick", "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["rows"] == []
    assert report["skipped"] == ["bias_gelu: everything from its problem 1 on"]
    assert "## No time was left for" in (tmp_path / "summary.md").read_text()


# -- make gpu

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *get_device_capability*) echo 90 ;;
    *"-m pytest"*) echo "FAILED tests/test_x.py"; exit $PYTEST_ENDS_WITH ;;
    *aot.py*) echo "$*" ;;
    *bench.py*) echo "$*"; exit $BENCH_ENDS_WITH ;;
esac
"""


@pytest.mark.parametrize(("tests", "benchmarks"), [(0, 0), (1, 0), (0, 1)], ids=str)
def test_make_gpu_measures_whatever_became_of_the_tests_and_fails_if_one_does(tests, benchmarks, tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(out)}
    environment |= {"PYTEST_ENDS_WITH": str(tests), "BENCH_ENDS_WITH": str(benchmarks), "BENCH": "--providers torch"}
    done = subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (tests == benchmarks == 0), done.stdout + done.stderr
    printed = (out / "tests.txt").read_text()
    assert f"tests-0 ended with {tests}: " in printed
    assert "kernels/aot.py --arch 90" in printed
    measured = (out / "bench.txt").read_text()
    assert f"kernels/bench.py all --out {out} --minutes 8." in measured
    assert measured.endswith("--providers torch\n")


@pytest.mark.parametrize("n", [1, 3])
def test_shards_share_the_tests_out(n):
    import conftest

    tests, seen, left = list("abcdefgh"), [], []
    for i in range(n):
        items = [SimpleNamespace(path=Path(name)) for name in tests]
        hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
        option = SimpleNamespace(shard=f"{i}/{n}")
        conftest.pytest_collection_modifyitems(SimpleNamespace(option=option, hook=hook), items)
        seen += [item.path.name for item in items]
    assert sorted(seen) == tests
    assert len(left) == (n - 1) * len(tests)


def test_long_files_are_tested_first():
    import conftest

    items = [
        SimpleNamespace(path=Path(name)) for name in ("test_a.py", conftest.LONG[1], "test_b.py", conftest.LONG[0])
    ]
    conftest.pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(shard=None)), items)
    assert [item.path.name for item in items] == [*conftest.LONG[:2], "test_a.py", "test_b.py"]
    assert all((Path(__file__).parent / name).exists() for name in conftest.LONG)
