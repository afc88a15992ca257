"""A model in this process as one of lm-evaluation-harness (EleutherAI), which has the tasks and their scores."""

import contextlib
import logging
import math
import re
from functools import partial
from pathlib import Path

from megagpt import dist
from megagpt.dist import gather_json
from megagpt.errors import ConfigError, DataError, nearest

_LIMIT = 256  # tokens of an answer where a task does not say


def check_installed() -> None:
    """Raise ConfigError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'megagpt[eval]'") from None


def evaluate_tasks(model, tokenizer, settings, world: dist.World) -> dict:
    """{task: {measure: value}} of ``settings.tasks``, printed by rank 0 as a table.

    Every rank runs the harness over all questions and computes its share of them, so no rank's answers are another's.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(name) for name in settings.tasks if Path(name).is_file()]
    folders = sorted({str(file.parent) for file in files})
    # To find the harness's own thousands of tasks takes seconds.
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(settings.tasks))
    manager.load = partial(_loaded, manager.load)
    found = lm_eval.simple_evaluate(
        model=make_model(model, tokenizer, settings.batch_size, world),
        tasks=[_task(name, manager) for name in settings.tasks],
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    if found is None:  # to one process of a host it gives the results
        return {}
    results = {task: _measures(values) for task, values in found["results"].items()}
    if dist.is_main():
        from megagpt.evaluate.measure import table

        rows = [[task, name, f"{value:.4f}"] for task, values in results.items() for name, value in values.items()]
        print(table(["task", "measure", "value"], rows), flush=True)
    return results


def _loaded(load, tasks, *args, **kwargs):
    """What the harness's ``load`` gives. Raises DataError: most often, the data are not there and no network is."""
    try:
        return load(tasks, *args, **kwargs)
    except Exception as error:  # of datasets, the hub, HTTP, YAML, or whatever code a task brings
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise DataError(
            f"--tasks {' '.join(map(str, tasks))} cannot be loaded ({type(error).__name__}: {reason}); their data are "
            "downloaded when they are first asked for: do so once where there is a network, with the same HF_HOME"
        ) from error


def _task(name: str, manager) -> str:
    """The name of a task that is known or described in the file ``name``. Raises ConfigError."""
    if Path(name).is_file():
        named = re.search(r"^task:\s*['\"]?([^'\"\s]+)", Path(name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        if named is None:
            raise ConfigError(f"--tasks {name} describes no task: it has no line task: NAME")
        name = named[1]
    if not manager.match_tasks([name]):
        raise ConfigError(f"--tasks {name} is no task of the harness and no file{nearest(name, manager.all_tasks)}")
    return name


def _measures(values: dict) -> dict[str, float]:
    """{measure: value} of what the harness calls "measure,filter"."""
    numbers = {name: x for name, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if "," in name}


def make_model(model, tokenizer, batch_size: int, world: dist.World):
    """The harness's view of a decoder."""
    from lm_eval.api.model import TemplateLM

    from megagpt.evaluate.scores import score

    class InProcess(TemplateLM):
        backend = "causal"

        @property
        def eot_token_id(self):
            return tokenizer.eot_id

        def tok_encode(self, string: str, **kwargs) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            scores = self._scores([_conditioned(context, answer) for _, context, answer in requests])
            return [(sum(s.log_probs), s.greedy) for s in scores]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """The log-probability of each whole text, in windows of a context."""
            C, windows, owners = model.config.seq_len, [], []
            for i, request in enumerate(requests):
                ids, _ = _conditioned([tokenizer.eot_id], tokenizer.encode(request.args[0]))
                parts = [(ids[at : at + C + 1], 1) for at in range(0, len(ids) - 1, C)]
                windows += parts
                owners += [i] * len(parts)
            sums = [0.0] * len(requests)
            for owner, s in zip(owners, self._scores(windows), strict=True):
                sums[owner] += sum(s.log_probs)
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            mine = requests[world.rank :: world.world_size]
            parts = gather_json(_answers(model, tokenizer, [r.args for r in mine], batch_size))
            return [parts[i % len(parts)][i // len(parts)] for i in range(len(requests))]

        def _scores(self, sequences):
            place = {"rank": world.rank, "world_size": world.world_size}
            return score(model, sequences, batch_size=batch_size, **place)

    return InProcess()


def _conditioned(context: list[int | None], answer: list[int]) -> tuple[list[int], int]:
    """All ids and where the scored ones begin; without an end-of-text token a text's first one is not scored."""
    if context == [None] or not context:
        return list(answer), 1
    return [*context, *answer], len(context)


def _answers(model, tokenizer, asked: list[tuple[str, dict]], batch_size: int) -> list[str]:
    """Texts behind the prompts of ``asked``, each with the harness's settings of generation."""
    from megagpt.evaluate.text import Completion, complete
    from megagpt.model.generate import Generation, Text
    from megagpt.model.sampling import Sampling

    completions = []
    for prompt, options in asked:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        n = min(int(options.get("max_gen_toks", _LIMIT)), model.config.seq_len - 1)
        ids = tokenizer.encode(prompt)[-(model.config.seq_len - n) :] or [tokenizer.eot_id or 0]
        drawn = options.get("do_sample") and options.get("temperature", 1.0) > 0
        sampling = Sampling(temperature=float(options.get("temperature", 1.0)) if drawn else 0.0)
        stop_ids = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        tokens = Text(ids, max_new_tokens=n, sampling=sampling, stop_ids=stop_ids)
        completions.append(Completion(tokenizer, tokens, [text for text in until if text]))
    n = max(1, min(batch_size, len(completions)))
    generation = Generation(model, max_texts=n, vocab_size=tokenizer.vocab_size)
    with contextlib.closing(complete(generation, completions)) as pieces:
        for _ in pieces:
            dist.beat()
    return [completion.text for completion in completions]
