"""The loss of every kind, and its gradients, against the objective written out one example at a time."""

import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetune_common import pretrained

from megagpt.data.tokenizer import from_file
from megagpt.finetune.batches import Encoded, TaskBatches, collate
from megagpt.finetune.examples import KINDS, Example, Split, TaskData
from megagpt.finetune.heads import HEADS
from megagpt.finetune.model import Classifier
from megagpt.finetune.objective import label_log_probabilities
from megagpt.finetune.spec import TaskSpec, soft_classes
from megagpt.finetune.transforms import TaskTokens, Texts, Transform
from megagpt.model.config import GPTConfig
from megagpt.ops import load_ops
from megagpt.train.batches import BatchPlan

WORDS = ["the", "time", "of", "a", "man", "is", "his", "own", "and", "no", "other", "day", "will", "do", "for", "it"]
LAMBDA = 0.5


@functools.cache
def tokenizer():
    return from_file(pretrained().parent / "tokenizer.json")


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))


def task(kind: str, *, ordinal: bool = False, parents=(), n: int = 12) -> TaskData:
    rng = random.Random(3)
    n_texts = {"entail": 2, "similar": 2, "choose": 2}.get(kind, 1)
    examples = []
    for i in range(n):
        choices = tuple(text(rng) for _ in range(rng.randint(2, 5))) if kind == "choose" else ()
        label = {
            "choose": lambda choices=choices: rng.randrange(len(choices)),
            "multilabel": lambda: tuple(k for k in range(4) if rng.random() < 0.5),
            "regress": lambda: rng.uniform(-50, 900),
        }.get(kind, lambda: round(rng.uniform(0, 3), 1) if ordinal else rng.randrange(4))()
        examples.append(Example(str(i), tuple(text(rng) for _ in range(n_texts)), choices, label))
    labels = () if kind in ("choose", "regress") else ("0", "1", "2", "3")
    split = Split("train", tuple(examples))
    return TaskData("t", kind, labels, ("accuracy",), split, ordinal=ordinal, parents=parents)


def build(data: TaskData, head: str = "linear", norm: str = "post", **spec) -> tuple[Classifier, Encoded]:
    spec = TaskSpec.of(data, head=head, head_dropout=0.0, **spec)
    V = tokenizer().vocab_size
    rates = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), 0.0)
    config = GPTConfig(V + 3, seq_len=24, n_layer=2, n_head=2, d_model=16, norm=norm, **rates)
    torch.manual_seed(0)
    ops = load_ops("torch", head_width=8, dtype=torch.float32, device="cpu")
    model = Classifier(config, spec, ops).train()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at first, so that nothing is flat
            parameter += 0.1 * torch.randn(parameter.shape)
    transform = Transform(spec.kind, Texts(tokenizer()), TaskTokens.after(V), 24, spec.document_tokens)
    examples = data.train.examples
    return model, Encoded([transform.units(e) for e in examples], spec.targets(examples))


def ids_of(example: Example, kind: str) -> list[list[int]]:
    """The sequences of the paper's figure 1, written out again."""
    V = tokenizer().vocab_size
    s, d, e = [V], [V + 1], [V + 2]
    parts = [tokenizer().encode(t) for t in example.texts]
    if kind == "choose":
        answers = [tokenizer().encode(c)[:6] for c in example.choices]
        question = parts[1][:6]
        return [s + parts[0][: 24 - 3 - len(a) - len(question)] + question + d + a + e for a in answers]
    if len(parts) == 1:
        return [s + parts[0][:22] + e]
    a, b = parts[0][:10], parts[1][:10]
    return [s + a + d + b + e] + ([s + b + d + a + e] if kind == "similar" else [])


def plain_loss(model: Classifier, data: TaskData) -> torch.Tensor:
    """mean_b CE_b + lambda mean_s l_s, one sequence at a time and without padding."""
    losses, lm = [], []
    values = np.array([e.label for e in data.train.examples]) if data.kind == "regress" else None
    for i, example in enumerate(data.train.examples):
        states = []
        for ids in ids_of(example, data.kind):
            ids = torch.tensor([ids])
            hidden = model.gpt.hidden(ids)
            states.append(hidden[0, -1])
            logits = hidden[0, :-1] @ model.gpt.wte.weight.T
            lm.append(F.cross_entropy(logits, ids[0, 1:]))
        W, b = model.head.output.weight, model.head.output.bias
        z = torch.stack([(W @ h + b)[0] for h in states]) if data.kind == "choose" else W @ sum(states) + b
        if data.kind == "regress":
            losses.append((z[0] - (values[i] - values.mean()) / values.std()) ** 2)
        elif data.kind == "multilabel":
            y = torch.zeros(4)
            y[list(example.label)] = 1
            p = z.sigmoid()
            if data.parents:
                p = torch.stack([p[0], p[0] * p[1], p[2], p[0] * p[1] * p[3]])
            losses.append(F.binary_cross_entropy(p, y))
        elif data.ordinal:
            low = int(example.label)
            part = example.label - low
            log_p = z.log_softmax(0)
            losses.append(-(1 - part) * log_p[low] - (part * log_p[low + 1] if part else 0))
        else:
            losses.append(F.cross_entropy(z, torch.tensor(example.label)))
    return sum(losses) / len(losses) + LAMBDA * sum(lm) / len(lm)


def cut_loss(model: Classifier, encoded: Encoded, plan: tuple[int, int, int], **more) -> torch.Tensor:
    """The mean over ranks and micro-steps, as the engine takes it, of one global batch cut by ``plan``."""
    micro, accumulation, ranks = plan
    total = 0.0
    for rank in range(ranks):
        cut = BatchPlan(micro, accumulation, ranks, rank)
        batches = TaskBatches(encoded, cut, 0, "cpu", order="grouped", seed=1, drop_short=False, **more)
        for _ in range(accumulation):
            total = total + model(**batches.next())
    return total / (accumulation * ranks)


