"""Compile every kernel for GPUs that need not be there, and tell registers, spills and shared memory.

    python kernels/aot.py [--arch 80 90 100] [--op attention ...] [--table docs/kernels.md] [--json FILE]

A kernel is compiled exactly as an operation launches it at the shapes of kernels/shapes.py. --table rewrites the table
between the two marker lines of a Markdown file.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from launches import OPERATIONS
from offline import SHARED_LIMIT, compile_launches

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


def compile_all(operations: list[str], archs: list[int]) -> list[dict]:
    """One record for each distinct kernel: its resources, the operation, and every case that uses it."""
    records: dict[tuple, dict] = {}
    for operation in operations:
        for label, work in OPERATIONS[operation]():
            for arch in archs:
                for kernel in compile_launches(work, arch):
                    record = records.setdefault(
                        (operation, kernel.key), {"operation": operation, "cases": [], **asdict(kernel)}
                    )
                    record["cases"].append(label)
    return list(records.values())


def table(records: list[dict]) -> str:
    """The records as a Markdown table, one row for a kernel and what it is used for, one group of columns an arch."""
    lines = [
        "| operation | kernel | for | sm | warps x stages | registers | spilled | shared KB | matrix instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        matrix = ", ".join(f"{count} {name}" for name, count in record["tensor_core"].items()) or "none"
        lines.append(
            f"| {record['operation']} | `{record['name']}` | {'; '.join(record['cases'])} | {record['arch']} | "
            f"{record['num_warps']} x {record['num_stages']} | {record['registers']} | {record['spilled']} | "
            f"{record['shared'] / 1024:.0f} | {matrix} |"
        )
    return "\n".join(lines)


def rewrite(path: Path, text: str) -> None:
    """Put ``text`` between the marker lines of a file, in place of what is there."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"error: {path} has no lines {BEGIN} and {END}; add them where the table belongs")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--op", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--table", type=Path, help="Markdown file whose table is rewritten")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    args = parser.parse_args()
    records = compile_all(args.op, args.arch)
    print(table(records))
    if args.table:
        rewrite(args.table, table(records))
    if args.json:
        args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
