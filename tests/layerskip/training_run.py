"""A small training run, for tests, in their own process or in others: ``python training_run.py '{"output": …}'``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import tiny_model
from transformers import TrainingArguments

from layerskip.training import Collator, LayerDropout, LengthBuckets, RandomExits, ShallowSteps, layer_dropout_rates
from layerskip.training.trainer import Batching, LayerSkipTrainer, Plan

LAYERS = 4


def pairs(count: int = 60, modulus: int = 50) -> list[dict[str, list[int]]]:
    """Sequences of different lengths in which a token follows from the one before; three tokens are the prompt."""
    made = []
    for index in range(count):
        ids = [3 + (7 * index) % modulus]
        for _ in range(6 + index % 5):
            ids.append(3 + (5 * ids[-1] + 2) % modulus)
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return made


class ShardedOnCpu(LayerSkipTrainer):
    """Accelerate keeps FSDP for accelerators, torch does not: say the former what it would on those."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP  # every new AcceleratorState copies it
        self.is_fsdp_enabled = True


def trainer(
    output: Path | str,
    steps: int = 20,
    lora: bool = False,
    dropout: float = 0.3,
    shallow: float = 0,
    honest: bool = False,
    replay: bool = False,
    **changes: Any,
) -> Any:
    """A trainer of a tiny model: two of three exits at random, layer dropout, a share of ``shallow`` steps.

    FSDP works on the CPU unless ``honest``. With ``replay``, batches go by tokens, every second one is of other pairs,
    early exits choose among a sample of the vocabulary, and upper layers learn more slowly.
    """
    model = tiny_model("llama2")
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
        )
    arguments = {
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "max_steps": steps,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 10, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 5, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    exits = RandomExits(LAYERS, [1, 2, 3], 2, seed=5)
    plan = Plan(
        ShallowSteps(exits, shallow, seed=5) if shallow else exits,
        dropout=LayerDropout(layer_dropout_rates(LAYERS, dropout), seed=5) if dropout else None,
        head_sample=8 if replay else 0,
    )
    options: dict[str, Any] = {}
    if replay:
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        options = {"batching": Batching(32, pairs(20, 31), 16), "layer_rates": [3e-3, 3e-3, 1e-3, 1e-3]}
    kind = ShardedOnCpu if changes.get("fsdp") and not honest else LayerSkipTrainer
    return kind(
        model, TrainingArguments(output_dir=str(output), **{**arguments, **changes}), plan, train_dataset=pairs(),
        data_collator=Collator(0), **options,
    )  # fmt: skip


def weights(run: Any) -> dict[str, torch.Tensor]:
    """The trained parameters."""
    return {name: p.detach() for name, p in run.accelerator.unwrap_model(run.model).named_parameters()}


def losses(run: Any) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def watch(run: Any) -> list[list[list[int]]]:
    """The batches that the run's model is given from now on, on this rank."""
    seen: list[list[list[int]]] = []
    forward = run.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].tolist())
        return forward(*args, **kwargs)

    run.model.forward = watched
    return seen


def batches_of(epochs: int, ranks: int = 1) -> list[list[list[int]]]:
    """What the first rank is to see, by the orders that `LengthBuckets` gives for each epoch."""
    examples, batches = pairs(), []
    for epoch in range(epochs):
        buckets = LengthBuckets([len(pair["input_ids"]) for pair in examples], 4 * ranks, seed=5)
        buckets.set_epoch(epoch)
        order = list(buckets)
        for begin in range(0, len(order), 4 * ranks):
            batch = [examples[index] for index in order[begin : begin + 4]]
            batches.append(Collator(0)(batch)["input_ids"].tolist())
    return batches


def main(options: dict[str, Any]) -> None:
    """Run, and leave ``result.json``; ``kill_at`` ends the process in the middle of writing that step's checkpoint.

    ``differ`` makes every rank draw its own layer dropout, which the library never does.
    """
    kill_at, resume, differ = (options.pop(name, None) for name in ("kill_at", "resume", "differ"))
    torch.set_num_threads(1)
    run = trainer(**options)
    if kill_at is not None:
        save_rng_state = run._save_rng_state

        def killed(directory: str) -> None:
            if run.state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            save_rng_state(directory)

        run._save_rng_state = killed
    if differ:
        draw = run.plan.dropout.draw
        run.plan.dropout.draw = lambda step, size, micro, device: draw(step, size, 7 * run.args.process_index, device)
    seen = watch(run)
    run.train(resume_from_checkpoint=resume)
    if run.args.process_index == 0:
        result = {"losses": losses(run), "wrapper": type(run.model_wrapped).__name__, "seen": seen}
        (Path(options["output"]) / "result.json").write_text(json.dumps(result))
    run.accelerator.end_training()  # without it gloo's threads may abort the exit


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down; all that counts has been written
