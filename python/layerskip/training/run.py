"""Run a recipe: model, adapter, data, trainer, and the results."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from .. import devices, registry
from .._files import replaced
from .._imports import need
from ..models import load
from ..models.architectures import architecture_of
from ..models.files import digest_of_weights, reading
from . import data
from .batching import Collator, Pool, encode, read_pairs, token_batches
from .curriculum import check_exits, make_curriculum, make_dropout
from .data import load_task, splits
from .output_dir import WEIGHTS, digest, results
from .recipe import Recipe, by_layer
from .trainer import Batching, LayerSkipTrainer, Plan

SHORT = 256  # tokens up to which unfused bf16 attention is not slower on a CPU, forward and backward, than SDPA; at 64
# it is 2 to 3 times faster
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_pairs(tasks: Iterable[str], split: str = "train") -> dict[str, list[Any]]:
    """The examples of each task of a recipe; files and the hub's datasets are for training."""
    pairs: dict[str, list[Any]] = {}
    for task in tasks:
        if task.startswith(data.PREFIX):
            if split == "train":
                pairs[task] = data.load_hub(task)
        elif registry.find(registry.TASKS, task) is not None:
            if split in splits(task):
                pairs[task] = load_task(task, split)
        elif Path(task).is_file():
            if split == "train":
                pairs[task] = read_pairs(Path(task))
        else:
            raise registry.unknown(registry.TASKS, task)
    return pairs


def mix(parts: Mapping[str, Sequence[Any]], tasks: Sequence[str] | Mapping[str, float]) -> list[Any]:
    """The examples of all tasks, each at least once; if ``tasks`` gives shares, repeated so that these hold."""
    if not isinstance(tasks, Mapping):
        return list(chain.from_iterable(parts.values()))
    unit = max(len(part) / tasks[task] for task, part in parts.items())  # examples for a share of 1
    return [part[index % len(part)] for task, part in parts.items() for index in range(round(unit * tasks[task]))]


def prepare_model(recipe: Recipe) -> tuple[Any, Any]:
    """Load the model, with LoRA if the recipe has it. Trained parameters are fp32, under autocast, others bf16."""
    frozen_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    model, tokenizer = load(recipe.model, dtype=frozen_dtype)
    architecture_of(model)  # packed weights can't be trained
    check_exits(recipe, model.config.num_hidden_layers)
    if recipe.method == "lora":
        if recipe.adapter is not None:
            return _trainable(_adapter(model, Path(recipe.adapter))), tokenizer
        ranks = by_layer(recipe.lora_rank, model.config.num_hidden_layers, "lora_rank")
        return _with_lora(model, ranks, recipe.seed), tokenizer
    model.float()
    if recipe.freeze_embedding:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False).to(frozen_dtype)
    return model, tokenizer


def _with_lora(model: Any, ranks: Sequence[int], seed: int) -> Any:
    """Add adapters with a rank for each layer; alpha is the rank, so that all are scaled by 1."""
    peft = need("peft", "training an adapter")
    torch.manual_seed(seed)  # what LoRA begins with is drawn; the Trainer seeds later
    usual = max(sorted(set(ranks)), key=ranks.count)
    others = {rf"layers\.{layer}\..*": rank for layer, rank in enumerate(ranks) if rank != usual}
    config = peft.LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=dict(others), target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return _trainable(peft.get_peft_model(model, config))


def _adapter(model: Any, folder: Path) -> Any:
    """The model with an earlier adapter, to be trained further."""
    peft = need("peft", "going on with an adapter")
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"adapter: {folder} has no adapter_config.json, so it is no LoRA adapter")
    with reading("adapter", str(folder)):
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def _trainable(adapted: Any) -> Any:
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast takes care; PEFT would widen every input to fp32
    return adapted


