"""Rows to mask: what the tests of masking share."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_masking.masking.selection import IGNORED

L, K = 32, 4  # round(0.15 · 30), half to even
PAD, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 200


def keys(rows: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) + (7 << 32), torch.full((rows,), epoch)


def candidates(rows: int, length: int = L) -> Tensor:
    inner = torch.ones(rows, length, dtype=torch.bool)
    inner[:, 0] = inner[:, -1] = False
    return inner


def entropies(rows: int, length: int = L) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) * 8


def as_sets(positions_BK: Tensor) -> list[set[int]]:
    return [{p for p in row if p != IGNORED} for row in positions_BK.tolist()]
