"""Bugs of training."""

from __future__ import annotations

from .mutation import LAYERSKIP, Mutation

TRAINING, TRAINER = "python/layerskip/training/", LAYERSKIP + "training/test_training_trainer.py"

BUGS = [
    Mutation(
        "the data's epoch is always 0", TRAINING + "trainer.py",
        "set_epoch(int((state.epoch or 0) + 1e-6))", "set_epoch(0)", TRAINER + " -k epoch",
    ),
    Mutation(
        "a checkpoint does not say its sample of the head", TRAINING + "trainer.py",
        '            "head_sample": self.head_sample,\n', "", TRAINER + " -k another_plan",
    ),
    Mutation(
        "layer dropout one layer off", TRAINING + "curriculum.py",
        "2 ** (layer / last) - 1", "2 ** ((layer + 1) / (last + 1)) - 1",
        LAYERSKIP + "training/test_training_formulas.py -k rates_by_hand",
    ),
    Mutation(
        "every process learns the whole batch", TRAINING + "hidden_state_cache.py",
        "items[state.process_index :: state.num_processes]", "items[:]",
        LAYERSKIP + "training/test_train_exit_processes.py",
    ),
    Mutation(
        "drafts are accepted that the head lacks", TRAINING + "losses.py",
        "torch.where(targets.ids >= 0, logs.gather", "torch.where(targets.ids >= -1, logs.gather",
        LAYERSKIP + "training/test_exit_loss.py",
    ),
    Mutation(
        "the means of exits weigh batches alike", TRAINING + "trainer.py", "losses * count, count", "losses, 1.0",
        LAYERSKIP + "training/test_training_formulas.py -k mean_loss",
    ),
]  # fmt: skip
