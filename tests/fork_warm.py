"""What every rank would do first, done once in the server that ranks are forked from: it imports this last of all."""

import contextlib
import gc


def _parse_flags() -> None:
    from megagpt.config.fields import parse

    parse(["--ds_config", "x", "--data", "x", "--run_dir", "x", "--max_steps", "1"])


def _multiply() -> None:
    import torch

    torch.set_num_threads(1)  # threads would not survive a fork
    for dtype in (torch.float32, torch.bfloat16):
        torch.nn.functional.linear(torch.ones(2, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype))


for step in (_parse_flags, _multiply):
    with contextlib.suppress(Exception, SystemExit):  # without it a rank takes longer
        step()
# Collecting garbage writes to every object, and each rank would copy all of the server's memory for it.
gc.collect()
gc.freeze()
