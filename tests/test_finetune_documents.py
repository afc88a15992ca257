"""Long documents: windows that are pooled, and gradients through the last of them only."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from finetune_common import ds_config, pretrained, train_all
from test_finetune_objective import LAMBDA, build, cut_loss, tokenizer
from test_finetune_run import assert_same_curve, curve

from megagpt.finetune.batches import Encoded, collate
from megagpt.finetune.examples import Example, Split, TaskData
from megagpt.finetune.model import Classifier

KEPT, CONTEXT = 60, 24  # tokens of a document and of a window


def documents(n: int = 12) -> TaskData:
    """Texts of 2 to 90 words."""
    rng = random.Random(5)
    words = ("the", "time", "of", "a", "man", "is", "his", "own")
    texts = [" ".join(rng.choice(words) for _ in range(rng.choice((2, 8, 13, 20, 90)))) for _ in range(n)]
    examples = tuple(Example(str(i), (text,), (), i % 2) for i, text in enumerate(texts))
    return TaskData("t", "classify", ("0", "1"), ("accuracy",), Split("train", examples))


def windows(text: str) -> list[list[int]]:
    """The kept part between its task tokens, cut from the end, written out again."""
    V = tokenizer().vocab_size
    rest, found = [V, *tokenizer().encode(text)[-KEPT:], V + 2], []
    while rest:
        found.insert(0, rest[-CONTEXT:])
        rest = rest[:-CONTEXT]
    return found


@pytest.fixture
def model() -> tuple[Classifier, Encoded, list[list[list[int]]]]:
    """A model without dropout or batch norm's dependence on the batch, and the documents it reads."""
    data = documents()
    model, encoded = build(data, "pooled_mlp", document_tokens=KEPT)
    model.head.eval()  # running statistics, and no dropout
    for norm in (model.head.norm_1, model.head.norm_2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    found = [windows(e.texts[0]) for e in data.train.examples]
    assert {len(w) for w in found} == {1, 2, 3}
    return model, encoded, found


def plain(model: Classifier, documents: list, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, 2), and the mean over windows with gradient of their mean losses: a window at a time, unpadded."""
    logits, losses = [], []
    for found in documents:
        states = []
        for k, ids in enumerate(found):
            hidden = model.gpt.hidden(torch.tensor([ids]))[0]
            if k < len(found) - last:
                hidden = hidden.detach()
            else:
                losses.append(F.cross_entropy(hidden[:-1] @ model.gpt.wte.weight.T, torch.tensor(ids[1:])))
            states.append(hidden)
        pooled = torch.cat(states)
        logits.append(model.head(torch.cat([pooled[-1], pooled.amax(0), pooled.mean(0)])[None], None)[0])
    return torch.stack(logits), torch.stack(losses).mean()


def test_a_document_answers_as_all_its_windows_read_one_by_one(model):
    model, encoded, found = model
    batch = collate(encoded, range(12), n_real=12, example_weight=1.0, sequence_weight=1.0)
    torch.testing.assert_close(model.logits(batch), plain(model, found, 9)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [1, 2, 9])
@pytest.mark.parametrize("plan", [(12, 1, 1), (2, 3, 2), (5, 3, 1)], ids=str)
def test_earlier_windows_count_in_the_pooling_and_have_no_gradient(model, last, plan):
    model, encoded, found = model
    model.lm_coef = LAMBDA
    loss = cut_loss(model, encoded, plan, gradient_windows=last)
    logits, lm = plain(model, found, last)
    expected = F.cross_entropy(logits, torch.arange(12) % 2) + LAMBDA * lm
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    names = [name for name, _ in model.named_parameters()]
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def run_argv(home: Path, stage: int) -> list:
    rng = random.Random(1)
    lengths = [20 if i % 8 == 0 else rng.randint(1, 2) for i in range(24)]  # few have more than one window
    rows = [f"{'time and people ' * n}{('good', 'bad')[i % 2]},{i % 2}" for i, n in enumerate(lengths)]
    (home / "my.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    files = ["--train", home / "my.csv", "--valid", home / "my.csv", "--init_from", pretrained("pre")]
    more = ["--seq_len", 16, "--document_tokens", 40, "--gradient_windows", 1, "--dropout", 0, "--head_dropout", 0]
    batch = ["--global_batch_size", 8, "--micro_batch_size", 4, "--lr", 1e-4, "--epochs", 1, "--log_interval", 1]
    return ["--ds_config", ds_config(home, stage), *files, *more, *batch, "--run_dir", home / f"zero{stage}"]


def test_ranks_whose_documents_have_other_numbers_of_windows_stay_together(tmp_path):
    """Under ZeRO-3 a rank that reads no early windows would otherwise leave the others waiting."""
    run_ranks(train_all, 2, [run_argv(tmp_path, 0), run_argv(tmp_path, 3)])
    first, second = (curve(tmp_path / f"zero{stage}") for stage in (0, 3))
    assert len(first) == 4  # three updates and an evaluation
    assert_same_curve(second, first, 1e-4)
    assert json.loads((tmp_path / "zero3" / "run.json").read_text())["settings"]["gradient_windows"] == 1
