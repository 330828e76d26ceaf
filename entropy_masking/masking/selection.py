"""Entropy-aware masking: scores → masked positions. Pure tensor functions; docs/training.md explains the rule.

k positions of a row are masked. ``round(h·k)`` of them are chosen by score, the others uniformly. The choice by score
takes the candidates with the highest ``r + τ·G``: r in (0, 1] is the rank of the score within the row, and G is Gumbel
noise (Gumbel top-k: Kool et al. 2019, arXiv 1903.06059). The hard share h depends on the progress of the run. h = 1 and
τ = 0 is the selection of Srinivasagan et al. (arXiv 2605.28526).

All noise is a hash of (seed, stream, epoch, sequence id, position). So the mask of a row does not depend on the batch,
the number of loader workers or ranks, or the step at which a run was resumed.

Shapes: B rows, L tokens, K masked positions of a row (or slots of them), P predicted ones.
"""

import torch
from torch import Tensor

from entropy_masking.masking.noise import HARD, SELECTION, noise
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.words import word_heads, word_sizes_and_means, words_that_fit

IGNORED = -1  # pads the positions of a row that masks fewer than K


def select_positions(
    score_BL: Tensor,
    candidates_BL: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    continues_BL: Tensor | None = None,
    progress_B: Tensor | None = None,
) -> Tensor:
    """The positions to mask.

    A row with c candidates masks max(1, round(ratio · c)) of them, at most K.

    Args:
        score_BL: any floating dtype; not read if h = 0. NaN ranks below every score.
        candidates_BL: bool; False at special tokens and padding.
        sequence_id_B: int64, the row's stable id.
        epoch_B: int64, the epoch, counted from 0.
        continues_BL: bool, the tokens that continue the word before them; the word unit needs it.
        progress_B: float64, the progress of the run at each row, 0 to 1; None means after warm-up and ramp.

    Returns:
        positions_BK: int64, ascending; a row with fewer than K ends in ``IGNORED``.

    Raises:
        ValueError: the unit is the word, and ``continues_BL`` is None.
    """
    L = candidates_BL.shape[1]
    K = policy.max_masked(L)
    if policy.unit == "token":
        continues_BL = None
    elif continues_BL is None:
        raise ValueError("the word unit needs continues_BL: which tokens continue a word")
    masked_B1 = count(policy.ratio, candidates_BL, K)
    position_L = torch.arange(L, device=candidates_BL.device)
    noise_BL = noise(policy.seed, SELECTION, epoch_B, sequence_id_B, position_L)
    noise_order_BL = noise_BL.argsort(dim=1, descending=True, stable=True)
    share_B = torch.full_like(sequence_id_B, policy.hard_share, dtype=torch.float64)
    hard_B1 = ((share_B if progress_B is None else policy.share_at(progress_B))[:, None] * masked_B1).round()
    equal_BL = torch.zeros_like(noise_BL)  # so that noise alone decides
    chosen_BL = _first(equal_BL, None, noise_order_BL, candidates_BL, masked_B1 - hard_B1, continues_BL)
    if not policy.uniform:
        score_BL, gumbel_BL = score_BL.double().nan_to_num(nan=-torch.inf), None
        if policy.temperature:
            uniform_BL = noise(policy.seed, HARD, epoch_B, sequence_id_B, position_L)
            gumbel_BL = -policy.temperature * (-uniform_BL.log()).log()
        left_BL, left_B1 = candidates_BL & ~chosen_BL, masked_B1 - chosen_BL.sum(1, keepdim=True)
        chosen_BL = chosen_BL | _first(score_BL, gumbel_BL, noise_order_BL, left_BL, left_B1, continues_BL)
    return _slots(chosen_BL, K)


def is_highest(score_BK: Tensor, real_BK: Tensor, count_B1: Tensor) -> Tensor:
    """Bool: the ``count_B1`` highest scores of each row among the real ones, ties by position. NaN comes last."""
    return _are_first(_descending(score_BK.double().nan_to_num(nan=-torch.inf), real_BK), real_BK, count_B1)


def highest(score_BK: Tensor, real_BK: Tensor, count_B1: Tensor, size: int) -> Tensor:
    """The slots of ``is_highest`` [B, size], ascending; a row with fewer ends in ``IGNORED``."""
    return _slots(is_highest(score_BK, real_BK, count_B1), size)


