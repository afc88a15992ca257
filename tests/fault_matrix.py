"""Faults of four kinds in every way of keeping weights and states: ZeRO 0 to 3 in fp32, bf16 and fp16.

    python tests/fault_matrix.py [--only ranks] [--config zero2_bf16]

``resume``: a run that is stopped and goes on is the one that was not, bit for bit. ``ranks``: on another number of
ranks it has the same samples and nearly the same losses. ``writes``, ``background``: the disk refuses any operation of
a save. ``numbers``: losses and gradients that are not finite. ``make fault-matrix`` does all of it, a line a case, and
ends at the first defect.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from chaos import compare
from checkpoint_common import CONFIGS, curve, folder, stopped_after
from corpora import write_bytes_corpus
from fault_numbers import numbers
from fault_writes import writes
from several_runs import case, launch, samples_by_step, several_runs

from megagpt.train import checkpoint

SEQ_LEN, WINDOWS = 16, 32  # samples of an epoch: four steps of eight
STEPS, SKIPPED = 10, 6  # this step's loss is not finite
MOMENTS = {"step 1": 1, "an accumulation of two": 3, "an epoch's end": 4, "a skipped step": SKIPPED + 1}
TWICE = (2, 5)

LONGER, FIRST = 12, 2  # steps of a run that changes its ranks, and the one after which it does
MOVES = ((2, 1), (1, 2), (2, 4))
LARGEST = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}  # difference of a loss


def resume(home: Path, configs: list[str]) -> Iterator[str]:
    """Runs that are stopped after the save of a step and resumed; a line a case."""
    write_bytes_corpus(home / "corpus", [Path(json.__file__).read_bytes()[: WINDOWS * SEQ_LEN + 1]])

    def run(name: str, config: str, until: int | None = None):
        scale = {"initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}
        flags = {"data": home / "corpus", "max_steps": STEPS, "keep_last": STEPS, "global_batch_size": 8}
        return case(home / name, config, samples=[44], until=until, fp16=scale, dropout=0.1, **flags)

    whole = launch({config: run(config, config) for config in configs})
    starts, again = {}, {}
    for config in configs:
        for moment, step in _moments(home / config, config).items():
            name = f"{config}, stopped after {moment}"
            stopped_after(home / config, home / name, step)
            starts[name] = config, run(name, config), step
        name = f"{config}, stopped twice"
        stopped_after(home / config, home / name, TWICE[0])
        starts[name] = config, run(name, config, until=TWICE[1]), TWICE[0]
        again[name] = run(name, config)
    first, second = launch({name: how for name, (_, how, _) in starts.items()}), launch(again)
    for name, (config, _, step) in starts.items():
        compare(home / name, home / config, name, STEPS)
        states = [checkpoint.read_state(folder(home / run, STEPS)) for run in (name, config)]
        assert states[0] == states[1], f"{name}: {states}"
        for rank in range(2):
            seen = samples_by_step(first[rank], name) | samples_by_step(second[rank], name)
            expected = samples_by_step(whole[rank], config)
            assert len(expected) == STEPS, whole[rank]
            assert seen == {s: ids for s, ids in expected.items() if s > step}, f"{name}, rank {rank}: {seen}"
        yield f"{name}: from step {step} on the same bits"


def _moments(whole: Path, config: str) -> dict[str, int]:
    """After which step a run is stopped. Only the search for fp16's loss scale saves at a skipped step itself."""
    records = {record["step"]: record["skipped_steps"] for record in curve(whole)}
    skipped = [step for step in range(2, STEPS) if records[step] > records[step - 1]]
    assert SKIPPED in skipped, f"{config}: {records}"
    if "fp16" not in config:
        return MOMENTS
    assert 2 <= len(skipped) <= 5, f"{config}: a loss scale that is no longer searched for: {records}"
    return {**MOMENTS, "a skipped step": next(step for step in skipped if step != SKIPPED)}


def untied_runs(cases: dict) -> None:
    """:func:`several_runs` of a model whose output projection is not its token embedding."""
    from megagpt.model.blocks import Embedding
    from megagpt.train import run

    class Untied(run.GPT):
        def __init__(self, config, ops) -> None:
            super().__init__(config, ops)
            self.head = Embedding(config.vocab_size, config.d_model)

        def hidden_and_words(self, ids, rows=None):
            return self.hidden(ids, rows), self.head.weight

    run.GPT = Untied
    several_runs(cases)


