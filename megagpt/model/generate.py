"""Drawing text from a decoder, one token after another."""

import torch
from torch import Tensor

_COLDEST = 1e-30  # a lower temperature would be rounded to zero in float32


@torch.no_grad()
def generate(
    model,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """At most ``max_new_tokens`` ids that go on from ``ids`` (at least one), up to but without ``stop_id``.

    ``temperature`` divides the logits, 0 takes the most likely token; ``top_k`` drops every token less likely than the
    k-th, 0 drops none. The model sees the last ``seq_len`` tokens and is expected in evaluation mode.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    context = list(ids)
    for _ in range(max_new_tokens):
        window = torch.tensor([context[-model.config.seq_len :]], device=device)
        token = _draw(model.next_logits(window)[0].float(), temperature, top_k, generator)
        if token == stop_id:
            break
        context.append(token)
    return context[len(ids) :]


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / max(temperature, _COLDEST)  # the largest stays finite
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
