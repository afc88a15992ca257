"""Small values of all ranks, exchanged as JSON in tensors: nothing that comes from another rank is unpickled."""

import json
import sys


def gather_json(value) -> list:
    """``value`` of every rank, by rank; it is anything JSON can hold. Every rank calls this.

    Without a process group this process is the only rank. Where all values are None one number is exchanged.
    """
    if "torch" not in sys.modules:
        return [value]
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    text = b"" if value is None else json.dumps(value).encode()
    longest = torch.tensor([len(text)], device=device)
    distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
    mine = torch.zeros(int(longest.item()), dtype=torch.uint8, device=device)
    if not len(mine):
        return [None] * distributed.get_world_size()
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    all_texts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_texts, mine)
    texts = [bytes(t.tolist()).rstrip(b"\0") for t in all_texts]
    return [json.loads(text) if text else None for text in texts]