def ranks(home: Path, configs: list[str]) -> Iterator[str]:
    """Runs that go on with another number of ranks or another stage of ZeRO; a line a case."""

    def run(name: str, config: str):
        # Between the two the loss scale grows, and is part of what has to go on.
        scale = {"initial_scale_power": 8, "loss_scale_window": 5}
        flags = {"max_steps": LONGER, "save_interval": FIRST, "schedule": "warmup_constant", "lr": 3e-3, "dropout": 0}
        return case(home / name, config, fp16=scale, global_batch_size=8, weight_decay=0.1, **flags)

    for head, fn in (("tied", several_runs), ("untied", untied_runs)):
        names = {config: f"{config}, {head}" for config in configs}
        whole = {}
        for n in (1, 2):
            whole[n] = launch({f"{name} on {n}": run(f"{name} on {n}", c) for c, name in names.items()}, n, fn)
        moves = [(before, now, f"{name} on {before}", c, c) for before, now in MOVES for c, name in names.items()]
        for config, name in names.items():
            other = {"zero1": "zero2", "zero2": "zero1"}.get(config[:5])
            if other:
                moves.append((2, 2, f"{name} on 2", config, other + config[5:]))
        for pair in dict.fromkeys((before, now) for before, now, *_ in moves):
            ours = {}
            for before, now, old, config, then in moves:
                if (before, now) == pair:
                    name = f"{old}, then {then} on {now}"
                    stopped_after(home / old, home / name, FIRST)
                    ours[name] = old, config, run(name, then)
            told = launch({name: how for name, (_, _, how) in ours.items()}, pair[1], fn)
            for name, (old, config, _) in ours.items():
                yield f"{name}: {_nearly_equal(home, name, old, config, told, whole[pair[0]])}"
    yield from _refused(home, configs, run)


def _nearly_equal(home: Path, name: str, old: str, config: str, told: list[str], whole: list[str]) -> str:
    found, expected = curve(home / name), curve(home / old)
    assert len(found) == LONGER, f"{name}: {told[0]}"
    for key in ("step", "samples", "tokens", "lr", "loss_scale", "skipped_steps"):
        values = [[record[key] for record in records] for records in (found, expected)]
        assert values[0] == values[1], f"{name}: {key} is {values[0]} and was {values[1]}"
    ours, theirs = _samples(told, name), _samples(whole, old)
    assert ours == {step: ids for step, ids in theirs.items() if step > FIRST}, f"{name}: {ours}"
    losses = [(a["loss"], b["loss"]) for a, b in zip(found, expected, strict=True)]
    most = max(abs(a - b) for a, b in losses[FIRST:])
    precision = config[6:]
    assert most <= LARGEST[precision], f"{name}: losses differ by {most:.2e}: {losses}"
    assert losses[0][1] - losses[-1][1] > 5 * LARGEST[precision], f"{name}: too little is learnt to tell: {losses}"
    assert not list((home / name / "checkpoints").glob(".*")), f"{name}: what the conversion wrote is gone"
    return f"the same samples, losses differ by {most:.1e} at most"


def _samples(outputs: list[str], name: str) -> dict[int, list[int]]:
    """The samples of each step of a run, of all ranks together."""
    found: dict[int, list[int]] = {}
    for output in outputs:
        for step, batches in samples_by_step(output, name).items():
            found[step] = sorted([*found.get(step, []), *(number for batch in batches for number in batch)])
    return found


def _refused(home: Path, configs: list[str], run) -> Iterator[str]:
    """Stages of ZeRO whose files are of another kind, and ZeRO-1 and 2 together with another number of ranks."""
    ours = {}
    for config in configs:
        for stage in sorted({0, 1, 2, 3} - {int(config[4])}):
            n = 1 if {int(config[4]), stage} == {1, 2} else 2
            name = f"{config}, then zero{stage} on {n}"
            stopped_after(home / f"{config}, tied on 2", home / name, FIRST)
            before = sorted((home / name).rglob("*"))
            words = f"ZeRO stage {config[4]} in the checkpoint and {stage} now"
            ours[name] = run(name, f"zero{stage}{config[5:]}"), n, before, words
    for n in (1, 2):
        those = {name: how for name, how in ours.items() if how[1] == n}
        if not those:  # there is but one config
            continue
        told = launch({name: how for name, (how, *_) in those.items()}, n)
        for name, (_, _, before, words) in those.items():
            for output in told:
                line = next((line for line in output.splitlines() if line.startswith(f"{name} ends with 2: ")), "")
                assert "cannot resume" in line and words in line, f"{name}: {output}"  # noqa: PT018
            assert sorted((home / name).rglob("*")) == before, f"{name}: something was written"
            yield f"{name}: refused in words"


SECTIONS = {
    "resume": resume,
    "ranks": ranks,
    "writes": writes,
    "background": functools.partial(writes, background=True),
    "numbers": numbers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, help="one kind of fault")
    parser.add_argument("--config", choices=CONFIGS, help="one way of keeping weights and states")
    args = parser.parse_args()
    configs = [args.config] if args.config else list(CONFIGS)
    for section in [args.only] if args.only else SECTIONS:
        cases, begun = 0, time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"megagpt-{section}-") as home:
            try:
                for line in SECTIONS[section](Path(home), configs):
                    cases += 1
                    print(f"{section}: {line}", flush=True)
            except AssertionError as error:
                sys.exit(f"{section}: a defect after {cases} good cases: {error}")
        print(f"{section}: {cases} cases, no defect, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
