"""What a running training shows: step, time left, loss, and each exit's accuracy and agreement."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback


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
            self.console.print(
                f"{head}  loss {logs['loss']:.4f}  {replayed}{self._exits(logs, '')}", highlight=False, soft_wrap=True
            )
        elif "eval_loss" in logs:
            self.console.print(
                f"held out  loss {logs['eval_loss']:.4f}  {self._exits(logs, 'eval_')}", highlight=False, soft_wrap=True
            )

    @staticmethod
    def _exits(logs: dict[str, float], prefix: str) -> str:
        """Accuracy and agreement of the exits, in percent."""
        name = f"{prefix}exit_accuracy/"
        exits = [key.removeprefix(name) for key in logs if key.startswith(name)]
        parts = [f"{e}: {logs[name + e]:.1%}/{logs[f'{prefix}exit_agreement/{e}']:.1%}" for e in exits]
        return "accuracy/agreement by exit  " + "  ".join(parts) if parts else ""
