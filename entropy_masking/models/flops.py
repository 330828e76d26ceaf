"""The cost of training: multiplications and additions of matrix products and attention.

pipeline/score.py counts scoring in the same way, so the two can be added up. Torch counts a forward of any
architecture. For a BERT of l layers of width H and inner width 4·H it gives::

    encoder(L) = L · l · (24·H² + 4·L·H)      of a sequence
    head       = 2·H² + 2·H·V                 of a position

Shapes: L tokens of a sequence, N positions, V vocabulary.
"""

import torch
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from entropy_masking.models.masked_lm import MaskedLM


def training_flops(
    encoder: int, head: int, sequences: int, predicted: int, scored: int = 0, fresh: int = 0, length: int = 0
) -> int:
    """FLOPs of a run: ``sequences · (3·(encoder + predicted·head) + scored·head) + fresh · (encoder + length·head)``.

    A backward costs two forwards: the gradients of the weights and of the inputs. For a head of one product this is the
    6·N a token of arXiv 2001.08361, plus attention, with the head counted only where it runs.

    Args:
        encoder, head: from ``forward_flops``.
        sequences: the run trains on this many, counted as often as they occur.
        predicted: P, positions of a sequence that the head learns from.
        scored: K, positions of a sequence that the head scores without gradient to choose the predicted ones.
        fresh: sequences that are scored at all positions in an extra forward (``--self-refresh step``).
        length: L, tokens of a fresh sequence.
    """
    return sequences * (3 * (encoder + predicted * head) + scored * head) + fresh * (encoder + length * head)


@torch.no_grad()
def forward_flops(masked_lm: MaskedLM, length: int) -> tuple[int, int]:
    """FLOPs of a forward: of the encoder on a sequence of L tokens, and of the head at one position.

    A head that needs whole sequences counts as part of the encoder. If torch cannot count an architecture, the count is
    two for each weight and token.
    """
    try:
        one, two = (_count(masked_lm, length, positions) for positions in (1, 2))
    except Exception:  # counting traces the model, which fails on scripted code, for instance; the run continues
        projection = 0 if masked_lm.projection is None else masked_lm.projection.weight.numel()
        embedding = masked_lm.model.get_input_embeddings().weight.numel()
        weights = sum(weight.numel() for weight in masked_lm.model.parameters()) - embedding
        return 2 * length * max(0, weights - projection), 2 * (projection or embedding)
    return 2 * one - two, two - one


def _count(masked_lm: MaskedLM, length: int, positions: int) -> int:
    ids_1L = torch.zeros((1, length), dtype=torch.long, device=masked_lm.model.device)
    columns_N = torch.arange(positions, device=ids_1L.device)
    # attention as plain products, which torch counts on any device
    with set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        masked_lm.logits(ids_1L, torch.ones_like(ids_1L), (torch.zeros_like(columns_N), columns_N))
    return counter.get_total_flops()