def schedule(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The Trainer's arguments for the learning rate over ``steps``."""
    if recipe.schedule != "wsd":
        return {"lr_scheduler_type": recipe.schedule}
    decay = {"num_decay_steps": steps // 3, "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}


class OneDevice(TrainingArguments):
    """Use one device per process, the current GPU or the CPU; transformers would use all GPUs that it sees."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)

    @property
    def device(self) -> torch.device:
        device: torch.device = super().device
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def training_arguments(recipe: Recipe, steps: int, device: torch.device, **kwargs: Any) -> TrainingArguments:
    """The Trainer's arguments for a recipe of ``steps``; under torchrun each process has its own GPU."""
    rates = recipe.learning_rate
    arguments = OneDevice(
        output_dir=recipe.output,
        per_device_train_batch_size=1 if recipe.batch_tokens else recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation * (2 if recipe.replay.tasks else 1),
        learning_rate=max(rates.values()) if isinstance(rates, dict) else rates,
        adam_beta2=recipe.beta2,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs,
        bf16=recipe.precision == "bf16",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,  # a dropped layer still gives its parameters zero gradients
        logging_steps=min(recipe.log_every, steps),
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=recipe.seed,
        disable_tqdm=True,
        report_to=[],
        **schedule(recipe, steps),
        **kwargs,
    )
    if device.type == "cuda" and _num_processes() == 1:
        torch.cuda.set_device(device)  # only now: to make the arguments sets the first
    return arguments


def make_trainer(recipe: Recipe, device: torch.device | None = None, **kwargs: Any) -> LayerSkipTrainer:
    """Load all that a recipe names, and make the trainer; by default on the first GPU, if there is one."""
    device = devices.find("auto") if device is None else device
    pairs = load_pairs(recipe.tasks)
    model, tokenizer = prepare_model(recipe)
    encoded = {task: encode(tokenizer, part, recipe.max_length) for task, part in pairs.items()}
    train = mix(encoded, recipe.tasks)
    batching = make_batching(recipe, tokenizer)
    held_out: Sequence[Any] | None = None
    if recipe.eval_split is not None:
        examples = list(chain.from_iterable(load_pairs(recipe.tasks, recipe.eval_split).values()))
        held_out = encode(tokenizer, examples[: recipe.eval_examples], recipe.max_length)
    longest = max(len(pair["input_ids"]) for pair in (*train, *(batching.replayed if batching else ())))
    if device.type == "cpu" and longest <= SHORT:
        model.set_attn_implementation("eager")
    steps = recipe.steps or _steps(recipe, train)
    layers = model.config.num_hidden_layers
    plan = Plan(
        make_curriculum(recipe, layers, steps),
        recipe.exit_weights,
        recipe.exit_weight_scale,
        make_dropout(recipe, layers, steps),
        recipe.head_sample,
    )
    rates = by_layer(recipe.learning_rate, layers, "learning_rate") if isinstance(recipe.learning_rate, dict) else None
    trainer = LayerSkipTrainer(
        model, training_arguments(recipe, steps, device), plan, train_dataset=train, eval_dataset=held_out,
        data_collator=Collator(tokenizer.pad_token_id or tokenizer.eos_token_id), processing_class=tokenizer,
        batching=batching, layer_rates=rates, **kwargs,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_batching(recipe: Recipe, tokenizer: Any) -> Batching | None:
    """The batches by tokens of a recipe, with replayed ones; None for batches by examples."""
    if recipe.batch_tokens is None:
        return None
    if not recipe.replay.tasks:
        return Batching(recipe.batch_tokens)
    length = min(recipe.max_length, recipe.replay.tokens)
    pairs = load_pairs(recipe.replay.tasks)
    encoded = {task: encode(tokenizer, part, length, whole=True) for task, part in pairs.items()}
    return Batching(recipe.batch_tokens, mix(encoded, recipe.replay.tasks), recipe.replay.tokens)


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun; accelerate only knows it once the arguments are made


def _steps(recipe: Recipe, pairs: Sequence[dict[str, list[int]]]) -> int:
    if recipe.batch_tokens is None:
        batches = math.ceil(len(pairs) / recipe.batch_size)
    else:
        batches = len(token_batches([len(pair["input_ids"]) for pair in pairs], recipe.batch_tokens, range(len(pairs))))
    return math.ceil(math.ceil(math.ceil(batches / _num_processes()) / recipe.gradient_accumulation) * recipe.epochs)


def seen_data(trainer: LayerSkipTrainer) -> dict[str, Any]:
    """What the steps depend on beside the recipe: weights, examples as tokens, number of processes."""
    data: Any = trainer.train_dataset
    replayed = data.replayed if isinstance(data, Pool) else ()
    own = data.pairs if isinstance(data, Pool) else data
    return {
        WEIGHTS: digest_of_weights(trainer.accelerator.unwrap_model(trainer.model)),
        "digest of the examples": digest(own),
        "digest of the examples to replay": digest(replayed),
        "number of processes": trainer.accelerator.num_processes,
    }


def save_result(trainer: LayerSkipTrainer, recipe: Recipe) -> list[Path]:
    """Write ``model``, a plain Hugging Face directory in bf16, and for LoRA ``adapter``, bf16 too, into the output.

    With ``interpolate`` they lie that far between the base model and the trained one (Wortsman et al. 2022). Both
    replace older ones as `layerskip._files.publish` does.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.revert()
    targets = results(recipe)
    with replaced(*targets) as folders:
        if recipe.method == "lora":
            model = _save_adapter(model, folders[0], recipe)
        model.bfloat16().save_pretrained(folders[-1])
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(folders[-1])
    return targets


def _save_adapter(model: Any, folder: Path, recipe: Recipe) -> Any:
    """Save the adapter; return the model with it merged."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = recipe.interpolate if "lora_B" in name else 1
            parameter.data = (parameter.data * scale).bfloat16()
    for config in model.peft_config.values():
        config.base_model_name_or_path = recipe.model  # not the directory that it happened to be read from
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return model.merge_and_unload()
