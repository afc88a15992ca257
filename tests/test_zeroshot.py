"""``megagpt zeroshot``: log-probabilities that are worked out by hand, every heuristic, ensembles and the command."""

import json
import math
from array import array

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import save_file
from test_evaluate_generate import byte_tokenizer

from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.evaluate.source import open_source
from megagpt.finetune.examples import Example
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops
from megagpt.zeroshot.heuristics import HEURISTICS, Question
from megagpt.zeroshot.main import _names, zeroshot_main
from megagpt.zeroshot.results import measure
from megagpt.zeroshot.scoring import option_scores, token_log_probs
from megagpt.zeroshot.tasks import Asked, encode, load_tasks

C = 96  # the context

FILES = {
    "cola/train.tsv": "x\t1\t\tThe cat sat.\nx\t0\t*\tCat the sat.\nx\t1\t\tShe ran home.\nx\t0\t*\tHome ran of.\n",
    "cola/dev.tsv": "x\t1\t\tThe dog sat.\nx\t0\t*\tDog of the sat.\nx\t1\t\tHe ran.\n",
    "sst2/dev.tsv": "sentence\tlabel\na good film .\t1\na bad film .\t0\ndull\t0\n",
    "race/dev.high.jsonl": {
        "id": "h",
        "article": "It rained. " * 20,  # with question and options longer than the context
        "questions": ["Was it wet?", "The sky was _ ."],
        "options": [["Yes.", "No.", "Perhaps it was.", "Who knows?"], ["grey", "blue and green", "red", "no"]],
        "answers": ["A", "B"],
    },
    "race/dev.middle.jsonl": {
        "id": "m",
        "article": "Tom ran.",
        "questions": ["Who ran?"],
        "options": [["Ann", "Tom", "Bob", "No one"]],
        "answers": ["B"],
    },
    "winograd/dpr_dev.jsonl": [
        {"text": "The bee hit the cup as it flew.", "pronoun": "it", "candidates": ["The bee", "the cup"], "label": 0},
        {"text": "Ann saw Sue when she hid.", "pronoun": "she", "candidates": ["Ann", "Sue"], "label": 1},
    ],
    "winograd/pdp60.jsonl": {
        "text": "Dad met Tom and Ann. [MASK] left.",
        "pronoun": "[MASK]",
        "candidates": ["Dad", "Tom", "Ann"],
        "label": 2,
    },
    "copa/dev.jsonl": [
        {"premise": "It rained.", "question": "effect", "choice1": "I got wet.", "choice2": "The sun set.", "label": 0},
        {"premise": "He fell.", "question": "cause", "choice1": "He slept.", "choice2": "The ice broke.", "label": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with made-up files of every task."""
    root = tmp_path_factory.mktemp("tasks")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        rows = content if isinstance(content, list) else [content]
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (root / name).write_text(text)
    return root


def saved(folder, seed):
    """The path of a model of random weights with a tokenizer of bytes beside it."""
    folder.mkdir(parents=True)
    config = GPTConfig(vocab_size=257, seq_len=C, n_layer=1, n_head=2, d_model=16)
    torch.manual_seed(seed)
    model = GPT(config, load_ops("torch", head_width=8, dtype=torch.float32, device="cpu"))
    weights = {name: x.detach() + 0.2 * torch.randn_like(x) for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config.to_dict())})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [saved(tmp_path_factory.mktemp("models") / name, seed) for seed, name in enumerate("ab")]


# two words --------------------------------------------------------------------------------------------------------


def two_words(same: float) -> GPT:
    """A model of the words a and b in which a word follows itself with the probability ``same``.

    Attention and feed-forward layers give nothing, so a state is the word's normalised vector, (1, -1) or (-1, 1) times
    the gain g, and the logits of the words are 2g apart.
    """
    config = GPTConfig(vocab_size=2, seq_len=8, n_layer=1, n_head=1, d_model=2)
    model = GPT(config, load_ops("torch", head_width=2, dtype=torch.float32, device="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        model.ln_f.weight.fill_(math.log(same / (1 - same)) / 4)
    return model.eval()


def words() -> Tokenizer:
    """The words a and b, without an end of text."""
    from tokenizers import Tokenizer as Built
    from tokenizers import models, pre_tokenizers

    built = Built(models.WordLevel({"a": 0, "b": 1}))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(built.to_str().encode(), "words")


def asked(name, *questions, scoring="partial", training=()):
    return Asked(name, HEURISTICS[name], scoring, list(questions), list(training))


def log_probs(model, task, tokenizer=None):
    return token_log_probs(model, encode(task, tokenizer or words(), model.config.seq_len), batch_size=3)


CHOICE = Question("0", ("a b", "a b"), ("b b a", "a"), 0)


def test_log_probabilities_are_those_worked_out_by_hand():
    model = two_words(0.9)
    found = log_probs(model, asked("race", CHOICE))
    assert found[0] == pytest.approx([math.log(0.9), math.log(0.9), math.log(0.1)], abs=1e-4)
    assert found[1] == pytest.approx([math.log(0.1)], abs=1e-4)


def test_answers_to_one_question_are_read_once_where_they_differ_in_the_last_word_alone():
    model, shapes = two_words(0.9), []
    model.wte.register_forward_pre_hook(lambda module, ids: shapes.append(tuple(ids[0].shape)))
    task = asked("sst2", Question("0", ("b a",) * 2, ("a", "b"), 0), Question("1", ("a a",) * 2, ("a", "b a"), 0))
    found = token_log_probs(model, encode(task, words(), 8), batch_size=4)
    assert shapes == [(7,)], "real positions of b a, a a and a a b"
    expected = [[0.9], [0.1], [0.9], [0.1, 0.1]]
    assert [[math.exp(x) for x in option] for option in found] == [
        pytest.approx(option, abs=1e-4) for option in expected
    ]


def test_a_text_with_nothing_before_it_and_no_end_of_text_begins_unscored():
    task = asked("cola", Question("0", ("",), ("a a b b",), 1), Question("1", ("",), ("a",), 1))
    found = log_probs(two_words(0.9), task)
    assert found[0] == pytest.approx([math.log(0.9), math.log(0.1), math.log(0.9)], abs=1e-4)
    assert found[1] == []
    assert option_scores(task, [found])[1] == [0.0]


def test_a_text_with_nothing_before_it_follows_the_end_of_text(models):
    source = open_source(models[0])
    task = asked("cola", Question("0", ("",), ("It",), 1))
    assert encode(task, source.tokenizer, C) == [(array("i", [256, *source.tokenizer.encode("It")]), 1)]


def test_race_compares_means_and_words_of_sentiment_sums():
    """ln 0.9 + ln 0.9 + ln 0.1 is less than ln 0.1, and a third of it is more."""
    by_name = {}
    for name in ("race", "sst2"):
        task = asked(name, CHOICE)
        by_name[name] = option_scores(task, [log_probs(two_words(0.9), task)])[0]
    assert by_name["race"] == pytest.approx([math.log(0.9 * 0.9 * 0.1) / 3, math.log(0.1)], abs=1e-4)
    assert by_name["sst2"] == pytest.approx([math.log(0.9 * 0.9 * 0.1), math.log(0.1)], abs=1e-4)


def test_an_ensemble_averages_the_probability_of_each_token():
    task = asked("winograd", CHOICE)
    found = [log_probs(two_words(p), task) for p in (0.9, 0.5)]
    together = option_scores(task, found)[0]
    assert together == pytest.approx([math.log(0.7 * 0.7 * 0.3), math.log(0.3)], abs=1e-4)
    apart = option_scores(task, found, same_tokens=False)[0]
    assert apart == pytest.approx([math.log(0.081 * 0.125) / 2, math.log(0.1 * 0.5) / 2], abs=1e-4)


def test_a_token_that_one_model_rules_out_does_not_rule_it_out_for_all():
    task = asked("winograd", Question("0", ("a",), ("a",), 0))
    assert option_scores(task, [[[-2000.0]], [[math.log(0.5)]]])[0] == pytest.approx([math.log(0.25)])


# heuristics -------------------------------------------------------------------------------------------------------

PRONOUN = Example("0", ("Ann saw Sue when ", " hid."), ("Ann", "Sue"), 1)
EFFECT = Example("0", ("It rained.", "What happened as a result?"), ("I got wet.", "The sun shone."), 0)
PUT = {
    ("cola", "partial"): (Example("0", ("A cat.",), (), 1), ("",), ("A cat.",)),
    ("sst2", "partial"): (Example("0", ("dull",), (), 0), ("dull very",) * 2, (" negative", " positive")),
    ("race", "partial"): (Example("0", ("D.", "Q?"), ("x", "y"), 0), ("D. Q?",) * 2, (" x", " y")),
    ("winograd", "partial"): (PRONOUN, ("Ann saw Sue when Ann", "Ann saw Sue when Sue"), (" hid.",) * 2),
    ("winograd", "full"): (PRONOUN, ("", ""), ("Ann saw Sue when Ann hid.", "Ann saw Sue when Sue hid.")),
    ("copa", "partial"): (EFFECT, ("It rained so",) * 2, (" I got wet.", " the sun shone.")),
    ("copa", "full"): (EFFECT, ("", ""), ("It rained so I got wet.", "It rained so the sun shone.")),
}


@pytest.mark.parametrize(("name", "scoring"), PUT)
def test_a_task_is_put_as_texts(name, scoring):
    example, contexts, options = PUT[name, scoring]
    assert HEURISTICS[name].ask(example, scoring) == (contexts, options)


def test_copa_asks_for_a_cause_with_because():
    example = Example("0", ("He fell.", "What was the cause of this?"), ("TV was on.", "I'd slept."), 0)
    assert HEURISTICS["copa"].ask(example, "partial") == (("He fell because",) * 2, (" TV was on.", " I'd slept."))


def plain_score(model, tokenizer, context, option, room, mean):
    """The score of an option, a token at a time."""
    before = tokenizer.encode(context)[-room:] if context else [256]
    ids, total = [*before, *tokenizer.encode(option)], 0.0
    for at in range(len(before), len(ids)):
        with torch.no_grad():
            total += model(torch.tensor([ids[:at]]))[0, -1].double().log_softmax(0)[ids[at]].item()
    return total / (len(ids) - len(before)) if mean else total


@pytest.mark.parametrize("scoring", ["partial", "full"])
def test_the_tasks_of_files_get_the_answers_of_a_plain_computation(models, tasks, scoring, tmp_path, capsys):
    arguments = ["--from", models[0], "--task_data", tasks, "--scoring", scoring, "--batch_size", 3]
    assert zeroshot_main([*map(str, arguments), "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())["models"][str(models[0])]
    assert list(figures) == ["cola", "sst2", "race", "winograd", "pdp60", "copa"]
    source = open_source(models[0])
    model, tokenizer = source.build("cpu"), source.tokenizer
    for task in load_tasks((), tasks, scoring=scoring):
        means = task.heuristic.mean(scoring)
        scores = []
        for q in task.all_questions:
            room = C + 1 - max(len(tokenizer.encode(option)) for option in q.options)
            pairs = zip(q.contexts, q.options, strict=True)
            scores.append([plain_score(model, tokenizer, *pair, room, means) for pair in pairs])
        expected = measure(task, scores, {})
        assert figures[task.name] == pytest.approx(expected, abs=1e-3), task.name
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "metric", "score", "constant", "random", "reference", "normalised", "questions"]
    assert [line.split()[0] for line in table[1:]] == list(figures)
    assert figures["pdp60"]["random"] == pytest.approx(100 / 3)
    assert (figures["race"]["n"], figures["cola"]["random"], figures["winograd"]["random"]) == (3, 0.0, 50.0)


def test_a_document_gives_way_to_the_question_and_the_longest_option(models, tasks):
    (race,) = load_tasks(("race",), tasks)
    tokenizer = open_source(models[0]).tokenizer
    read = encode(race, tokenizer, C)[:4]
    assert max(len(ids) for ids, _ in read) == C + 1
    assert len({tuple(ids[:first]) for ids, first in read}) == 1, "all options follow the same text"
    assert tokenizer.decode(read[0][0]).endswith("It rained. Was it wet? Yes.")


# the command ------------------------------------------------------------------------------------------------------


def _on_this_rank(models, tasks, output):
    arguments = ["--from", *models, "--task_data", tasks, "--batch_size", "2", "--json", output]
    return zeroshot_main([*map(str, arguments)])


def test_two_ranks_answer_as_one_and_an_ensemble_stands_beside_its_models(models, tasks, tmp_path, capsys):
    assert _on_this_rank(models, tasks, tmp_path / "one.json") == 0
    printed = capsys.readouterr().out
    results = run_ranks(_on_this_rank, 2, models, tasks, tmp_path / "two.json", timeout=240)
    assert [code for code, _ in results] == [0, 0]
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert printed in results[0][1]
    assert "winograd" not in results[1][1]
    assert list(json.loads((tmp_path / "one.json").read_text())["models"]) == [*map(str, models), "ensemble"]


def test_models_that_are_called_alike_have_names_of_their_own():
    """The figures of a model in a folder ``ensemble`` were lost to those of all together."""
    assert _names(["a", "b"]) == ["a", "b"]
    assert _names(["a", "ensemble", "a"]) == ["a (1)", "ensemble (2)", "a (3)"]


BAD = {
    "nothing": ([], ConfigError, "needs one of --from RUN"),
    "both": (["--from", "MODEL", "--trajectory", "x"], ConfigError, "needs one of --from RUN"),
    "output": (["--from", "MODEL", "--output", "x"], ConfigError, "--output is for --trajectory"),
    "unknown": (["--from", "MODEL", "--tasks", "cola,winogard"], ConfigError, r"'winogard'.*did you mean 'winograd'"),
    "limit": (["--from", "MODEL", "--limit", "0"], ConfigError, "--limit 0 must be at least 1"),
    "reference": (["--from", "MODEL", "--references", "race"], ConfigError, "is not TASK=PERCENT"),
    "its task": (["--from", "MODEL", "--references", "rase=5"], ConfigError, "unknown task 'rase'.*'race'"),
    "model": (["--from", "nowhere"], CheckpointError, "nowhere does not exist"),
    "trajectory": (["--trajectory", "nowhere"], CheckpointError, "nowhere does not exist"),
    "one": (
        ["--trajectory", "EMPTY/global_step5"],
        CheckpointError,
        "is one checkpoint; give the run folder",
    ),
    "no folder": (["--from", "MODEL", "--task_data", "nowhere"], DataError, "nowhere is no folder"),
    "no files": (["--from", "MODEL", "--task_data", "EMPTY"], DataError, "has the files of none of cola"),
    "no task": (["--from", "MODEL", "--task_data", "EMPTY", "--tasks", "copa"], DataError, "task copa needs.* dev "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_asked_is_told(case, models, tasks, tmp_path):
    flags, error, message = BAD[case]
    flags = [word.replace("MODEL", str(models[0])).replace("EMPTY", str(tmp_path)) for word in flags]
    (tmp_path / "global_step5").mkdir()
    flags += [] if "--task_data" in flags else ["--task_data", str(tasks)]
    with pytest.raises(error, match=message):
        zeroshot_main(flags)


def test_a_threshold_needs_the_training_file(models, tasks, tmp_path):
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "dev.tsv").write_text(FILES["cola/dev.tsv"])
    with pytest.raises(DataError, match="task cola needs the files of its train split"):
        zeroshot_main(["--from", str(models[0]), "--task_data", str(tmp_path), "--tasks", "cola"])


def test_an_option_longer_than_the_context_is_told_with_its_question(models, tmp_path):
    row = {"premise": "It fell.", "question": "effect", "choice1": "x" * C, "choice2": "y", "label": 0, "idx": 7}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=f"question 7 of copa has {C + 1} tokens and the model reads {C}"):
        zeroshot_main(["--from", str(models[0]), "--task_data", str(tmp_path), "--tasks", "copa"])
