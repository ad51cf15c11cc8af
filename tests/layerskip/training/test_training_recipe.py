"""Recipes, data files, encoding and batches, and the commands on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import save_tiny, tiny_model, tiny_tokenizer
from transformers.utils import logging

from layerskip import DraftHead, SamplingParams
from layerskip.cli import main
from layerskip.training import (
    Collator,
    ExitAnalysis,
    GradualCurriculum,
    LengthBuckets,
    RotationalCurriculum,
    ShallowSteps,
    encode,
    read_pairs,
)
from layerskip.training.batching import Pool, TokenBatches, encode_pair, own_pairs
from layerskip.training.curriculum import check_exits, make_curriculum, make_dropout
from layerskip.training.recipe import by_layer, make_recipe, read_recipe
from layerskip.training.run import mix, schedule

WRONG_RECIPES = {
    "a key that is nearly one": ({"learning_rat": 1}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
    "a key of the dropout": (
        {"layer_dropout": {"maximum": 0.1}},
        "layer_dropout: unknown key 'maximum', did you mean 'max'",
    ),
    "a dropout that is no mapping": ({"layer_dropout": 0.1}, "must be a mapping"),
    "text for a number": ({"batch_size": "24"}, "batch_size is '24', expected int"),
    "a bool for a number": ({"batch_size": True}, "batch_size is True"),
    "a list of texts for exits": ({"exit_layers": ["3"]}, r"exit_layers is \['3'\]"),
    "an unknown method": ({"method": "qlora"}, "method is 'qlora', expected one of full, lora"),
    "an unknown curriculum": ({"curriculum": "spiral"}, "curriculum is 'spiral'"),
    "unknown weights": ({"exit_weights": "cubic"}, "exit_weights is 'cubic'"),
    "a batch of none": ({"batch_size": 0}, "batch_size must be above 0, got 0"),
    "no steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "no task": ({"tasks": []}, "tasks is empty"),
    "a task without a share": ({"tasks": {"parsing": 0.9, "coding": 0}}, "tasks: coding must be above 0, got 0"),
    "a share in words": ({"tasks": {"parsing": "most"}}, "tasks: parsing is 'most', expected float"),
    "layers of rank 0": ({"lora_rank": {"0-3": 8, 4: 0}}, "lora_rank: 4 must be above 0, got 0"),
    "half a rank": ({"lora_rank": {"0-3": 0.5}}, "lora_rank: 0-3 is 0.5, expected int"),
    "a rate of 0": ({"learning_rate": {"0-3": 0}}, "learning_rate: 0-3 must be above 0, got 0"),
    "a beta of 1": ({"beta2": 1.0}, r"beta2 must be in \(0, 1\), got 1.0"),
    "a negative sample": ({"head_sample": -1}, "head_sample must not be negative, got -1"),
    "a batch of no tokens": ({"batch_tokens": 0}, "batch_tokens must be above 0, got 0"),
    "replay among batches of examples": ({"replay": {"tasks": ["text"]}}, "replay needs batch_tokens"),
    "replay of no tokens": (
        {"batch_tokens": 64, "replay": {"tasks": ["text"], "tokens": 0}},
        "replay.tokens must be above 0, got 0",
    ),
    "a task to replay without a share": (
        {"batch_tokens": 64, "replay": {"tasks": {"text": 0}}},
        "replay.tasks: text must be above 0, got 0",
    ),
    "a key of the replay": ({"replay": {"task": ["text"]}}, "replay: unknown key 'task', did you mean 'tasks'"),
    "a LoRA adapter in a full run": ({"method": "full", "adapter": "out/adapter"}, "adapter 'out/adapter' is a LoRA's"),
    "more than was learned": ({"interpolate": 1.5}, r"interpolate must be in \(0, 1\], got 1.5"),
    "less than all of a full run": ({"method": "full", "interpolate": 0.9}, "interpolate 0.9 shrinks a LoRA"),
    "an unknown time scale": ({"layer_dropout": {"scale": "cubic"}}, "layer_dropout.scale is 'cubic'"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_wrong_recipes(case: str) -> None:
    values, message = WRONG_RECIPES[case]
    with pytest.raises(ValueError, match=message):
        make_recipe(values)


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1\nexit_layers: [3, 4]\nlayer_dropout: {max: 0.1, kind: [0.0, 0.1]}\nsteps: 7\n")
    recipe = read_recipe(path, {"steps": 9})
    assert (recipe.learning_rate, recipe.exit_layers, recipe.steps) == (1.0, [3, 4], 9)
    assert recipe.layer_dropout.kind == [0.0, 0.1]
    path.write_text("- a list")
    with pytest.raises(ValueError, match=r"recipe\.yaml must hold keys and values"):
        read_recipe(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_recipe(path)


def test_what_a_recipe_makes() -> None:
    assert isinstance(make_curriculum(make_recipe({"curriculum": "gradual"}), 4, 9), GradualCurriculum)
    rotational = make_curriculum(make_recipe({"curriculum": "rotational", "rotate_every": 2}), 4, 9)
    assert isinstance(rotational, RotationalCurriculum)
    assert rotational.interval == 2
    assert make_dropout(make_recipe({}), 4, 9) is None
    assert make_dropout(make_recipe({"layer_dropout": {"max": 0.2}}), 3, 9).rates[-1] == 0.2
    with pytest.raises(ValueError, match="exit layer 9"):
        check_exits(make_recipe({"exit_layers": [9], "exits_per_step": 1}), 4)


def test_shallow_steps_of_a_recipe() -> None:
    recipe = make_recipe({"shallow_steps": 0.5, "exit_layers": [2, 3], "exits_per_step": 1})
    curriculum = make_curriculum(recipe, 4, 9)
    assert isinstance(curriculum, ShallowSteps)
    assert (curriculum.share, curriculum.candidates) == (0.5, (2, 3))
    check_exits(recipe, 4)
    with pytest.raises(ValueError, match=r"the exits \[1\] of 4 layers have no weight with 'paper'"):
        check_exits(make_recipe({"shallow_steps": 0.5, "exit_layers": [1, 2]}), 4)
    with pytest.raises(ValueError, match="shallow_steps must be in"):
        check_exits(make_recipe({"shallow_steps": -0.1}), 4)


def test_numbers_by_layer() -> None:
    assert by_layer(8, 3, "lora_rank") == [8, 8, 8]
    assert by_layer({"0-1": 8, "2": 4, "3-4": 2}, 5, "lora_rank") == [8, 8, 4, 2, 2]
    assert by_layer({"0": 0.5, "1-2": 0.1}, 3, "learning_rate") == [0.5, 0.1, 0.1]
    wrong = {
        "'0to1' is neither a layer nor a range": {"0to1": 8},
        "'-1' is neither": {"-1": 8},
        "0-5 is no range within 0-4": {"0-5": 8},
        "3-1 is no range": {"0-4": 8, "3-1": 8},
        "layer 1 is named twice": {"0-1": 8, "1-4": 4},
        "lora_rank: layer 2 of 0…4 has none": {"0-1": 8, "3-4": 4},
    }
    for message, ranks in wrong.items():
        with pytest.raises(ValueError, match=message):
            by_layer(ranks, 5, "lora_rank")


def test_shares_of_tasks() -> None:
    parts = {"a": list(range(90)), "b": ["x", "y", "z"]}
    assert mix(parts, ["a", "b"]) == [*range(90), "x", "y", "z"]
    mixed = mix(parts, {"a": 9, "b": 1})
    assert [item for item in mixed if item not in ("x", "y", "z")] == list(range(90))
    assert [mixed.count(item) for item in "xyz"] == [4, 3, 3]
    assert len(mix(parts, {"a": 0.3, "b": 0.7})) == 300


def test_wsd_warms_up_stays_and_decays_over_the_last_third() -> None:
    from transformers import get_scheduler

    arguments = schedule(make_recipe({"schedule": "wsd"}), 30)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = get_scheduler(
        arguments["lr_scheduler_type"], optimizer, 4, 30, scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"]
    ).lr_lambdas[0]
    assert [rates(step) for step in range(31)] == pytest.approx(
        [0, 0.25, 0.5, 0.75] + [1] * 16 + [1 - step / 10 for step in range(11)]
    )


def test_a_broken_line_of_a_data_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "w3", "completion": "w4"})
    path.write_text(f"{good}\n\n{good[:-2]}\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:3: not JSON"):
        read_pairs(path)
    path.write_text(f'{good}\n{{"prompt": "w3"}}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: expected an object"):
        read_pairs(path)


def test_encoding_labels_the_completion_and_the_end() -> None:
    tokenizer = tiny_tokenizer()
    [pair] = encode(tokenizer, [{"prompt": "w5 w6", "completion": "w7 w8"}])
    assert pair == {"input_ids": [5, 6, 7, 8, 1], "labels": [-100, -100, 7, 8, 1]}
    [pair] = encode(tokenizer, [SimpleNamespace(prompt="", completion="w7 w8")])
    assert pair == {"input_ids": [7, 8, 1], "labels": [7, 8, 1]}
    kept = encode(tokenizer, [{"prompt": "w5 w6 w7", "completion": "w8"}, {"prompt": "w5", "completion": "w8"}], 3)
    assert [pair["input_ids"] for pair in kept] == [[5, 8, 1]]
    with pytest.raises(ValueError, match="none of 1 examples has a completion within 2 tokens"):
        encode(tokenizer, [{"prompt": "w5 w6", "completion": "w8"}], 2)
    with pytest.raises(ValueError, match="example 0 has no text 'completion'"):
        encode(tokenizer, [{"prompt": "w5"}])


def test_batches_are_padded_on_the_right_without_labels() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_buckets_visit_everything_once_and_keep_lengths_together() -> None:
    lengths = [(37 * index) % 90 + 1 for index in range(203)]
    buckets = LengthBuckets(lengths, batch_size=4, seed=1)
    first = list(buckets)
    assert sorted(first) == list(range(203))
    batches = [[lengths[index] for index in first[begin : begin + 4]] for begin in range(0, 200, 4)]
    assert max(max(batch) - min(batch) for batch in batches) <= 4
    assert first == list(LengthBuckets(lengths, 4, 1))
    buckets.set_epoch(1)
    assert first != list(buckets)


def pairs_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": [index] * length, "labels": [index] * length} for index, length in enumerate(lengths)]


def test_batches_by_tokens_keep_to_the_budget_and_visit_everything_once() -> None:
    lengths = [(37 * index) % 23 + 1 for index in range(203)]
    batches = TokenBatches(Pool(pairs_of(lengths)), 48, 0, seed=1)
    first = list(batches)
    assert len(first) == len(batches)
    assert sorted(index for batch in first for index in batch) == list(range(203))
    assert max(len(batch) * max(lengths[index] for index in batch) for batch in first) <= 48
    assert list(TokenBatches(Pool(pairs_of(lengths)), 48, 0, seed=1)) == first
    batches.set_epoch(1)
    second = list(batches)
    assert len(second) == len(first)
    assert second != first
    assert sorted(map(sorted, second)) != sorted(map(sorted, first))  # others travel together
    assert [len(batch) for batch in TokenBatches(Pool(pairs_of([60, 50])), 48, 0, seed=1)] == [1, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_to_replay_alternate_and_go_on_in_the_next_epoch(ranks: int) -> None:
    pool = Pool(pairs_of([6] * 41), pairs_of([3] * 26))
    batches = TokenBatches(pool, 24, 12, seed=1, ranks=ranks)
    seen: list[int] = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epoch_batches = list(batches)
        assert len(epoch_batches) == len(batches) == 2 * (11 if ranks == 1 else 10)
        for place, batch in enumerate(epoch_batches):
            replayed = (place // ranks) % 2 == 1
            assert all((index >= 41) == replayed for index in batch), (place, batch)
            seen += batch if replayed else []
    for begin in range(0, len(seen) - 25, 26):  # every pass over what is replayed visits all of it
        assert sorted(seen[begin : begin + 26]) == list(range(41, 67))
    assert [pair["input_ids"][0] for pair in pool[[40, 41]]] == [40, 0]


def test_batches_by_tokens_on_wrong_input() -> None:
    with pytest.raises(ValueError, match="a replay budget of 8 meets 0 pairs"):
        TokenBatches(Pool(pairs_of([6] * 4)), 24, 8, seed=1)
    with pytest.raises(ValueError, match="4 pairs make 1 batches of 24 tokens, too few for 2 ranks"):
        TokenBatches(Pool(pairs_of([6] * 4), pairs_of([6])), 24, 8, seed=1, ranks=2)


def test_encoding_whole_labels_all_but_the_first_token_and_ends_no_passage() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    both = encode_pair(tokenizer, "w5 w6", "w7", 9, whole=True)
    assert both["labels"] == [-100, *both["input_ids"][1:]]
    assert both["input_ids"][-1] == end
    passage = encode_pair(tokenizer, "", "w7 w8", 9, whole=True)
    assert end not in passage["input_ids"]
    assert passage["labels"] == [-100, *passage["input_ids"][1:]]
    assert len(encode_pair(tokenizer, "w5 w6", "w7 w8", 3, whole=True)["labels"]) == 3


def test_a_completion_that_was_cut_gets_no_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "pairs.jsonl"
    whole = {"prompt": "w5", "completion": "w7 w8"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (whole, whole | {"cut": True}, whole | {"cut": False})))
    encoded = encode(tokenizer, read_pairs(path))
    assert [pair["input_ids"] for pair in encoded] == [[5, 7, 8, 1], [5, 7, 8], [5, 7, 8, 1]]
    assert encode(tokenizer, read_pairs(path), whole=True)[1]["labels"] == [-100, 7, 8]
    path.write_text(json.dumps(whole | {"cut": "no"}))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: expected true or false under 'cut', got 'no'"):
        read_pairs(path)


@pytest.mark.parametrize("end", ["w072", "w001"])
def test_the_distill_command_writes_what_the_full_depth_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None, end: str
) -> None:
    """Pairs in the prompts' order, which train: their labels are the arg-max of the last layer at every position.

    The model ends some texts with w072, which is the tokenizer's end or, to that, a word.
    """
    from layerskip.models import load

    model = save_tiny(tmp_path / "base", eos_token_id=72)
    tokenizer = tiny_tokenizer("w{:03}")
    tokenizer.eos_token = end
    tokenizer.save_pretrained(model)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"
    texts = ["w003 w004", "w005", "w006 w007 w008", " ".join(["w009"] * 20), "w011 w012"]
    prompts.write_text("\n".join(texts))
    command = ["distill", "--model", str(model), "--prompts", str(prompts), "--output", str(output),
               "--dtype", "float32", "--max-prompt-tokens", "4"]  # fmt: skip
    command += ["--draft-head", str(tmp_path), "--draft-head-size", "30"]
    assert main([*command, "--max-new-tokens", "6", "--batch-size", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrote 4 pairs" in shown
    assert "1 prompts skipped" in shown
    pairs = read_pairs(output)
    assert [pair["prompt"] for pair in pairs] == [text for text in texts if len(text.split()) <= 4]
    base, tokenizer = load(model, torch.float32)
    head = DraftHead.load(tmp_path)
    assert len(head.token_ids) == 30
    said = {token for pair in pairs for token in tokenizer(pair["completion"]).input_ids}
    assert said <= set(head.token_ids.tolist())
    for pair, encoded in zip(pairs, encode(tokenizer, pairs), strict=True):
        ids, labels = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["labels"])
        chosen = base(ids[None]).logits[0].argmax(dim=-1)
        labelled = labels[1:] != -100
        assert torch.equal(chosen[:-1][labelled], labels[1:][labelled]), pair
        assert labels[-1] == 72 or int(labelled.sum()) == 6
        assert pair["cut"] == (labels[-1] != tokenizer.eos_token_id)
    assert any("w072" in pair["completion"] for pair in pairs) == (end == "w001")
    assert main(["train", "--set", f"model={model}", "--set", f"tasks=[{output}]", "--set", "steps=1",
                 "--set", f"output={tmp_path / 'out'}", "--set", "exit_layers=[1, 2]"]) == 0  # fmt: skip


def test_equal_prompts_go_on_differently_when_drawn_and_a_seed_repeats_them() -> None:
    def texts(seed: int | None) -> list[str]:
        sampling = SamplingParams(1.0, seed=seed)
        return [pair["completion"] for _, pair in sorted(own_pairs(model, tokenizer, ["w3 w4"] * 3, 12, 2, sampling))]

    model, tokenizer = tiny_model("llama2"), tiny_tokenizer()
    assert len(set(texts(7))) == 3
    assert texts(7) == texts(7) != texts(8)
    assert len(set(texts(None))) == 3


def test_the_distill_command_on_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("w3 w4 w5\n")
    command = ["distill", "--model", str(save_tiny(tmp_path / "base")), "--prompts", str(prompts)]
    assert main([*command, "--output", str(output), "--max-prompt-tokens", "2"]) == 2
    assert "none of 1 prompts has at most 2 tokens" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--output", str(output), "--max-new-tokens", "300"]) == 2  # the model has 256 positions
    assert "303" in capsys.readouterr().err
    assert main([*command, "--output", str(output), "--draft-head", str(tmp_path), "--draft-head-size", "102"]) == 2
    assert "--draft-head-size is 102, the vocabulary has 101" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def pairs_file(path: Path) -> Path:
    lines = [{"prompt": f"w{3 + i % 40} w2", "completion": f"w{4 + i % 40} w{5 + i % 40}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_train_command_writes_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None, method: str
) -> None:
    from layerskip.models import load

    model, output = save_tiny(tmp_path / "base"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntasks: [{pairs_file(tmp_path / 'pairs.jsonl')}]\nmethod: {method}\nlora_rank: 4\nsteps: 6\n"
        f"batch_size: 8\nexit_layers: [1, 2]\nsave_every: 3\nlog_every: 2\noutput: {output}\n"
        "layer_dropout: {max: 0.2}\n"
    )
    assert main(["train", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "step 6/6" in shown
    assert "accuracy/agreement by exit" in shown
    trained, _ = load(output / "model")
    before, _ = load(model)
    same = [name for name, value in trained.named_parameters() if torch.equal(value, before.get_parameter(name))]
    frozen = ("embed_tokens", "lm_head", "norm")  # norms are trained in full, but six small steps vanish in bf16
    assert all(any(part in name for part in frozen) for name in same)
    assert (output / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")
    assert main(["train", str(recipe), "--resume", "--set", "steps=6"]) == 0
    assert main(["train", str(recipe), "--resume", "--set", "seed=3"]) == 2
    assert "was trained with" in capsys.readouterr().err


def test_the_train_command_on_ranges_of_ranks_and_shares_of_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    from safetensors.torch import load_file

    model, output = save_tiny(tmp_path / "base"), tmp_path / "out"
    one, two = (pairs_file(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntasks: {{{one}: 0.9, {two}: 0.1}}\nlora_rank: {{0: 6, 1-3: 2}}\nepochs: 0.1\n"
        f"batch_size: 8\nexit_layers: [2, 3]\nshallow_steps: 0.6\nschedule: wsd\nlog_every: 1\noutput: {output}\n"
        f"learning_rate: {{0-1: 0.002, 2-3: 0.001}}\n"
    )
    assert main(["train", str(recipe)]) == 0
    assert "step 5/5" in capsys.readouterr().out  # 40 examples at 0.1, so 360 at 0.9; a tenth of 50 batches
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    ranks = {(int(name.split(".layers.")[1][0]), value.shape[0]) for name, value in saved.items() if "lora_A" in name}
    assert ranks == {(0, 6), (1, 2), (2, 2), (3, 2)}

    from peft import PeftModel

    from layerskip.models import load

    adapted = PeftModel.from_pretrained(load(model)[0], output / "adapter")
    scalings = {part.scaling["default"] for part in adapted.modules() if isinstance(getattr(part, "scaling", 0), dict)}
    assert scalings == {1.0}


def test_the_train_command_goes_on_from_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """It starts with what the adapter holds, keeps its ranks, and gives an adapter of the same base."""
    from safetensors.torch import load_file

    model, first, second = save_tiny(tmp_path / "base"), tmp_path / "first", tmp_path / "second"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntasks: [{pairs_file(tmp_path / 'pairs.jsonl')}]\nbatch_size: 8\nexit_layers: [1, 2]\n"
        "steps: 2\n"
    )
    assert main(["train", str(recipe), "--set", "lora_rank={0: 6, 1-3: 2}", "--set", f"output={first}"]) == 0
    go_on = ["train", str(recipe), "--set", f"adapter={first / 'adapter'}", "--set", f"output={second}"]
    assert main([*go_on, "--set", "learning_rate=1.0e-12"]) == 0
    before, after = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "a rate of nearly 0 changes no bf16"
    assert main([*go_on, "--overwrite", "--set", "learning_rate=1.0e-12", "--set", "interpolate=0.5"]) == 0
    shrunk = load_file(second / "adapter" / "adapter_model.safetensors")
    for name, value in shrunk.items():
        assert torch.equal(value, before[name] * (0.5 if "lora_B" in name else 1)), name
    assert main([*go_on, "--overwrite", "--set", "learning_rate=0.01"]) == 0
    after = load_file(second / "adapter" / "adapter_model.safetensors")
    assert not any(torch.equal(value, before[name]) for name, value in after.items() if "lora_B" in name)
    assert main(["train", str(recipe), "--set", f"adapter={tmp_path}"]) == 2
    assert "has no adapter_config.json, so it is no LoRA adapter" in capsys.readouterr().err


def test_the_train_command_with_replay_and_a_sampled_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    model, output = save_tiny(tmp_path / "base"), tmp_path / "out"
    own, other = (pairs_file(tmp_path / name) for name in ("own.jsonl", "other.jsonl"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntasks: [{own}]\nreplay: {{tasks: [{other}], tokens: 20}}\nbatch_tokens: 40\nhead_sample: 4\n"
        f"exit_layers: [2, 3]\nshallow_steps: 0.5\nlog_every: 1\noutput: {output}\n"
    )
    logging.enable_progress_bar()  # as in a new process
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 0
    printed, advice = capsys.readouterr()
    assert advice == "", "no bars, no warnings"
    assert printed.count("replayed") == 6
    assert "step 6/6" in printed  # 28 pairs have 5 tokens, the others up to 8


def test_the_train_command_on_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "stepz=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["train", "--set", "steps"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["train", "--resume", "--set", f"output={tmp_path}"]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    assert main(["train", "--set", "tasks=[knitting]"]) == 2
    assert "task 'knitting'" in capsys.readouterr().err


def test_the_exits_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w3 w4\nw5\n")
    model = save_tiny(tmp_path / "base")
    arguments = [
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "8",
        "--dtype",
        "float32",
        "--output",
        str(tmp_path / "e"),
    ]
    assert main(["exits", "--model", str(model), *arguments]) == 0
    assert "exit layer" in capsys.readouterr().out
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_exit_analysis_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 9, 4, 5], [1, 2, 3, 4, 5]])
    analysis = ExitAnalysis(tokens, torch.tensor([[0.95, 0.95, 0.55, 0.55, 0.95], [1.0] * 5]), (5,))
    assert analysis.agreement() == [0.8, 1.0]
    # bin 0.9…1: 3 positions, all agree, gap 0.05; bin 0.5…0.6: 2 positions, half agree, gap 0.05
    assert analysis.calibration_error(1) == pytest.approx(0.05, abs=1e-6)
    # K = 2: round 1 accepts 2 and emits 3, round 2 accepts the draft of position 3 and emits 2
    assert analysis.tokens_per_round(1, 2) == 2.5
    assert analysis.speedup_bound(1, 2) == pytest.approx(2.5 / ((3 * 1 + 1) / 2))
