"""Log-probabilities in 8 bits, as in the column ``topk_logprobs`` of shards. Pure.

The code c stands for ``-c²/4600`` nats, and 255 for NaN. Rounding to a code changes a log-probability of -x nats by at
most ``√(x/4600)``, less than 1/64 nat for x ≤ 1, and everything below -14 nats becomes -14. The k log-probabilities of
a position descend, so their codes ascend. Shards store the first code and the differences between neighbours, which
compress well.

Shapes: k tokens of a position.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

NO_SCORE: Final = 255  # the code of NaN
SCALE: Final = np.float32(-1 / 4600)
LOGPROBS: Final = SCALE * np.arange(256, dtype=np.float32) ** 2  # of all codes
_BETWEEN: Final = -(LOGPROBS[:-2] + LOGPROBS[1:-1]) / 2  # where the nearest code changes
LOGPROBS[NO_SCORE] = np.nan


def encode(logprobs_k: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., k] in nats → differences of codes, uint8. A value above 0, by rounding, counts as 0."""
    codes_k = np.searchsorted(_BETWEEN, -logprobs_k).astype(np.uint8)
    codes_k[np.isnan(logprobs_k)] = NO_SCORE
    return np.diff(codes_k, axis=-1, prepend=np.uint8(0))


def codes(differences_k: np.ndarray) -> np.ndarray:
    """Differences [..., k] → codes. Those of a damaged file may exceed 255."""
    return differences_k.cumsum(axis=-1, dtype=np.int64)


def decode(differences_k: np.ndarray) -> np.ndarray:
    """Differences [..., k] → log-probabilities, float32."""
    return LOGPROBS[codes(differences_k) & 255]


def half_step(logprobs: np.ndarray) -> np.ndarray:
    """By how much rounding can have raised or lowered log-probabilities, in nats."""
    return np.sqrt(logprobs * SCALE) - SCALE


def decode_tensor(differences_k: Tensor) -> Tensor:
    """``decode`` on any device, without a copy to another one."""
    codes_k = differences_k.cumsum(-1) & 255
    return ((codes_k**2).float() * float(SCALE)).masked_fill(codes_k == NO_SCORE, torch.nan)
