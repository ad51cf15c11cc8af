"""The Trainer: exact resumption, whole checkpoints, metrics, two processes; all on models of a few thousand weights."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import launched
import pytest
import torch
from training_run import LAYERS, batches_of, losses, pairs, trainer, watch, weights
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from layerskip.training import RandomExits
from layerskip.training.output_dir import checkpoints, last_checkpoint
from layerskip.training.trainer import PARTIAL

SCRIPT = Path(__file__).parents[1].joinpath("training_run.py")
run_script, launch = partial(launched.run_script, SCRIPT), partial(launched.launch, SCRIPT)
# Losses of order 5: two ranks sum gradients in another order than one process, and AdamW divides by their size.
TOLERANCES = {"two processes": 2e-4}


class _StopAt(TrainerCallback):
    """Ends a run that is planned for longer, as an interruption would, after the step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These models are tiny."""


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"gradient_accumulation_steps": 2}, {"shallow": 0.5}, {"shallow": 0.5, "replay": True}],
    ids=["full", "lora", "accumulation", "shallow", "replay"],
)
def test_twenty_steps_are_ten_resumed_and_ten(tmp_path: Path, options: dict) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "parts", **options)
    first.args.max_steps, first.args.save_steps = 20, 10
    first.add_callback(_StopAt(10))
    first.train()
    assert first.state.global_step == 10
    second = trainer(tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    assert losses(second) == losses(whole)
    assert_same(weights(whole), weights(second))
    assert not any(torch.equal(value, weights(first)[name]) for name, value in weights(whole).items() if "lora" in name)


def test_a_run_killed_in_a_checkpoint_write_goes_on_from_the_last_whole_one(tmp_path: Path) -> None:
    killed = run_script(output=str(tmp_path / "run"), save_steps=5, kill_at=15)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "run" / PARTIAL / "checkpoint-15").is_dir()
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "checkpoint-10"
    resumed = trainer(tmp_path / "run", save_steps=5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert_same(weights(whole), weights(resumed))
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-20"
    assert not (tmp_path / "run" / PARTIAL).exists()


def test_old_checkpoints_are_removed_and_the_newest_stay(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=5, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]


def test_loss_falls_and_early_exits_come_to_agree(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=150, dropout=0.1, save_strategy="no", logging_steps=15, learning_rate=1e-2)
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    run.eval_dataset = pairs(20)
    metrics = run.evaluate()
    for exit_layer in range(1, LAYERS + 1):
        assert metrics[f"eval_exit_agreement/{exit_layer}"] > 0.8
        assert metrics[f"eval_exit_accuracy/{exit_layer}"] > 0.8
    assert metrics[f"eval_exit_agreement/{LAYERS}"] == 1
    assert any(f"exit_loss/{LAYERS}" in line and f"exit_accuracy/{LAYERS}" in line for line in lines)


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_exits(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3, save_strategy="no")
    run.train()
    from layerskip.training import early_exit_weights

    for step, line in enumerate(entry for entry in run.state.log_history if "loss" in entry):
        exits = run.plan.curriculum.enabled(step)
        expected = sum(
            weight * line[f"exit_loss/{e}"]
            for weight, e in zip(early_exit_weights(exits, LAYERS).tolist(), exits, strict=True)
        )
        assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_shallow_steps_leave_the_layers_above_alone_and_accuracy_is_logged_from_full_ones(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=12, dropout=0, shallow=0.5, save_strategy="no", logging_steps=4)
    exits = [run.plan.curriculum.enabled(step) for step in range(12)]
    before: list[dict[str, torch.Tensor]] = []

    class _Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            before.append({name: value.clone() for name, value in weights(run).items()})

        def on_step_end(self, args, state, control, **kwargs) -> None:
            changed = {name for name, value in weights(run).items() if not torch.equal(value, before[-1][name])}
            layers = {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}
            assert layers == set(range(exits[state.global_step - 1][-1]))

    run.add_callback(_Watch())
    run.train()
    assert len({shown[-1] for shown in exits}) > 1
    assert len(before) == 12
    lines = [line for line in run.state.log_history if "loss" in line]
    for number, line in enumerate(lines):
        window = exits[4 * number : 4 * number + 4]
        full = [shown for shown in window if shown[-1] == LAYERS]
        reported = {int(key.split("/")[1]) for key in line if key.startswith("exit_agreement/")}
        assert reported == (set(full[-1]) if full else set())
        assert {int(key.split("/")[1]) for key in line if key.startswith("exit_loss/")} == set().union(*window)


def test_evaluation_after_replay(tmp_path: Path) -> None:
    """Nothing of it is replayed."""
    run = trainer(tmp_path, steps=2, dropout=0, replay=True)
    run.eval_dataset = pairs()
    run.train()
    evaluated = run.evaluate()
    assert evaluated[f"eval_exit_loss/{LAYERS}"] > 0
    assert "eval_replay_loss" not in evaluated


def test_replay_trains_the_full_depth_and_layers_have_their_rates(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3, dropout=0, shallow=0.9, replay=True)
    exits, sampled = [], []
    forward = run.model.forward

    def watched(*args, exit_layers, head_sample, **kwargs):
        exits.append(exit_layers)
        sampled.append(head_sample.tolist())
        return forward(*args, exit_layers=exit_layers, head_sample=head_sample, **kwargs)

    run.model.forward = watched
    run.train()
    planned = [run.plan.curriculum.enabled(step) for step in range(3)]
    assert exits == [part for own in planned for part in (own, (LAYERS,))]
    labels = {label for pair in pairs() for label in pair["labels"]} - {-100}
    assert all(labels <= set(tokens) and tokens == sorted(set(tokens)) for tokens in sampled)
    assert len({tuple(tokens) for tokens in sampled}) > 1
    assert "replay_loss" in run.state.log_history[0]
    named = {id(parameter): name for name, parameter in run.model.named_parameters()}
    rates = {named[id(p)]: group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(named) == sum(len(group["params"]) for group in run.optimizer.param_groups)
    for name, rate in rates.items():
        assert rate == (1e-3 if "layers.2." in name or "layers.3." in name else 3e-3), name


def test_batches_that_do_not_fit_the_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size must be 1, got 4"):
        trainer(tmp_path, replay=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be even with replay, got 3"):
        trainer(tmp_path, replay=True, gradient_accumulation_steps=3)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    """What a plan is, is written out here; nothing of it may be forgotten."""
    trainer(tmp_path, steps=10, replay=True, shallow=0.5).train()
    checkpoint = tmp_path / "checkpoint-10"
    exits = {"num_layers": 4, "candidates": [1, 2, 3]}
    rates = [0.0, 0.0779763149684619, 0.1762203155904599, 0.3]  # (2^(l/3) - 1) · 0.3
    plan = {
        "exits": {
            "curriculum": "ShallowSteps", **exits, "share": 0.5, "seed": 5,
            "inner": {"curriculum": "RandomExits", **exits, "per_step": 2, "seed": 5},
        },
        "weights": ["paper", 1.0],
        "dropout": [rates, 5, 1, "constant"],
        "head_sample": 8,
    }  # fmt: skip
    saved = json.loads((checkpoint / "layerskip.json").read_text())
    assert saved == {**plan, "dropout": [pytest.approx(rates), *plan["dropout"][1:]]}
    changes = {
        "exits": lambda own: replace(own, curriculum=RandomExits(LAYERS, [1, 2, 3], 2, seed=5)),
        "weights": lambda own: replace(own, weight_scale=0.5),
        "dropout": lambda own: replace(own, dropout=None),
        "head_sample": lambda own: replace(own, head_sample=9),
    }
    assert changes.keys() == saved.keys()
    for key, change in changes.items():
        other = trainer(tmp_path, replay=True, shallow=0.5)
        other.plan = change(other.plan)
        with pytest.raises(ValueError, match=f"was trained with {key} "):
            other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "layerskip.json").unlink()
    with pytest.raises(ValueError, match=r"no layerskip\.json"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("resumed", [False, True], ids=["whole", "resumed"])
def test_every_epoch_has_an_order_of_its_own(tmp_path: Path, resumed: bool) -> None:
    """Over three epochs of 15 steps each batch is the one that the sampler's own order of that epoch names."""
    steps, first = 40, 20 if resumed else 0
    if resumed:
        trainer(tmp_path, steps=steps, save_steps=20).train()
    run = trainer(tmp_path, steps=steps, save_strategy="no")
    seen = watch(run)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20") if resumed else None)
    planned = batches_of(3)
    assert planned[:15] != planned[15:30] != planned[30:] != planned[:15]
    assert seen == planned[first:steps]


