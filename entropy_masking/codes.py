"""Log-probabilities in 8 bits, as shards store them in ``topk_logprobs``. Pure; nats.

Code c means ``-c²/4600``; 254 means below -14, and 255 NaN. The k log-probabilities of a position descend, so their
codes never descend. Shards store the first code and the differences between neighbours, which compress well.

Shapes: k tokens of a position.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:  # reading a manifest needs no torch, whose import takes seconds
    from torch import Tensor

SCALE: Final = 4600  # the largest range in which rounding changes log-probabilities above -1 by less than 1/64
LEAST, NO_SCORE = 254, 255  # the codes of -inf and of NaN
LOGPROBS: Final = np.arange(256, dtype=np.float32) ** 2 / -SCALE  # of all codes
LOGPROBS[[LEAST, NO_SCORE]] = -np.inf, np.nan


def encode(logprobs_k: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., k], floats in descending order → differences of codes, uint8. Values above 0 become 0."""
    with np.errstate(invalid="ignore"):
        codes_k = np.sqrt(-SCALE * np.minimum(logprobs_k, 0)).round().clip(max=LEAST)
    codes_k = np.where(np.isnan(codes_k), NO_SCORE, codes_k).astype(np.uint8)
    return np.diff(codes_k, axis=-1, prepend=np.uint8(0))


def decode(differences_k: np.ndarray) -> np.ndarray:
    """Differences of codes [..., k], any integers → log-probabilities, float32. Sums wrap at 256."""
    return LOGPROBS[differences_k.cumsum(axis=-1, dtype=np.uint8)]


def decode_tensor(differences_k: Tensor) -> Tensor:
    """``decode`` for tensors on any device."""
    codes_k = differences_k.cumsum(-1) & 255
    logprobs_k = codes_k.float() ** 2 / -SCALE
    return logprobs_k.masked_fill(codes_k == LEAST, -math.inf).masked_fill(codes_k == NO_SCORE, math.nan)


def rounding(logprobs: np.ndarray) -> np.ndarray:
    """The most that rounding changed decoded log-probabilities (any shape), in nats; 0 for -inf."""
    return np.where(np.isinf(logprobs), 0, np.sqrt(-logprobs / SCALE) + 0.25 / SCALE)