def count(ratio: float, candidates_BL: Tensor, max_count: int) -> Tensor:
    """max(1, round(ratio · c)) of a row with c candidates, at most ``max_count``; float64, to round as Python does."""
    count_B1 = candidates_BL.sum(1, keepdim=True).double()
    return (ratio * count_B1).round().clamp(min=1, max=max_count).minimum(count_B1)


def take(values_BK: Tensor, slots_BP: Tensor, ignored: int) -> Tensor:
    """The values at some slots [B, P], ``ignored`` where a slot is ``IGNORED``."""
    return values_BK.gather(1, slots_BP.clamp_min(0)).masked_fill(slots_BP == IGNORED, ignored)


def _slots(chosen_BL: Tensor, size: int) -> Tensor:
    """The chosen positions [B, size], ascending, then ``IGNORED``."""
    position_L = torch.arange(chosen_BL.shape[1], device=chosen_BL.device)
    slot_BL = torch.where(chosen_BL, chosen_BL.cumsum(1) - 1, size)  # the others go to an extra slot, cut off below
    slots_BK = torch.full((len(slot_BL), size + 1), IGNORED, device=slot_BL.device)
    return slots_BK.scatter(1, slot_BL, position_L.expand_as(slot_BL))[:, :size]


def _first(
    score_BL: Tensor,
    gumbel_BL: Tensor | None,
    noise_order_BL: Tensor,
    candidates_BL: Tensor,
    count_B1: Tensor,
    continues_BL: Tensor | None,
) -> Tensor:
    """The first ``count_B1`` candidates in the order of ``_order``; bool [B, L].

    With ``continues_BL``, whole words are ordered by their mean score. The noise of a word is that of its first token.
    A word that does not fit any more is skipped. Then single tokens fill the rest.
    """
    chosen_BL = torch.zeros_like(candidates_BL)
    if continues_BL is not None:
        head_BL = word_heads(candidates_BL, continues_BL)
        size_BL, mean_BL = word_sizes_and_means(score_BL, candidates_BL, head_BL)
        order_BL = _order(mean_BL, gumbel_BL, noise_order_BL, size_BL > 0)
        fits_BL = words_that_fit(size_BL.gather(1, order_BL), count_B1)
        chosen_heads_BL = chosen_BL.scatter(1, order_BL, fits_BL)
        chosen_BL = candidates_BL & chosen_heads_BL.gather(1, head_BL)
        count_B1 = count_B1 - chosen_BL.sum(1, keepdim=True)
        candidates_BL = candidates_BL & ~chosen_BL
    order_BL = _order(score_BL, gumbel_BL, noise_order_BL, candidates_BL)
    return chosen_BL | _are_first(order_BL, candidates_BL, count_B1)


def _order(score_BL: Tensor, gumbel_BL: Tensor | None, noise_order_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """All positions [B, L]: candidates first, the highest score first; the noise decides between equal scores.

    With ``gumbel_BL``, the order is that of the score's rank in the row plus ``gumbel_BL``.
    """
    key_BL = score_BL if gumbel_BL is None else _rank_share(score_BL, candidates_BL) + gumbel_BL
    order_BL = _descending(key_BL.gather(1, noise_order_BL), candidates_BL.gather(1, noise_order_BL))
    return noise_order_BL.gather(1, order_BL)


def _rank_share(score_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """The rank of each candidate's score in its row, divided by the number of candidates; ties have their mean rank."""
    values_BL = score_BL.double().masked_fill(~candidates_BL, torch.inf).contiguous()
    sorted_BL = values_BL.sort(dim=1).values
    below_BL, upto_BL = torch.searchsorted(sorted_BL, values_BL), torch.searchsorted(sorted_BL, values_BL, right=True)
    return (below_BL + upto_BL + 1) / 2 / candidates_BL.sum(1, keepdim=True).clamp_min(1)


def _descending(key_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """Positions of the candidates by key, ties by position; all others come last."""
    lowest = torch.finfo(key_BL.dtype).min  # a candidate's key stays above -inf, the key of the others
    return key_BL.clamp_min(lowest).masked_fill(~candidates_BL, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _are_first(order_BL: Tensor, candidates_BL: Tensor, count_B1: Tensor) -> Tensor:
    """Bool: the candidates among the first ``count_B1`` positions of an order."""
    place_L = torch.arange(order_BL.shape[1], device=order_BL.device)
    return candidates_BL & torch.empty_like(candidates_BL).scatter(1, order_BL, place_L < count_B1)
