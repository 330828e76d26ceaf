"""The private parts of other libraries that training needs; pyproject.toml limits their versions for this."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import Trainer


def save_within(trainer: Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Let a trainer save each of its checkpoints within a context.

    There is no public way: the event ``on_save`` comes after a save, so a rank would not learn that another one failed.
    """
    save = trainer._save_checkpoint

    def save_checkpoint(model: nn.Module, trial: object) -> None:
        with context():
            save(model, trial)

    trainer._save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def leave_ctrl_c_alone(trainer: Any) -> None:
    """Let Ctrl-C raise KeyboardInterrupt in ``trainer.fit()``. Ray's own handler ends the process with exit code 1."""
    trainer._register_sigint_handler = lambda _controller: None
