"""Compile every kernel for GPUs that need not be there, and tell registers, spills, shared memory and instructions.

    python kernels/aot.py [--arch 80 90 100] [--op attention ...] [--table docs/kernels.md] [--json FILE] [--quick]

A kernel is compiled exactly as an operation launches it at the shapes of kernels/shapes.py. --table rewrites the table
between the two marker lines of a Markdown file. The exit code is 1 when a kernel takes more than it may.
"""

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from launches import OPERATIONS
from offline import SHARED_LIMIT, compile_launches

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
ARCHS = (80, 90, 100)
# Bytes a thread: none in forward kernels; in those that make gradients a few, for what is outside of the loops.
MOST_SPILLED = {"forward": 0, "backward": 64}


def compile_all(operations: list[str], archs: list[int], *, quick: bool = False) -> list[dict]:
    """A record for every kernel of every case: the operation, the case, and what the kernel takes."""
    records = []
    for operation in operations:
        for case in OPERATIONS[operation](quick):
            for arch in archs:
                named: Counter[str] = Counter()
                for kernel in compile_launches(case.work, arch):
                    named[kernel.name] += 1
                    which = {"operation": operation, "case": case.label, "dtype": case.dtype, "nth": named[kernel.name]}
                    records.append(which | asdict(kernel))
    return records


def faults(record: dict) -> list[str]:
    """What is wrong with one kernel."""
    found = []
    if record["shared"] > SHARED_LIMIT[record["arch"]]:
        found.append(f"takes {record['shared']} bytes of shared memory, of {SHARED_LIMIT[record['arch']]}")
    most = MOST_SPILLED["backward" if is_backward(record) else "forward"]
    if record["spilled"] > most:
        found.append(f"spills {record['spilled']} bytes a thread, of {most}")
    wgmma = record["arch"] == 90 and record["dtype"] != "fp32"
    if record["products"] and not record["tensor_core"]:
        found.append("multiplies without tensor cores")
    elif record["products"] and wgmma and "HGMMA" not in record["tensor_core"]:
        found.append("multiplies without wgmma")
    case = f"{record['operation']}, {record['case']}, sm_{record['arch']}: {record['name']}"
    return [f"{case} {what}" for what in found]


def is_backward(record: dict) -> bool:
    return any(part in record["name"] for part in ("backward", "delta", "dkdv", "dq", "convert", "cross_entropy"))


def table(records: list[dict]) -> str:
    """Markdown: a row for each kernel, with the cases that share it, and a column for each compute capability."""
    archs = sorted({record["arch"] for record in records})
    cells: dict[tuple, dict[int, str]] = {}
    for record in records:
        key = record["operation"], record["name"], record["nth"], record["case"]
        cells.setdefault(key, {})[record["arch"]] = _cell(record)
    rows: dict[tuple, list[str]] = {}
    for (operation, name, _, case), by_arch in cells.items():
        rows.setdefault((operation, name, *(by_arch.get(arch, "") for arch in archs)), []).append(case)
    lines = [
        f"| operation | kernel | for | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        "|---" * (3 + len(archs)) + "|",
    ]
    for (operation, name, *by_arch), cases in rows.items():
        lines.append(f"| {operation} | `{name.strip('_')}` | {_folded(cases)} | {' | '.join(by_arch)} |")
    return "\n".join(lines)


def _folded(cases: list[str]) -> str:
    """Shapes and what they are compiled for, each once: "gpt1 / 1.3b: bf16 / bf16, dropout; K 32: bf16"."""
    forms: dict[str, list[str]] = {}
    for case in cases:
        shape, dtype, more = re.fullmatch(r"(.+?), (bf16|fp16|fp32)(.*)", case).groups()
        forms.setdefault(shape, []).append(dtype + more)
    shapes: dict[str, list[str]] = {}
    for shape, of_shape in forms.items():
        shapes.setdefault(" / ".join(of_shape), []).append(shape)
    return "; ".join(f"{' / '.join(names)}: {of_names}" for of_names, names in shapes.items())


def _cell(record: dict) -> str:
    """Warps and registers of a thread, shared memory, spilled bytes, matrix instructions; what is none is left out."""
    parts = [f"{record['num_warps']} warp{'s' * (record['num_warps'] > 1)}", f"{record['registers']} registers"]
    if record["shared"]:
        parts.append(f"{record['shared'] / 1024:.1f} KB")
    if record["spilled"]:
        parts.append(f"**{record['spilled']} B spilled**")
    return ", ".join(parts + [f"{count} {name}" for name, count in record["tensor_core"].items()])


def rewrite(path: Path, text: str) -> None:
    """Put ``text`` between the marker lines of a file, in place of what is there."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"error: {path} has no lines {BEGIN} and {END}; add them where the table belongs")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=list(SHARED_LIMIT), default=ARCHS)
    parser.add_argument("--op", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--quick", action="store_true", help="only the first and the last shape of each operation")
    parser.add_argument("--table", type=Path, help="Markdown file whose table is rewritten")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    args = parser.parse_args(argv)
    records = compile_all(args.op, args.arch, quick=args.quick)
    print(table(records))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    wrong = [line for record in records for line in faults(record)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if args.table and not wrong:
        rewrite(args.table, table(records))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
