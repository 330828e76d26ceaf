"""Predictive entropy, surprisal and top-k log-probabilities of logits. Pure tensor functions; all logs are natural.

For logits z over a vocabulary V: ``lse = logsumexp(z)``, entropy ``H = lse - Σ softmax(z)·z`` in nats (Shannon),
surprisal of token t ``lse - z_t``, log-probability of token i ``z_i - lse``. Computed in float32 whatever comes in
(float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits_NV: Tensor) -> Tensor:
    """Predictive entropy H_N in nats, between 0 and ln V; float32 (float64 for float64 logits)."""
    z_NV = _at_least_float32(logits_NV)
    return _entropy(z_NV, torch.logsumexp(z_NV, dim=-1, keepdim=True))


def score(logits_NV: Tensor, targets_N: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce logits to what a shard stores.

    Args:
        logits_NV: any floating dtype.
        targets_N: the actual tokens, int64.
        top_k: K ≤ V, may be 0.

    Returns:
        entropy_N, surprisal_N (nats), topk_ids_NK (int64, most probable first, ties to the lower id) and
        topk_logprobs_NK (natural logs under the softmax over all of V, so the tail's mass is 1 - Σ exp).
    """
    z_NV = _at_least_float32(logits_NV)
    lse_N1 = torch.logsumexp(z_NV, dim=-1, keepdim=True)
    surprisal_N = (lse_N1 - z_NV.gather(-1, targets_N[:, None])).squeeze(-1)
    ids_NK = top_k_ids(z_NV, top_k)
    return _entropy(z_NV, lse_N1), surprisal_N, ids_NK, z_NV.gather(-1, ids_NK) - lse_N1


def top_k_ids(z_NV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values of each row, largest first, ties to the lower id: independent of hardware.

    ``torch.topk`` leaves the order of ties open. A stable sort of its ids settles it among those it found; a tie that
    crosses the k-th place is rare, so only rows with one are sorted whole.
    """
    vocabulary = z_NV.shape[-1]
    values, ids = torch.topk(z_NV, min(k + 1, vocabulary), dim=-1)
    crossing_N = values[:, k - 1] == values[:, k] if 0 < k < vocabulary else None
    ids_NK = ids[:, :k].sort(dim=-1).values
    order_NK = z_NV.gather(-1, ids_NK).sort(dim=-1, descending=True, stable=True).indices
    ids_NK = ids_NK.gather(-1, order_NK)
    if crossing_N is not None and crossing_N.any():
        ids_NK[crossing_N] = z_NV[crossing_N].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids_NK


def _entropy(z_NV: Tensor, lse_N1: Tensor) -> Tensor:
    # -Σ p·(z - lse) is the same sum as lse - Σ p·z with less cancellation; -inf logits (p = 0) contribute nothing.
    log_p_NV = (z_NV - lse_N1).clamp_min_(torch.finfo(z_NV.dtype).min)
    return log_p_NV.exp().mul_(log_p_NV).sum(-1).neg_().clamp_min_(0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
