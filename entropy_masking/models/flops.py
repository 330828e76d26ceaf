"""What training costs in floating-point operations: matrix products and attention, multiplications and additions.

Counted as pipeline/score.py counts scoring, so that the two can be added up. A forward is counted by torch, whatever
the architecture; for a BERT of l layers of width H and inner width 4·H it comes to::

    encoder(L) = L · l · (24·H² + 4·L·H)      of a sequence
    head       = 2·H² + 2·H·V                 of a position
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def training_flops(
    encoder: int, head: int, sequences: int, predicted: int, scored: int = 0, fresh: int = 0, length: int = 0
) -> int:
    """FLOPs of a run: ``sequences · (3·(encoder + predicted·head) + scored·head) + fresh · (encoder + length·head)``.

    A backward is two forwards: with respect to the weights, and to what went in. For a head of one product this is the
    6·N a token of arXiv 2001.08361, with attention, and with the head where it runs only.

    Args:
        encoder, head: of ``forward_flops``.
        sequences: that the run trains on, each as often as it is seen.
        predicted: P, positions of each that the head learns from.
        scored: K, positions of each that the head scores without gradient, to choose those (``--predict-by``).
        fresh: sequences that are scored in a forward of their own, at all positions (``--self-refresh step``).
        length: L, of those.
    """
    return sequences * (3 * (encoder + predicted * head) + scored * head) + fresh * (encoder + length * head)


@torch.no_grad()
def forward_flops(model: Any, length: int) -> tuple[int, int]:
    """FLOPs of a student's forward (``models.masked_lm``): of its encoder on a sequence, and of its head at a position.

    A head that needs whole sequences counts as part of the encoder.
    """
    ids_1L = torch.zeros((1, length), dtype=torch.long, device=model.device)
    counts = []
    for positions in (1, 2):
        # attention as plain products: torch counts those on any device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids_1L, torch.ones_like(ids_1L), positions_BP=torch.arange(positions, device=model.device)[None])
        counts.append(counter.get_total_flops())
    return 2 * counts[0] - counts[1], counts[1] - counts[0]
