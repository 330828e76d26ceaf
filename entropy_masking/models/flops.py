"""What training costs in floating-point operations: matrix products and attention, multiplications and additions.

Counted as pipeline/score.py counts scoring, so that the two can be added up. A forward is counted by torch, whatever
the architecture; for a BERT of l layers of width H and inner width 4·H it comes to::

    encoder(L) = L · l · (24·H² + 4·L·H)      of a sequence
    head       = 2·H² + 2·H·V                 of a position
"""

from __future__ import annotations

import torch
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from entropy_masking.models.masked_lm import MaskedLM


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
def forward_flops(masked_lm: MaskedLM, length: int) -> tuple[int, int]:
    """FLOPs of a forward: of the encoder on a sequence of L tokens, and of the head at a position.

    A head that needs whole sequences counts as part of the encoder. Where torch cannot count an architecture, two for
    each weight and token.
    """
    try:
        counts = [_count(masked_lm, length, positions) for positions in (1, 2)]
    except Exception:  # counting uses tracing, which fails on scripted code, for one; a run must not fail by it
        projection = 0 if masked_lm.projection is None else masked_lm.projection.weight.numel()
        embedding = masked_lm.model.get_input_embeddings().weight.numel()
        weights = sum(weight.numel() for weight in masked_lm.model.parameters()) - embedding
        return 2 * length * max(0, weights - projection), 2 * (projection or embedding)
    return 2 * counts[0] - counts[1], counts[1] - counts[0]


def _count(masked_lm: MaskedLM, length: int, positions: int) -> int:
    device = masked_lm.model.device
    ids_1L = torch.zeros((1, length), dtype=torch.long, device=device)
    columns_N = torch.arange(positions, device=device)
    # attention as plain products: torch counts those on any device
    with set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        masked_lm.logits(ids_1L, torch.ones_like(ids_1L), (torch.zeros_like(columns_N), columns_N))
    return counter.get_total_flops()