CASES = {kind: {"kind": kind} for kind in KINDS}
CASES["ordered classes"] = {"kind": "similar", "ordinal": True}
CASES["hierarchy"] = {"kind": "multilabel", "parents": (None, 0, None, 1)}


@pytest.mark.parametrize("plan", [(12, 1, 1), (3, 2, 2), (5, 3, 1), (7, 1, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_objective_however_the_batch_is_cut(case, plan):
    """A plan of 15 or 14 leaves a short batch: what fills it up weighs nothing."""
    data = task(**CASES[case])
    model, encoded = build(data, norm="pre" if plan[0] == 5 else "post")
    model.lm_coef = LAMBDA
    names = [name for name, _ in model.named_parameters()]
    loss, expected = cut_loss(model, encoded, plan), plain_loss(model, data)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for name, found, wanted in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_without_the_language_model_its_logits_are_not_computed():
    data = task("classify")
    model, encoded = build(data)
    model.gpt.ops = dataclasses.replace(model.gpt.ops, weighted_cross_entropy=None)  # what would compute them
    everything = collate(encoded, range(12), n_real=12, example_weight=1 / 12, sequence_weight=1 / 12)
    assert model(**everything).item() > 0


@pytest.mark.parametrize("head", HEADS)
def test_a_pair_scores_the_same_in_either_order_to_the_last_bit(head):
    data = task("similar", n=40)
    swapped = TaskData(
        "t", "similar", data.labels, ("accuracy",),
        Split("train", tuple(Example(e.id, e.texts[::-1], (), e.label) for e in data.train.examples)),
    )  # fmt: skip
    found = []
    for task_data in (data, swapped):
        model, encoded = build(task_data, head)
        batch = collate(encoded, range(40), n_real=40, example_weight=1.0, sequence_weight=1.0)
        with torch.no_grad():
            found.append(model.eval().logits(batch))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 40  # the texts do matter


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["classify", "similar", "choose"])
def test_what_stands_in_the_padding_changes_nothing(kind, head):
    model, encoded = build(task(kind), head)
    batch = collate(encoded, range(12), n_real=12, example_weight=1 / 12, sequence_weight=1 / 12)
    model.eval().lm_coef = 0.0 if head == "scalar_mix" else LAMBDA
    padding = torch.arange(batch["ids"].shape[1]) >= batch["lengths"][:, None]
    assert padding.any()
    noise = torch.randint(0, tokenizer().vocab_size, batch["ids"].shape)
    other = {**batch, "ids": torch.where(padding, noise, batch["ids"])}
    assert torch.equal(model.logits(batch), model.logits(other))
    ours, theirs = (
        torch.autograd.grad(model(**b), list(model.parameters()), allow_unused=True) for b in (batch, other)
    )
    assert torch.equal(model(**batch), model(**other))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert a is b is None or torch.equal(a, b), name


def test_more_padding_changes_a_result_by_rounding_alone():
    model, encoded = build(task("choose"))
    batch = collate(encoded, [0, 1], n_real=2, example_weight=0.5, sequence_weight=0.1)
    T = batch["ids"].shape[1]
    longer = {**batch, "ids": F.pad(batch["ids"], (0, 24 - T)), "rows": batch["rows"] // T * 24 + batch["rows"] % T}
    torch.testing.assert_close(model.eval().logits(batch), model.logits(longer), rtol=1e-5, atol=1e-6)


def test_choices_of_an_example_share_their_dropout_mask():
    data = task("choose")
    model, _ = build(data)
    model.head.dropout = 0.5
    features, owner = torch.ones(5, 16), torch.tensor([0, 0, 0, 1, 1])
    torch.manual_seed(0)
    scores = model.head(features, owner)[:, 0]
    assert scores[0] == scores[1] == scores[2] != scores[3] == scores[4]


def test_a_child_is_never_likelier_than_its_parent():
    parents = (None, 0, None, 1)
    z = torch.tensor([[-3.0, 50.0, 200.0, -200.0], [90.0, 88.0, -95.0, 91.0]], requires_grad=True)
    log_p, log_not_p = label_log_probabilities(z, parents)
    p = log_p.exp()
    assert (p[:, 1] <= p[:, 0]).all()
    assert (p[:, 3] <= p[:, 1]).all()
    assert p[0, 1].item() == pytest.approx(1 / (1 + np.exp(3.0)), rel=1e-6)
    assert torch.isfinite(log_not_p).all()
    log_not_p.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_a_value_between_two_classes_is_shared_between_them():
    table = soft_classes(np.array([3.8, 0.0, 5.0, 2.5]), 6)
    expected = [[0, 0, 0, 0.2, 0.8, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0.5, 0.5, 0, 0]]
    np.testing.assert_allclose(table, expected, atol=1e-7)
    np.testing.assert_allclose(table @ np.arange(6), [3.8, 0, 5, 2.5], atol=1e-6)


def test_a_layer_mix_starts_as_the_mean_of_embedding_and_blocks():
    model, encoded = build(task("classify"), "scalar_mix")
    for name, value in (("mix_weights", 0.0), ("gamma", 1.0)):
        getattr(model.head.mix, name).data.fill_(value)
    batch = collate(encoded, [0], n_real=1, example_weight=1.0, sequence_weight=1.0)
    layers = model.gpt.layers(batch["ids"], batch["rows"])
    assert len(layers) == 3
    torch.testing.assert_close(layers[-1], model.gpt.hidden(batch["ids"])[0])
    mean = sum(h[-1] for h in layers) / 3
    torch.testing.assert_close(model.head.features(layers, batch)[0], mean)
