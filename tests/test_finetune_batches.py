"""Sequences worked out by hand, and the order and cut of batches."""

import numpy as np
import pytest
import torch

from megagpt.errors import ConfigError, DataError
from megagpt.finetune.batches import Encoded, TaskBatches, collate, epoch_batches, padding_share
from megagpt.finetune.examples import Example
from megagpt.finetune.transforms import TaskTokens, Transform, Unit, stream
from megagpt.train.batches import BatchPlan

S, D, E = 100, 101, 102


class Numbers:
    """Texts that are their own ids: "1 2 3" is [1, 2, 3]."""

    def ids(self, text, where):
        if not text:
            raise DataError(f"example {where}: nothing")
        return np.array([int(word) for word in text.split()], dtype=np.int32)


def sequences(kind, texts, choices=(), context=12, document=None):
    transform = Transform(kind, Numbers(), TaskTokens(S, D, E), context, document)
    units = transform.units(Example("0", tuple(texts), tuple(choices)))
    assert all(u.sequences[-1][u.extract] == E for u in units)
    return [[s.tolist() for s in u.sequences] for u in units]


def test_sequences_of_every_kind():
    assert sequences("classify", ["1 2 3"]) == [[[S, 1, 2, 3, E]]]
    assert sequences("multilabel", ["1"]) == [[[S, 1, E]]]
    assert sequences("entail", ["5 6", "1"]) == [[[S, 5, 6, D, 1, E]]]
    assert sequences("similar", ["5 6", "1"]) == sequences("similar", ["1", "5 6"])
    assert sorted(sequences("similar", ["5 6", "1"])) == [[[S, 1, D, 5, 6, E]], [[S, 5, 6, D, 1, E]]]
    assert sequences("regress", ["7"]) == [[[S, 7, E]]]
    assert sequences("regress", ["7", "8"]) == [[[S, 7, D, 8, E]], [[S, 8, D, 7, E]]]
    assert sequences("choose", ["1 2", "3"], ["4", "5 6"]) == [[[S, 1, 2, 3, D, 4, E]], [[S, 1, 2, 3, D, 5, 6, E]]]
    assert sequences("choose", ["1 2"], ["4", "5", "6"]) == [[[S, 1, 2, D, c, E]] for c in (4, 5, 6)]


def test_truncation_leaves_room_for_the_task_tokens():
    long = " ".join(str(i) for i in range(1, 30))
    ((only,),) = sequences("classify", [long])
    assert only == [S, *range(1, 11), E]  # the first C - 2
    ((pair,),) = sequences("entail", [long, long])
    assert pair == [S, 1, 2, 3, 4, D, 1, 2, 3, 4, E]  # the first C/2 - 2 of each
    ((choice,),) = sequences("choose", [long, "41 42 43 44 45"], ["61 62 63 64 65"])
    # question and choice keep C/4 each, the context's end makes room for them
    assert choice == [S, 1, 2, 3, 41, 42, 43, D, 61, 62, 63, E]
    with pytest.raises(ConfigError, match="reads 7 tokens and a task needs at least 8"):
        sequences("classify", ["1"], context=7)


@pytest.mark.parametrize("kind", ["classify", "document", "entail", "similar", "choose"])
def test_an_example_of_which_something_is_left_out_is_counted(kind):
    rng = np.random.default_rng(0)
    document, kind = (14, "classify") if kind == "document" else (None, kind)
    transform = Transform(kind, Numbers(), TaskTokens(S, D, E), 12, document)
    n_texts = {"entail": 2, "similar": 2, "choose": 2}.get(kind, 1)
    counted = []
    for _ in range(200):
        texts = [" ".join(["7"] * n) for n in rng.integers(1, 18 if n_texts == 1 else 7, n_texts)]
        choices = [" ".join(["7"] * n) for n in rng.integers(1, 6, 2)] if kind == "choose" else []
        example = Example("0", tuple(texts), tuple(choices))
        kept = [sum((s < S).sum() for s in unit.sequences) for unit in transform.units(example)]
        there = sum(len(text.split()) for text in texts)
        whole = [there + len(choice.split()) for choice in choices] or [there] * len(kept)
        assert transform.cuts(example) == (kept != whole), example
        counted.append(kept != whole)
    assert 20 < sum(counted) < 180


def test_a_long_document_is_its_last_tokens_in_windows_counted_from_the_end():
    long = " ".join(str(i) for i in range(1, 51))
    (windows,) = sequences("classify", [long], document=21)
    assert windows == [[S, *range(30, 40)], [*range(40, 51), E]]
    (windows,) = sequences("classify", ["1 2"], document=21)
    assert windows == [[S, 1, 2, E]]
    with pytest.raises(ConfigError, match="--document_tokens is for one text"):
        sequences("similar", ["1", "2"], document=21)


def test_the_language_model_reads_every_text_once():
    examples = [Example("0", ("1 2",)), Example("1", ("3",)), Example("2", ("1 2",))]
    found = stream(Numbers(), examples, TaskTokens(S, D, E))
    assert [ids.tolist() for ids in found] == [[S, 1, 2, E], [S, 3, E]]