def test_the_sampler_is_told_its_epoch(tmp_path: Path) -> None:
    """By the trainer itself: where batches are dealt out to ranks nobody else does."""
    run = trainer(tmp_path)
    sampler = run._get_train_sampler()
    for epoch, told in ((None, 0), (0.0, 0), (1.0, 1), (2 - 1e-9, 2), (1.4, 1)):
        run.state.epoch = epoch
        run.callback_handler.on_epoch_begin(run.args, run.state, run.control)
        assert sampler.epoch == told


def test_checkpoints_of_others_neither_count_nor_go(tmp_path: Path) -> None:
    """Nor do files that somebody put into one of the run's own."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "mine").write_text("mine")

    class _Notes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                (tmp_path / "checkpoint-5" / "NOTES.md").write_text("mine")

    run = trainer(tmp_path, save_steps=5, save_total_limit=2)
    run.add_callback(_Notes())
    run.train()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-15", tmp_path / "checkpoint-20"]
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "checkpoint-5").iterdir()] == ["NOTES.md"]
    assert not (tmp_path / "checkpoint-10").exists()
    (tmp_path / "checkpoint-20" / "layerskip-files.json").unlink()
    again = trainer(tmp_path, save_steps=20)
    with pytest.raises(FileExistsError, match="checkpoint-20 exists, and was not written by layerskip"):
        again.train()


def test_the_best_checkpoint_is_where_the_trainer_says_and_stays(tmp_path: Path) -> None:
    """It is saved under another name first."""
    options = {"metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 2}
    run = trainer(tmp_path, save_steps=5, **options)
    run.args.eval_strategy, run.args.eval_steps, run.eval_dataset = IntervalStrategy.STEPS, 5, pairs(20)
    run.train()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-5", tmp_path / "checkpoint-20"]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-5"), "the loss falls, and the greatest is best"
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-5")


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused(tmp_path: Path) -> None:
    finished = launch(2, output=str(tmp_path), steps=1, honest=True, **FSDP)
    assert finished.returncode != 0
    assert "accelerate shards nothing here" in finished.stderr


def test_revert_gives_back_an_ordinary_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=2, save_strategy="no")
    model = run.model
    run.train()
    run.revert()
    assert all("forward" not in module.__dict__ for module in model.modules())


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


@pytest.mark.slow
@pytest.mark.time_limit(7200)
@pytest.mark.parametrize(
    ("sharding", "wrapper"), [({}, "DistributedDataParallel"), (FSDP, "FSDPLlamaForCausalLM")], ids=["DDP", "FSDP"]
)
def test_two_processes_follow_the_loss_curve_of_one(tmp_path: Path, sharding: dict, wrapper: str) -> None:
    one = trainer(tmp_path / "one", steps=6, dropout=0, per_device_train_batch_size=8, save_strategy="no")
    one.train()
    finished = launch(2, output=str(tmp_path / "two"), steps=6, dropout=0, save_strategy="no", **sharding)
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["wrapper"] == wrapper
    assert two["losses"] == pytest.approx(losses(one), abs=TOLERANCES["two processes"])


@pytest.mark.slow
@pytest.mark.time_limit(7200)
@pytest.mark.parametrize(
    "options", [{}, FSDP, {"gradient_accumulation_steps": 2, "steps": 3}], ids=["DDP", "FSDP", "accumulation"]
)
def test_two_processes_follow_one_through_shallow_steps(tmp_path: Path, options: dict) -> None:
    common = {"steps": 7, "dropout": 0, "shallow": 0.5, "save_strategy": "no", **options}
    alone = {key: value for key, value in common.items() if "fsdp" not in key}
    one = trainer(tmp_path / "one", per_device_train_batch_size=8, **alone)
    one.train()
    finished = launch(2, output=str(tmp_path / "two"), **common)
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["losses"] == pytest.approx(losses(one), abs=TOLERANCES["two processes"])


@pytest.mark.slow
@pytest.mark.time_limit(7200)
@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["DDP", "FSDP"])
def test_ranks_that_drop_different_layers_do_not_hang(tmp_path: Path, sharding: dict) -> None:
    options = {"dropout": 0.9, "differ": True, "per_device_train_batch_size": 1, "save_strategy": "no", **sharding}
    finished = launch(2, output=str(tmp_path), steps=4, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(json.loads((tmp_path / "result.json").read_text())["losses"]) == 4


@pytest.mark.slow
@pytest.mark.time_limit(7200)
@pytest.mark.parametrize(
    "changes",
    [{}, {"shallow": 0.5, "replay": True}, FSDP, {**FSDP, "shallow": 0.5, "replay": True}],
    ids=["DDP", "DDP with replay", "FSDP", "FSDP with replay"],
)
def test_two_processes_resume_exactly(tmp_path: Path, changes: dict) -> None:
    """Into the second epoch: one has eight steps, or, with replay, more."""
    options = {"output": str(tmp_path), "steps": 11, "save_steps": 9, **changes}
    whole = launch(2, **options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").unlink()
    resumed = launch(2, resume=str(tmp_path / "checkpoint-9"), **options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    seen = expected.pop("seen")
    assert seen[9 * (2 if "replay" in changes else 1) :] == result.pop("seen")
    assert result == expected
    if "replay" not in changes:
        assert seen == batches_of(2, ranks=2)[:11]
