"""How a language model answers a task without having been trained for it: by which of given texts it finds likelier.

CoLA, SST-2, RACE and definite pronouns as in section 5 ("Zero-shot Behaviors") of Radford et al. 2018, "Improving
Language Understanding by Generative Pre-Training"; ``partial`` and ``full`` scoring of a substitution as in Trinh and
Le 2018, "A Simple Method for Commonsense Reasoning", section 3.1; the connectives of COPA as in Gordon et al. 2012.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megagpt.errors import ConfigError, nearest
from megagpt.finetune.examples import Example

Scoring = Literal["partial", "full"]


@dataclass(frozen=True)
class Question:
    """Texts of which the model finds one likeliest: ``options[k]``, each read behind ``contexts[k]``.

    A context may be empty. CoLA's questions have one option, whose score is compared with a threshold.
    """

    id: str
    contexts: tuple[str, ...]
    options: tuple[str, ...]
    label: int  # index of the right option; CoLA: 1 for an acceptable sentence


@dataclass(frozen=True)
class Heuristic:
    """A task as the language model is asked it.

    ``task`` is its name in ``finetune.tasks`` and ``splits`` those of its splits that are asked, together.
    ``mean(scoring)``: whether an option's score is its tokens' mean log-probability; otherwise the sum, the logarithm
    of the product of their probabilities. ``random`` and ``reference`` are percentages: what guessing gives (None: one
    in the number of options), and a good result of a single model that was trained for the task.
    """

    task: str
    splits: tuple[str, ...]
    ask: Callable[[Example, Scoring], tuple[tuple[str, ...], tuple[str, ...]]]
    mean: Callable[[Scoring], bool] = lambda scoring: True
    metric: Literal["accuracy", "matthews"] = "accuracy"
    random: float | None = None
    reference: float | None = None
    substitutes: bool = False  # read with the pronoun's place apart


def _cola(example: Example, _) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("",), (example.texts[0],)


def _sst2(example: Example, _) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels are 0 for negative and 1 for positive."""
    return (f"{example.texts[0]} very",) * 2, (" negative", " positive")


def _race(example: Example, _) -> tuple[tuple[str, ...], tuple[str, ...]]:
    document, question = example.texts
    return (f"{document} {question}",) * len(example.choices), tuple(f" {choice}" for choice in example.choices)


def _pronoun(example: Example, scoring: Scoring) -> tuple[tuple[str, ...], tuple[str, ...]]:
    before, after = example.texts
    named = tuple(before + name for name in example.choices)
    if scoring == "full":
        return ("",) * len(named), tuple(text + after for text in named)
    return named, (after,) * len(named)


_CONNECTIVES = {"What was the cause of this?": "because", "What happened as a result?": "so"}


def _copa(example: Example, scoring: Scoring) -> tuple[tuple[str, ...], tuple[str, ...]]:
    premise, asked = example.texts
    context = f"{premise.rstrip(' .')} {_CONNECTIVES[asked]}"
    choices = tuple(f" {_within_sentence(choice)}" for choice in example.choices)
    if scoring == "full":
        return ("",) * len(choices), tuple(context + choice for choice in choices)
    return (context,) * len(choices), choices


def _within_sentence(text: str) -> str:
    """``text`` with a small first letter, unless its first word is I or in capitals."""
    first = text.split(" ", 1)[0].split("'", 1)[0]
    return text if first.isupper() and (first == "I" or len(first) > 1) else text[:1].lower() + text[1:]


def _partial(scoring: Scoring) -> bool:
    return scoring == "partial"


# References: the best results before the paper's in its Tables 3 and 4; RACE's is of nine models, for a single one is
# not given. Guessing gives no correlation with CoLA's labels, and half of SST-2's.
HEURISTICS = {
    "cola": Heuristic("cola", ("dev",), _cola, metric="matthews", random=0.0, reference=35.0),
    "sst2": Heuristic("sst2", ("dev",), _sst2, lambda scoring: False, random=50.0, reference=93.2),
    "race": Heuristic("race", ("high", "middle"), _race, reference=53.3),
    "winograd": Heuristic("dpr", ("dev", "test"), _pronoun, lambda scoring: False, substitutes=True),
    "pdp60": Heuristic("dpr", ("pdp60",), _pronoun, lambda scoring: False, substitutes=True),
    "copa": Heuristic("copa", ("dev",), _copa, _partial),
}


def find_heuristic(name: str) -> Heuristic:
    """Raises ConfigError, with the nearest name, where a task of this name is not answered without training."""
    if name not in HEURISTICS:
        raise ConfigError(
            f"--tasks {name[:80]!r} is no zero-shot task{nearest(name[:80], HEURISTICS)}; "
            f"choose among {', '.join(HEURISTICS)}"
        )
    return HEURISTICS[name]
