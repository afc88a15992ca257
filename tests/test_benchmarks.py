"""Every benchmark of the CPU runs: on the smallest sizes, to the end, and with figures in what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
SECTIONS = {
    "cpu_data": {"prepare", "reads", "huge"},
    "cpu_train": {"quick fp32", "quick bf16"},
    "cpu_finetune": {"quick"},
    "cpu_checkpoint": {"save", "stall", "restart"},
    "cpu_generate": {f"{dtype}, batch {n}" for dtype in ("float32", "bfloat16") for n in (1, 8)},
    "cpu_serve": {"one client", "several clients"},
}


def numbers(figures):
    """Every number in nested dictionaries and lists."""
    if isinstance(figures, dict | list):
        parts = figures.values() if isinstance(figures, dict) else figures
        return [number for part in parts for number in numbers(part)]
    return [figures] if isinstance(figures, int | float) else []


@pytest.mark.parametrize("name", SECTIONS)
def test_a_benchmark_runs_to_the_end_and_writes_its_figures(name, tmp_path):
    script = REPO / "kernels" / "benchmarks" / f"{name}.py"
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    command = [sys.executable, script, "--quick", "--output", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert figures.pop("machine")["cores"] >= 1
    assert set(figures) == SECTIONS[name]
    for section, values in figures.items():
        assert numbers(values), section
        assert all(number > 0 for number in numbers(values)), section
    report = (tmp_path / "out" / f"{name}.md").read_text()
    assert report.count("\n## ") == len(SECTIONS[name])
    assert set(report.splitlines()[2:]) <= set(done.stdout.splitlines())
