"""The private parts of other libraries that training needs; pyproject.toml limits their versions for this."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Any

from transformers import Trainer


def save_within(trainer: Trainer, context: ContextDecorator) -> None:
    """Let a trainer save each of its checkpoints within a context.

    There is no public way: the event ``on_save`` comes after a save, so a rank would not learn that another one failed.
    """
    trainer._save_checkpoint = context(trainer._save_checkpoint)  # type: ignore[method-assign]


def load_within(trainer: Trainer, context: ContextDecorator) -> None:
    """Let a trainer load each part of a checkpoint within a context. There is no event for it."""
    for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"):
        setattr(trainer, name, context(getattr(trainer, name)))


def leave_ctrl_c_alone(trainer: Any) -> None:
    """Let Ctrl-C raise KeyboardInterrupt in ``trainer.fit()``. Ray's own handler ends the process with exit code 1."""
    trainer._register_sigint_handler = lambda _controller: None