@pytest.mark.parametrize("order", ["shuffled", "grouped"])
def test_an_epoch_holds_every_example_once_and_is_a_function_of_seed_and_epoch(order):
    lengths = np.random.default_rng(0).integers(3, 90, 1003)
    batches = epoch_batches(lengths, 8, order, seed=5, epoch=2)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert [len(b) for b in batches] == [8] * 125 + [3]
    again = epoch_batches(lengths, 8, order, seed=5, epoch=2)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    for seed, epoch in ((5, 3), (6, 2)):
        other = epoch_batches(lengths, 8, order, seed, epoch)
        assert any((a != b).any() for a, b in zip(batches, other, strict=True))


def test_grouped_batches_start_with_the_longest_text_and_pad_little():
    lengths = np.random.default_rng(0).integers(3, 90, 2003)
    batches = epoch_batches(lengths, 8, "grouped", seed=0, epoch=0)
    assert lengths[batches[0]].max() == lengths.max()
    assert len(batches[-1]) == 3
    tops = [lengths[b].max() for b in batches]
    assert tops != sorted(tops, reverse=True)  # the rest come in random order
    shuffled = epoch_batches(lengths, 8, "shuffled", seed=0, epoch=0)
    assert padding_share(lengths, batches) < 0.05 < 0.3 < padding_share(lengths, shuffled)


def test_padding_share_by_hand():
    assert padding_share(np.array([2, 4, 6]), [np.array([0, 1]), np.array([2])]) == pytest.approx(1 - 12 / 14)


def tiny(n: int) -> Encoded:
    units = [[Unit((np.arange(1, i % 3 + 3, dtype=np.int32),), i % 3 + 1)] for i in range(n)]
    return Encoded(units, np.arange(n))


@pytest.mark.parametrize("n", [24, 21])
@pytest.mark.parametrize("cut", [(2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)], ids=str)
def test_every_cut_of_a_batch_has_the_same_examples_with_the_same_weights(n, cut):
    micro, accumulation, ranks = cut
    weight = dict.fromkeys(range(n), 0.0)
    sequences = 0.0
    for rank in range(ranks):
        plan = BatchPlan(micro, accumulation, ranks, rank)
        batches = TaskBatches(tiny(n), plan, 0, "cpu", order="grouped", seed=3, drop_short=False)
        assert batches.steps_per_epoch == 3
        for _ in range(3 * accumulation):
            batch = batches.next()
            for target, w in zip(batch["targets"].tolist(), batch["example_weights"].tolist(), strict=True):
                weight[target] += w / (accumulation * ranks)
            sequences += batch["sequence_weights"].sum().item() / (accumulation * ranks)
    last = n % 8 or 8
    assert sorted(weight.values()) == pytest.approx([1 / 8] * (n - last) + [1 / last] * last)
    assert sequences == pytest.approx(3.0)


def test_a_run_goes_on_within_an_epoch_where_it_was():
    plan = BatchPlan(2, 2, 1, 0)
    whole = TaskBatches(tiny(22), plan, 0, "cpu", order="shuffled", seed=3, drop_short=True)
    expected = [whole.next() for _ in range(24)]
    assert whole.steps_per_epoch == 5
    resumed = TaskBatches(tiny(22), plan, 7, "cpu", order="shuffled", seed=3, drop_short=True)
    for batch in expected[14:]:
        assert all(torch.equal(a, b) for a, b in zip(batch.values(), resumed.next().values(), strict=True))
    tokens = sum(int(batch["lengths"].sum()) for batch in expected[14:16])
    assert resumed.tokens(7) == tokens


def test_tensors_of_a_micro_batch_by_hand():
    a, b, c = (np.array(x, dtype=np.int32) for x in ([S, 1, E], [S, 2, 3, 4, E], [5, E]))
    encoded = Encoded([[Unit((a,), 2), Unit((b,), 4)], [Unit((b, c), 1)]], np.array([1, 0]))
    batch = collate(encoded, [1, 0], n_real=1, example_weight=0.5, sequence_weight=0.25)
    assert batch["ids"].tolist() == [[S, 2, 3, 4, E], [5, E, 0, 0, 0], [S, 1, E, 0, 0], [S, 2, 3, 4, E]]
    assert batch["lengths"].tolist() == [5, 2, 3, 5]
    assert batch["unit"].tolist() == [0, 0, 1, 2]
    assert batch["owner"].tolist() == [0, 1, 1]
    assert batch["rows"].tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 15, 16, 17, 18, 19]
    assert batch["sequence"].tolist() == [0] * 5 + [1] * 2 + [2] * 3 + [3] * 5
    assert batch["predicting"].tolist() == [0, 1, 2, 3, 5, 7, 8, 10, 11, 12, 13]
    assert batch["ids"].flatten()[batch["rows"][batch["extract"]]].tolist() == [E, E, E]
    assert batch["extract"].tolist() == [6, 9, 14]
    assert batch["targets"].tolist() == [0, 1]
    assert batch["example_weights"].tolist() == [0.5, 0]
    assert batch["sequence_weights"].tolist() == [0.25, 0.25, 0, 0]
