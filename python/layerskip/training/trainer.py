"""`LayerSkipTrainer`: the Hugging Face Trainer with the training step of arXiv 2404.16710."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .._files import publish, remove_written
from .batching import IGNORE, LengthBuckets, Pool, TokenBatches
from .curriculum import AllExits, Curriculum, LayerDropout, ShallowSteps, early_exit_weights, generator
from .hf_conversion import convert, revert
from .output_dir import checkpoints

_COLUMNS = ("loss", "labels", "agreed", "right", "reported")


class ExitMeter:
    """Sums per exit, kept on the device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, exits: Sequence[int], out: dict[str, Any]) -> None:
        """Take in what a converted model returned for ``exits``; with ``tokens``, the last is the full depth."""
        losses, count = out["exit_losses"].detach().double(), float(out["num_labels"])
        rows = torch.zeros(len(exits), len(_COLUMNS), dtype=torch.float64, device=losses.device)
        rows[:, 0], rows[:, 1] = losses * count, count
        if "tokens" in out:
            rows[:, 2] = (out["tokens"] == out["tokens"][-1]).sum(1)
            rows[:, 3] = (out["tokens"] == out["targets"]).sum(1)
            rows[:, 4] = out["targets"].shape[0]
        for exit_layer, row in zip(exits, rows, strict=True):
            self._sums[exit_layer] = self._sums.get(exit_layer, 0) + row

    def drain(self, exits: Sequence[int], accelerator: Any) -> dict[str, float]:
        """Means over all ranks since the last call; ``exits`` are all that any rank may have seen."""
        zeros = torch.zeros(len(_COLUMNS), dtype=torch.float64, device=accelerator.device)
        table = torch.stack([self._sums.get(exit_layer, zeros) for exit_layer in exits])
        self._sums = {}
        metrics: dict[str, float] = {}
        summed = accelerator.reduce(table, reduction="sum").tolist()
        for exit_layer, (loss, labels, agreed, right, reported) in zip(exits, summed, strict=True):
            if labels:
                metrics[f"exit_loss/{exit_layer}"] = loss / labels
            if reported:
                metrics[f"exit_agreement/{exit_layer}"] = agreed / reported
                metrics[f"exit_accuracy/{exit_layer}"] = right / reported
        return metrics


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress(TrainerCallback):
    """One line for every line of the Trainer's log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start, self._first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Print a line; the Trainer logs losses during training, and evaluations."""
        logs = logs or {}
        if "loss" in logs:
            elapsed = time.perf_counter() - self._start
            left = elapsed / max(state.global_step - self._first, 1) * (state.max_steps - state.global_step)
            head = f"step {state.global_step}/{state.max_steps}  {duration(elapsed)}, {duration(left)} left"
            replayed = f"replayed {logs['replay_loss']:.4f}  " if "replay_loss" in logs else ""
            line = f"{head}  loss {logs['loss']:.4f}  {replayed}{self._exits(logs, '')}"
        elif "eval_loss" in logs:
            line = f"held out  loss {logs['eval_loss']:.4f}  {self._exits(logs, 'eval_')}"
        else:
            return
        self.console.print(line, highlight=False, soft_wrap=True)

    @staticmethod
    def _exits(logs: dict[str, float], prefix: str) -> str:
        """Accuracy and agreement of the exits, in percent."""
        name = f"{prefix}exit_accuracy/"
        exits = [key.removeprefix(name) for key in logs if key.startswith(name)]
        parts = [f"{e}: {logs[name + e]:.1%}/{logs[f'{prefix}exit_agreement/{e}']:.1%}" for e in exits]
        return "accuracy/agreement by exit  " + "  ".join(parts) if parts else ""


PARTIAL = ".unfinished"
STATE = "layerskip.json"


@dataclass
class Plan:
    """The exits of a step, their weights, and the layer dropout.

    With ``head_sample`` the loss of early exits is over the labels of the training data and up to ``head_sample`` other
    tokens, drawn anew for every micro-batch, instead of the whole head.
    """

    curriculum: Curriculum
    weights: str = "paper"
    weight_scale: float = 1.0
    dropout: LayerDropout | None = None
    head_sample: int = 0

    def describe(self) -> dict[str, Any]:
        """Everything that the draws of a step depend on, as JSON takes it."""
        dropped = self.dropout
        return {
            "exits": _described(self.curriculum),
            "weights": [self.weights, self.weight_scale],
            "dropout": dropped and [list(dropped.rates), dropped.seed, dropped.total_steps, dropped.scale],
            "head_sample": self.head_sample,
        }


def _described(curriculum: Curriculum) -> dict[str, Any]:
    values = {key: _described(value) if hasattr(value, "enabled") else value for key, value in vars(curriculum).items()}
    return {"curriculum": type(curriculum).__name__, **values}


