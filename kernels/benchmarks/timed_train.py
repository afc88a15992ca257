"""train.py, with the seconds that the parts of a start and every step took in a last line of JSON.

A step's seconds hold the save that follows it. BEGUN is the time at which the process was started.
"""

import json
import os
import sys
import time
from pathlib import Path

BEGUN = "MEGAGPT_BENCH_BEGUN"
REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))


def main() -> int:
    seconds: dict[str, float] = {}
    steps: list[float] = []

    from megagpt.train import engine as deepspeed_engine
    from megagpt.train import loop, main, resume, run

    deepspeed_engine.import_deepspeed()
    seconds["imports"] = time.time() - float(os.environ[BEGUN])

    def watch(owner, name: str, what: str) -> None:
        fn = getattr(owner, name)

        def timed(*args, **kwargs):
            begun = time.perf_counter()
            result = fn(*args, **kwargs)
            seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - begun
            return result

        setattr(owner, name, timed)

    watch(resume, "checkpoint_to_resume", "verification")
    watch(run, "GPT", "engine")
    watch(deepspeed_engine, "build_engine", "engine")
    watch(resume, "load", "load")
    advance = loop.Loop.advance

    def timed_advance(self) -> None:
        begun = time.perf_counter()
        advance(self)
        steps.append(time.perf_counter() - begun)
        if len(steps) == 1:
            seconds["first step"] = steps[0]
            seconds["in all"] = time.time() - float(os.environ[BEGUN])
            seconds["the rest"] = seconds["in all"] - sum(s for what, s in seconds.items() if what != "in all")

    loop.Loop.advance = timed_advance
    code = main.main(sys.argv[1:])
    print(json.dumps({"parts": seconds, "steps": steps}), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
