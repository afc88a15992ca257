"""Speed of generation on this CPU beside transformers' ``generate`` with its cache, with equal tokens.

    python kernels/benchmarks/cpu_generate.py [--rounds 3] [--tokens 256] [--output FOLDER]

GPT-2's smallest shape with random weights, prompts of 32 tokens, greedy; in float32 and in bfloat16, alone and eight at
once. Both have the same weights, and in float32 their tokens are compared. A token has to read all weights once: the
share of the rate at which this machine copies memory counts the weights' bytes, read once a step, against all that a
copy moves.
"""

import time
from functools import partial

import timing
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.model.config import GPTConfig
from megagpt.model.generate import Generation, Text
from megagpt.model.gpt import GPT
from megagpt.model.interop import to_transformers
from megagpt.model.sampling import Sampling
from megagpt.ops import load_ops

PROMPT = 32
SMALL = {"vocab_size": 50257, "seq_len": 1024, "n_layer": 12, "n_head": 12, "d_model": 768}
QUICK = {"vocab_size": 101, "seq_len": 128, "n_layer": 2, "n_head": 2, "d_model": 32}


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each text")
    args = parser.parse_args()
    rounds, n_new = (1, 16) if args.quick else (args.rounds or 3, args.tokens)
    shape = GPTConfig(**(QUICK if args.quick else SMALL))
    torch.set_num_threads(timing.cores())
    report = timing.Report("cpu_generate", timing.machine("torch", "transformers"), args.output)
    copied = copy_rate(1 << 22 if args.quick else 1 << 29)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = models(shape, dtype)
        for batch in (1, 8):
            name = f"{str(dtype).removeprefix('torch.')}, batch {batch}"
            report.add(name, *bench(ours, theirs, batch, n_new, rounds, copied))


def copy_rate(n_bytes: int) -> float:
    """Bytes a second that a copy moves: half of them it reads, half it writes."""
    source, target = torch.ones(n_bytes, dtype=torch.uint8), torch.empty(n_bytes, dtype=torch.uint8)
    target.copy_(source)
    return 2 * n_bytes / timing.spread(timing.timed(lambda: target.copy_(source)) for _ in range(5)).median


def models(shape: GPTConfig, dtype: torch.dtype) -> tuple[GPT, GPT2LMHeadModel]:
    """Ours and theirs with the same weights, drawn wide enough that the likeliest token is no close call."""
    torch.manual_seed(0)
    ours = GPT(shape, load_ops("auto", head_width=shape.head_width, dtype=dtype, device="cpu"))
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.d_model, "n_positions": shape.seq_len}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab_size, **sizes))
    theirs.load_state_dict(to_transformers(ours.state_dict(), shape))
    return ours.to(dtype).eval().requires_grad_(False), theirs.to(dtype).eval().requires_grad_(False)


def bench(ours: GPT, theirs: GPT2LMHeadModel, batch: int, n_new: int, rounds: int, copied: float) -> tuple[dict, str]:
    """Tokens a second of both, in turns."""
    vocab = ours.config.vocab_size
    prompts = torch.randint(vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    texts, late = {}, []

    def our_run() -> float:
        begun = time.perf_counter()
        texts["ours"], times = generate(ours, prompts, n_new)
        late.append(growth(times))
        return time.perf_counter() - begun

    def their_run() -> float:
        begun = time.perf_counter()
        texts["theirs"] = generate_theirs(theirs, prompts, n_new)
        return time.perf_counter() - begun

    generate(ours, prompts, 2)
    generate_theirs(theirs, prompts, 2)
    seconds = timing.interleave({"ours": our_run, "theirs": their_run}, rounds)
    equal = sum(a == b for x, y in zip(texts["ours"], texts["theirs"], strict=True) for a, b in zip(x, y, strict=True))
    share = equal / (batch * n_new)
    assert share == 1 or ours.wte.weight.dtype != torch.float32, "tokens differ"
    rates = {name: timing.spread(batch * n_new / s for s in values) for name, values in seconds.items()}
    ratio = timing.paired(seconds["theirs"], seconds["ours"])
    n_bytes = sum(p.numel() * p.element_size() for name, p in ours.named_parameters() if name != "wpe.weight")
    bandwidth = n_bytes * n_new / timing.spread(seconds["ours"]).median
    figures = {
        "tokens_per_s": rates,
        "ratio": ratio,
        "equal_tokens": share,
        "weights_read_gb_per_s": bandwidth / 1e9,
        "copy_gb_per_s": copied / 1e9,
        "share_of_copy": bandwidth / copied,
        "late_over_early": timing.spread(late),
    }
    header = [
        "megagpt, tokens/s",
        "transformers, tokens/s",
        "x",
        "weights read, GB/s",
        "of a copy",
        "late / early step",
    ]
    cells = [rates["ours"], rates["theirs"], ratio, f"{bandwidth / 1e9:.2f}", f"{bandwidth / copied:.0%}"]
    dtype = str(ours.wte.weight.dtype).removeprefix("torch.")
    title = f"## {dtype}, batch {batch}, {n_new} new tokens behind {PROMPT} ({share:.0%} of the tokens equal)"
    return figures, f"{title}\n\n{timing.table(header, [[*cells, figures['late_over_early']]])}"


def generate(model: GPT, prompts: list[list[int]], n_new: int) -> tuple[list[list[int]], list[float]]:
    """The new tokens of each prompt, and the seconds of each step."""
    generation = Generation(model, max_texts=len(prompts), max_tokens=PROMPT + n_new)
    texts = [Text(ids, max_new_tokens=n_new, sampling=Sampling(temperature=0)) for ids in prompts]
    for text in texts:
        generation.join(text)
    step = partial(timing.timed, generation.step)
    times = [step() for _ in range(n_new)]
    return [text.new for text in texts], times


def generate_theirs(model: GPT2LMHeadModel, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": n_new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    return found[:, PROMPT:].tolist()


def growth(times: list[float]) -> float:
    """How much longer the last quarter of the steps takes than the second: the first has the prompt in it."""
    n = max(1, len(times) // 4)
    return timing.spread(times[-n:]).median / timing.spread(times[n : 2 * n]).median


if __name__ == "__main__":
    main()
