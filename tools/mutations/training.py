"""Bugs of training."""

from __future__ import annotations

from .mutation import LAYERSKIP, Mutation

FILES = "python/layerskip/_files.py"
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
    Mutation(
        "an exit's optimizer starts anew", TRAINING + "exit_trainer.py",
        'self._optimizer.load_state_dict(saved["optimizer"])', "pass",
        LAYERSKIP + "training/test_train_exit.py -k weights_after_a_resumed_run",
    ),
    Mutation(
        "the first values alone tell models apart", "python/layerskip/models/files.py",
        "weight.detach().flatten().cpu()", "weight.detach().flatten()[:4096].cpu()",
        LAYERSKIP + "training/test_train_exit.py -k one_other_value",
    ),
    Mutation(
        "a resumed run trains past its last step", TRAINING + "trainer.py",
        "if self.state.global_step < self.state.max_steps:", "if True:",
        LAYERSKIP + "training/test_training_output.py -k no_further_step",
    ),
    Mutation(
        "a manifest is not synced", FILES, "for name in (*files, MANIFEST):", "for name in files:",
        LAYERSKIP + "test_files.py -k synced",
    ),
    Mutation(
        "a manifest names files elsewhere", FILES,
        'PurePath(name).is_absolute() or ".." in PurePath(name).parts', "PurePath(name).is_absolute()",
        LAYERSKIP + "test_files.py -k elsewhere",
    ),
    Mutation(
        "changed files are removed", FILES, "if mark == manifest[name]}", "if mark}",
        LAYERSKIP + "test_files.py -k changed",
    ),
    Mutation(
        "an input under another name is the output", FILES,
        "path.resolve().is_relative_to(output.resolve())", "path.absolute().is_relative_to(output.absolute())",
        LAYERSKIP + "test_files.py -k never_the_output",
    ),
    Mutation(
        "two processes share a lock", FILES, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        LAYERSKIP + "test_files.py -k one_process_at_a_time",
    ),
    Mutation(
        "half a record stays in a journal", FILES,
        "            self._file.truncate(size)\n            raise", "            raise",
        LAYERSKIP + "test_files.py -k whole_or_not",
    ),
    Mutation(
        "an output that exists is replaced without being asked", FILES, "if output.exists() and not overwrite:",
        "if False:", LAYERSKIP + "test_files.py -k named_before_the_work",
    ),
    Mutation(
        "a directory that another program wrote is replaced", FILES,
        'return f"{directory} exists, and was not written by layerskip; move it away"', "return None",
        LAYERSKIP + "test_files.py -k not_replaced",
    ),
    Mutation(
        "a journal ends at a line that cannot be read", FILES, "skipped.append(str(number))", "break",
        LAYERSKIP + "test_files.py -k is_skipped",
    ),
]  # fmt: skip
