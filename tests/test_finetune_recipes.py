"""Phases, groups and rates against published or hand-worked numbers; recipes of the user's own."""

import json

import pytest

from megagpt.errors import ConfigError
from megagpt.finetune.plan import PhasePlan
from megagpt.finetune.recipes import GROUPS, Choices, Phase, group_of, load_recipe


def plan_of(phase: Phase, steps: int, first: int = 0) -> PhasePlan:
    return PhasePlan(0, phase, first, steps, steps)


def test_rates_of_five_groups_and_of_the_four_without_a_head():
    recipe = load_recipe("ulmfit", Choices())
    rates = recipe.phases[-1].rates()
    expected = [2.1882987e-4, 5.6895767e-4, 1.4792899e-3, 3.8461538e-3, 1e-2]  # 0.01 / 2.6^4, ..., 0.01
    assert list(rates) == list(GROUPS)
    assert list(rates.values()) == pytest.approx(expected, rel=1e-7)
    language_model = recipe.phases[0].rates()
    assert list(language_model) == list(GROUPS[:-1])
    assert list(language_model.values()) == pytest.approx(expected[1:], rel=1e-7)


def test_one_more_group_is_trained_each_epoch_and_all_until_the_end():
    phases = load_recipe("ulmfit", Choices(epochs=7, lm_epochs=2)).phases
    assert [(p.objective, p.epochs, len(p.groups)) for p in phases] == [
        ("lm", 2, 4), ("task", 1, 1), ("task", 1, 2), ("task", 1, 3), ("task", 1, 4), ("task", 3, 5),
    ]  # fmt: skip
    assert [p.groups[0] for p in phases[1:]] == ["head", "upper", "middle", "lower", "embeddings"]
    assert len(load_recipe("ulmfit", Choices(epochs=3, lm_epochs=0)).phases) == 3


def test_gpt1_is_the_papers():
    (phase,) = load_recipe("gpt1", Choices()).phases
    assert (phase.lr, phase.epochs, phase.lm_coef, phase.groups) == (6.25e-5, 3, 0.5, GROUPS)
    multiplier = plan_of(phase, 1000).schedule().multiplier
    for t, expected in {0: 0.0, 1: 0.4995, 2: 0.998, 3: 0.997, 500: 0.5, 1000: 0.0}.items():
        assert multiplier(t) == pytest.approx(expected, abs=1e-12)
    # 0.2% of a short run is less than an update; the first one still moves nothing.
    multiplier = plan_of(phase, 100).schedule().multiplier
    assert multiplier(0) == 0.0
    assert multiplier(1) == pytest.approx(0.99)


def test_the_triangle_starts_again_in_every_phase():
    phase = load_recipe("ulmfit", Choices()).phases[1]
    rate = phase.rates()["head"]
    for first in (0, 640):
        multiplier = plan_of(phase, 100, first).schedule().multiplier
        for t, expected in {0: 3.125e-4, 1: 1.28125e-3, 5: 5.15625e-3, 10: 0.01, 50: 5.69444e-3, 99: 4.2014e-4}.items():
            assert rate * multiplier(first + t) == pytest.approx(expected, rel=1e-5)
    multiplier = plan_of(phase, 97, 5).schedule().multiplier
    assert rate * multiplier(5 + 9) == pytest.approx(0.01)
    assert rate * multiplier(5 + 96) == pytest.approx(4.2259e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("n_layer", "sizes"), [(12, (4, 4, 4)), (4, (1, 1, 2)), (2, (0, 0, 2)), (1, (0, 0, 1)), (5, (1, 1, 3))]
)
def test_blocks_are_cut_in_thirds_from_the_bottom(n_layer, sizes):
    names = [group_of(f"gpt.blocks.{i}.attn.qkv.weight", n_layer) for i in range(n_layer)]
    assert tuple(names.count(third) for third in ("lower", "middle", "upper")) == sizes
    assert names == sorted(names, key=GROUPS.index)


def test_embeddings_head_and_the_last_norm():
    assert {group_of(f"gpt.{name}.weight", 12) for name in ("wte", "wpe")} == {"embeddings"}
    assert group_of("head.output.bias", 12) == "head"
    assert group_of("gpt.ln_f.weight", 12) == "head"
    assert group_of("gpt.ln_f.weight", 12, "lm") == "upper"


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "head": "pooled_mlp",
                "phases": [
                    {"name": "first", "groups": ["head", "upper"], "epochs": 2, "lr": 0.001, "discrimination": 2},
                    {"schedule": "stlr", "lm_coef": 0.5},
                ],
            }
        )
    )
    recipe = load_recipe(str(path), Choices())
    assert (recipe.name, recipe.head, recipe.order) == ("mine", "pooled_mlp", "shuffled")
    assert recipe.phases[0].rates() == {"upper": 0.0005, "head": 0.001}
    assert recipe.phases[1] == Phase("phase 1", schedule="stlr", lm_coef=0.5)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, "has no phases"),
        ({"phases": []}, "has no phases"),
        ({"phases": [{"group": ["head"]}]}, "phase 0: 'group' is unknown (did you mean 'groups'?)"),
        ({"phases": [{"groups": ["heads"]}]}, "group 'heads' is unknown (did you mean 'head'?)"),
        ({"phases": [{"groups": []}]}, "trains nothing"),
        ({"phases": [{"epochs": 0}]}, "trains nothing"),
        ({"phases": [{"epochs": 1.5}]}, "epochs is 1.5, which it cannot be"),
        ({"phases": [{"lr": "high"}]}, 'lr is "high", which it cannot be'),
        ({"phases": [{"lr": 0}]}, "lr 0 must be above 0"),
        ({"phases": [{"schedule": "slanted"}]}, "schedule 'slanted' is unknown"),
        ({"phases": [{"objective": "lm"}]}, "the language model has no head"),
        ({"phases": [{}], "head": "linar"}, "did you mean 'linear'"),
        ({"phases": [{}], "order": "sorted"}, "order 'sorted' is unknown"),
        ({"phases": [{}], "dropout_multiplier": "half"}, "dropout_multiplier"),
        ({"phases": 3}, "has no phases"),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, recipe, words):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), Choices())
    assert words in str(caught.value)


def test_flags_do_not_change_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"phases": [{}]}')
    with pytest.raises(ConfigError, match="--epochs and --lr cannot be given"):
        load_recipe(str(path), Choices(epochs=1, lr=0.1))
    with pytest.raises(ConfigError, match=r"did you mean 'ulmfit'"):
        load_recipe("ulmfitt", Choices())
