"""The fine-tuning protocols of three papers as data, and the settings that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """One setting of fine-tuning. ``scheduler`` is a name of transformers, ``limit_train`` the most training rows."""

    learning_rate: float
    epochs: int
    batch_size: int
    scheduler: str = "linear"
    max_length: int = 128
    dropout: float = 0.1
    dtype: str = "float32"
    limit_train: int | None = None


# the settings to try; the one with the best dev score counts
PROTOCOLS = {
    # one setting for all tasks: Geiping and Goldstein 2023, arXiv 2212.14034
    "cramming": (Settings(4e-5, 5, 16, scheduler="cosine"),),
    # Devlin et al. 2019, arXiv 1810.04805, with the learning rates of its appendix and of its code
    "bert-grid": tuple(Settings(rate, epochs, 32) for rate in (5e-5, 4e-5, 3e-5, 2e-5) for epochs in (3, 4)),
    # the fine-tuning of the BabyLM challenge of 2025
    "babylm": (Settings(3e-5, 10, 32),),
}
LIMITS = {"babylm": dict.fromkeys(("mnli", "mnli_matched", "qqp"), 10_000)}  # training rows by task

FORMS = ("within-word", "original")  # of the pseudo-log-likelihood of BLiMP

# the same in every protocol; results of different recipes are not compared
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",  # β 0.9, 0.999; ε 1e-8
    "weight_decay": 0.01,  # of matrices only
    "warmup": 0.06,  # of all steps
    "clip_norm": 1.0,
    "pool": 32,  # shuffled rows are sorted by length within this many batches
}


def grid_of(protocol: str, task: str, changes: Mapping[str, Any]) -> tuple[Settings, ...]:
    """The settings to try on a task, without duplicates.

    Args:
        changes: values by field that replace those of the protocol; None changes nothing.
    """
    given = {"limit_train": LIMITS.get(protocol, {}).get(task)} | {k: v for k, v in changes.items() if v is not None}
    return tuple(dict.fromkeys(replace(settings, **given) for settings in PROTOCOLS[protocol]))
