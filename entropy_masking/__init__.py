"""Entropy-aware masking and distillation for masked language models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_masking.losses import masked_lm_loss
    from entropy_masking.masking.collator import EntropyMaskingCollator
    from entropy_masking.masking.masker import Masker
    from entropy_masking.masking.policy import MaskPolicy
    from entropy_masking.shards.manifests import read_manifest

__all__ = ["EntropyMaskingCollator", "MaskPolicy", "Masker", "masked_lm_loss", "read_manifest"]

_HOMES = {
    "EntropyMaskingCollator": "masking.collator",
    "MaskPolicy": "masking.policy",
    "Masker": "masking.masker",
    "masked_lm_loss": "losses",
    "read_manifest": "shards.manifests",
}


def __getattr__(name: str) -> object:
    # imports on first use: torch and transformers take seconds, and reading a manifest needs neither
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
