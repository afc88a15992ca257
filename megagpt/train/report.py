"""What a run leaves to read: run.json at its start; summary.json, summary.md and loss.png at its end."""

import json
from pathlib import Path


def write_summary(run_dir: Path, summary: dict) -> dict:
    """Write summary.json; the summary."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary
