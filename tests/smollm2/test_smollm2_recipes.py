"""The recipes that trained the adapters of the example package."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from layerskip.models.exit import Exit
from layerskip.training.curriculum import check_exits
from layerskip.training.recipe import Recipe, by_layer, exit_recipe, read_recipe

EXAMPLE = Path(__file__).parents[2] / "examples/smollm2"
RECIPES, ADAPTERS = EXAMPLE / "recipes", EXAMPLE / "layerskip_smollm2/adapters"
FIRST_RUNS = ("parsing", "coding", "summarization")
LATER_RUNS = {
    "parsing-finish": "parsing",
    "coding-finish": "coding",
    "summarization-exits": "summarization",
    "summarization-finish": "summarization-exits",
}


def recipe_of(name: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml")


def test_the_recipes_of_smollm2() -> None:
    for name in (*FIRST_RUNS, *LATER_RUNS):
        check_exits(recipe_of(name), 30)
    for later, earlier in LATER_RUNS.items():
        assert recipe_of(later).adapter == f"{recipe_of(earlier).output}/adapter"
    assert by_layer(recipe_of("parsing").lora_rank, 30, "lora_rank") == [128] * 4 + [64] * 2 + [8] * 24


@pytest.mark.parametrize("name", FIRST_RUNS)
def test_the_adapters_of_smollm2_have_the_ranks_of_their_recipes(name: str) -> None:
    ranks = by_layer(recipe_of(name).lora_rank, 30, "lora_rank")
    adapter = ADAPTERS / name / "adapter_model.safetensors"
    assert adapter.stat().st_size < 20e6
    with safe_open(adapter, framework="pt") as file:
        for key in filter(lambda key: "lora_A" in key, file.keys()):
            assert file.get_slice(key).get_shape()[0] == ranks[int(key.split(".layers.")[1].split(".")[0])]


def test_the_exit_of_smollm2_is_of_its_recipe() -> None:
    recipe, file = exit_recipe(RECIPES / "exit.yaml", {}), EXAMPLE / "layerskip_smollm2/exits/smollm2.safetensors"
    assert file.stat().st_size < 9e6
    found = Exit.load(file)
    assert (found.exit_layer, found.num_draft_layers, found.num_layers) == (recipe.exit_layer, recipe.draft_layers, 30)
    assert found.token_ids is not None
    assert len(found.token_ids) == recipe.draft_tokens