@dataclass
class Batching:
    """Batches by tokens, not by a number of examples: up to ``tokens`` in each rank's micro-batch, with padding.

    With ``replayed`` pairs, every second micro-batch, of ``replay_tokens``, is of these and trains only the full depth,
    so that it does not forget them. ``gradient_accumulation_steps`` counts both, so it must
    be even then; ``per_device_train_batch_size`` counts batches, and must be 1.
    """

    tokens: int
    replayed: Sequence[dict[str, list[int]]] = ()
    replay_tokens: int = 0

    def check(self, args: TrainingArguments) -> None:
        """Raise ValueError where the Trainer's arguments do not fit."""
        if args.per_device_train_batch_size != 1:
            raise ValueError(f"per_device_train_batch_size must be 1, got {args.per_device_train_batch_size}")
        if self.replayed and args.gradient_accumulation_steps % 2:
            raise ValueError(
                f"gradient_accumulation_steps must be even with replay, got {args.gradient_accumulation_steps}"
            )


class _SetEpoch(TrainerCallback):
    """Set the sampler's epoch; accelerate does not reach it if the batches are sharded."""

    def __init__(self, trainer: LayerSkipTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class LayerSkipTrainer(Trainer):
    """Trains early exits and full depth together, with layer dropout.

    The model is converted in place (see `convert`); `revert` undoes that. The log carries, for each exit E,
    ``exit_loss/E``, and ``exit_agreement/E`` (with the full depth's choice) and ``exit_accuracy/E`` on up to 256 tokens
    of the last batches before it that ran to full depth. A checkpoint appears under its name only when it is whole.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal LM of a supported architecture.
    args : TrainingArguments
    plan : Plan
        By default every exit every step, the paper's weights, no dropout.
    train_dataset : sequence of dict
        With lists ``input_ids`` and ``labels``, as `encode` makes them; ``eval_dataset``, among ``kwargs``, too.
    batching : Batching, optional
        Batches by tokens, and replayed pairs.
    layer_rates : sequence of float, optional
        The peak learning rate of each layer; other parameters have that of ``args``.
    **kwargs
        As `transformers.Trainer` takes them.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        plan: Plan | None = None,
        train_dataset: Sequence[dict[str, list[int]]] | None = None,
        batching: Batching | None = None,
        layer_rates: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        num_layers = model.config.num_hidden_layers
        self.plan = plan or Plan(AllExits(num_layers))
        self.batching, self.layer_rates = batching, layer_rates
        if layer_rates is not None and len(layer_rates) != num_layers:
            raise ValueError(f"{len(layer_rates)} learning rates were given for {num_layers} layers")
        labels = {label for pair in train_dataset or () for label in pair["labels"]} - {IGNORE}
        self.vocabulary = torch.tensor(sorted(labels)) if self.plan.head_sample else None
        if batching is not None and train_dataset is not None:
            batching.check(args)
            data: Any = Pool(train_dataset, batching.replayed)
        else:
            data = train_dataset
        self.conversion = convert(model, self.plan.dropout)
        self.num_layers = num_layers
        self.meter, self.replay_meter = ExitMeter(), ExitMeter()
        self.sampler: LengthBuckets | TokenBatches | None = None
        self._micro = (-1, 0)  # the step that was seen last, and how many of its micro-batches
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        if isinstance(self.plan.curriculum, ShallowSteps):  # DDP must not wait for gradients of layers that did not run
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, train_dataset=data, **kwargs)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "fsdp was asked for, but accelerate shards nothing here: it needs GPUs and several processes"
            )
        self.model_accepts_loss_kwargs = True  # asks for the label count over all micro-batches and ranks
        self.loss_is_scaled_for_ga = True
        self.add_callback(_SetEpoch(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.batching is not None:
            self.sampler = TokenBatches(
                dataset, self.batching.tokens, self.batching.replay_tokens, self.args.seed,
                self.accelerator.num_processes,
            )  # fmt: skip
            return self.sampler
        lengths = [len(pair["input_ids"]) for pair in dataset]
        size = self._train_batch_size * self.accelerator.num_processes
        self.sampler = LengthBuckets(lengths, size, self.args.seed)
        return self.sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; no batch is left once all steps are done, as when a run resumes from its last step."""
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True
        return [], None

    def _micro_batch(self) -> int:
        """The index of this micro-batch in its step."""
        step, seen = self._micro
        self._micro = (self.state.global_step, seen + 1 if step == self.state.global_step else 0)
        return self._micro[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ weightₙ · CE of the step's exits, as this rank's share of the mean over all labels of the step."""
        step, ids = self.state.global_step, inputs["input_ids"]
        micro = self._micro_batch() if model.training else None
        # every second micro-batch, see `TokenBatches`
        replayed = micro is not None and micro % 2 == 1 and self.batching is not None and bool(self.batching.replayed)
        exits = self.plan.curriculum.enabled(step) if micro is not None else self._all_exits()
        exits = (self.num_layers,) if replayed else exits
        weights = early_exit_weights(exits, self.num_layers, self.plan.weights, self.plan.weight_scale)
        options: dict[str, Any] = {"report": micro is None or (not replayed and self._reports(step))}
        if micro is not None and self.plan.dropout is not None:
            self.plan.dropout.draw(step, ids.shape[0], micro, ids.device)
        if micro is not None and self.vocabulary is not None:
            options["head_sample"] = self._head_sample(step, micro).to(ids.device)
        out = model(**inputs, exit_layers=exits, exit_weights=weights.to(ids.device), **options)
        (self.replay_meter if replayed else self.meter).add(exits, out)
        loss = out["loss"]
        if num_items_in_batch is not None:  # gradients are averaged over ranks, so the share is scaled up by them
            loss = loss * (out["num_labels"] * self.accelerator.num_processes / num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def _head_sample(self, step: int, micro: int) -> Tensor:
        """The tokens that the loss of early exits covers in a micro-batch, ascending."""
        assert self.vocabulary is not None
        size = self.conversion.vocabulary
        source = generator("head sample", self.args.seed, step, micro)
        others = torch.randint(size, (self.plan.head_sample,), generator=source)
        return torch.cat([self.vocabulary, others]).unique()

    def _reports(self, step: int) -> bool:
        """Whether this is the last step to full depth before a line of the log: its exits are compared."""
        every = max(int(self.state.logging_steps), 1)
        until = (step // every + 1) * every
        full = (self.plan.curriculum.enabled(later)[-1] == self.num_layers for later in range(step, until))
        return next(full) and not any(full)

    def _all_exits(self) -> tuple[int, ...]:
        candidates = getattr(self.plan.curriculum, "candidates", ())
        return *candidates, self.num_layers

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Loss over all candidate exits; the meter keeps the rest."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the exits' metrics among its own."""
        training, self.meter = self.meter, ExitMeter()
        try:
            output: Any = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            means = self.meter.drain(self._all_exits(), self.accelerator)
            output.metrics.update({f"{prefix}_{key}": value for key, value in means.items()})
        finally:
            self.meter = training
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the exits where a training loss is logged."""
        if "loss" in logs:
            logs.update(self.meter.drain(self._all_exits(), self.accelerator))
            if self.batching is not None and self.batching.replayed:
                replayed = self.replay_meter.drain((self.num_layers,), self.accelerator)
                logs["replay_loss"] = replayed[f"exit_loss/{self.num_layers}"]
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; with ``layer_rates``, a group of parameters for each rate."""
        optimizer = super().create_optimizer(model)
        if self.layer_rates is None:
            return optimizer
        trained: Any = self.model if model is None else model
        rates = {parameter: self._rate(name) for name, parameter in trained.named_parameters()}
        groups = [
            {**group, "params": [p for p in group["params"] if rates[p] == rate], "lr": rate}
            for group in optimizer.param_groups
            for rate in sorted(set(rates.values()))
        ]
        optimizer.param_groups.clear()
        for group in groups:
            if group["params"]:
                optimizer.add_param_group(group)
        return optimizer

    def _rate(self, name: str) -> float:
        assert self.layer_rates is not None
        layer = re.search(r"layers\.(\d+)\.", name)
        return self.layer_rates[int(layer[1])] if layer else self.args.learning_rate

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does; a checkpoint of another plan is refused."""
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._check_plan(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_plan(self, checkpoint: Path) -> None:
        state = checkpoint / STATE
        if not state.exists():
            raise ValueError(f"{checkpoint} is no checkpoint of LayerSkip training: it has no {STATE}")
        saved, own = json.loads(state.read_text()), json.loads(json.dumps(self.plan.describe()))
        for key, value in own.items():
            if saved.get(key) != value:
                raise ValueError(f"{checkpoint} was trained with {key} {saved.get(key)}, this run has {value}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a temporary folder, and rename it when it is whole."""
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(root / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best(root, root / PARTIAL / name)
            (root / PARTIAL / name / STATE).write_text(json.dumps(self.plan.describe(), indent=1))
            publish((root / PARTIAL / name, root / name), hashed=False)
            (root / PARTIAL).rmdir()
            self._remove_old_checkpoints(root)
        self.accelerator.wait_for_everyone()

    def _name_best(self, root: Path, folder: Path) -> None:
        """Correct the path of the best checkpoint: the Trainer has recorded the temporary one."""
        best = self.state.best_model_checkpoint
        if best is not None:
            self.state.best_model_checkpoint = str(root / Path(best).name)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _remove_old_checkpoints(self, root: Path) -> None:
        """Keep up to ``save_total_limit``, the newest and the best among them; files of others stay."""
        own, best = checkpoints(root), self.state.best_model_checkpoint
        kept = {own[-1], *([Path(best)] if best else [])}
        limit = max(self.args.save_total_limit or len(own), len(kept))
        for checkpoint in [path for path in own if path not in kept][: max(len(own) - limit, 0)]:
            remove_written(checkpoint)

    _saving = False

    def _get_output_dir(self, trial: Any) -> str:
        root = super()._get_output_dir(trial)
        return str(Path(root) / PARTIAL) if self._saving else root

    def revert(self) -> None:
        """Undo `convert`; the trained weights stay."""
        revert(self.accelerator.unwrap_model(self.model))
