"""How tasks are fine-tuned, as data: the protocols of three papers, and what they all have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """One way to fine-tune; ``scheduler`` by transformers' name, ``limit_train`` training rows at most."""

    learning_rate: float
    epochs: int
    batch_size: int
    scheduler: str = "linear"
    max_length: int = 128
    dropout: float = 0.1
    dtype: str = "float32"
    limit_train: int | None = None


# the settings that are tried; of several, the best by its dev score counts
PROTOCOLS = {
    # one setting for all tasks: Geiping and Goldstein 2023, arXiv 2212.14034
    "cramming": (Settings(4e-5, 5, 16, scheduler="cosine"),),
    # Devlin et al. 2019, arXiv 1810.04805, with the learning rates of its appendix and of its code
    "bert-grid": tuple(Settings(rate, epochs, 32) for rate in (5e-5, 4e-5, 3e-5, 2e-5) for epochs in (3, 4)),
    # the fine-tuning of the BabyLM challenge of 2025
    "babylm": (Settings(3e-5, 10, 32),),
}
LIMITS = {"babylm": dict.fromkeys(("mnli", "mnli_matched", "qqp"), 10_000)}  # training rows by task

# the same in every protocol; results made with another recipe are not compared
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",  # β 0.9, 0.999; ε 1e-8
    "weight_decay": 0.01,  # of matrices only
    "warmup": 0.06,  # of all steps
    "clip_norm": 1.0,
    "pool": 32,  # shuffled rows are sorted by length within this many batches
}


def grid_of(protocol: str, task: str, changes: Mapping[str, Any]) -> tuple[Settings, ...]:
    """The settings tried on a task, without repetition.

    Args:
        changes: values by field, instead of the protocol's; None leaves the protocol's.
    """
    given = {"limit_train": LIMITS.get(protocol, {}).get(task)} | {k: v for k, v in changes.items() if v is not None}
    return tuple(dict.fromkeys(replace(settings, **given) for settings in PROTOCOLS[protocol]))
