"""Predictive entropy, surprisal, top-k and sampled log-probabilities of logits. Pure; all logs are natural.

For logits z over a vocabulary V: ``lse = logsumexp(z)``, entropy ``H = lse - Σ softmax(z)·z`` in nats (Shannon),
surprisal of token t ``lse - z_t``, log-probability of token i ``z_i - lse``. Computation is in float32, or in float64
for float64 logits.

Shapes: N positions, V vocabulary, K best tokens, T temperatures, G groups of tokens, C candidates for the best.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_masking.mkl import choose_kernels

GROUP = 64  # ids of a group; the top k lie in the k groups with the largest maxima
MARGIN = 1e-6  # a token is certain if it is drawn with a probability above 1 - MARGIN: rounding might draw it twice
NEGLIGIBLE = 1e-9  # tokens that together have a smaller probability are not drawn at random
IN_CACHE = 1 << 17  # logits that fit into the cache of a CPU core; the reduction passes over them several times

choose_kernels()  # before any computation in threads


class Reduced(NamedTuple):
    """The values that a shard stores for the logits of N positions; nats.

    ``lse_NT`` has a column for each temperature T: ``log Σ e^{z/T} - (1/T)·log Σ e^z``, so that the log-probabilities
    at T are ``log p / T - lse``.
    """

    entropy_N: Tensor
    surprisal_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor
    lse_NT: Tensor


def entropy_and_surprisal(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy H_N, between 0 and ln V, and the surprisal_N of the tokens ``targets_N`` (int64), in nats.

    Both are float32, or float64 for float64 logits.
    """
    z_NV = at_least_float32(logits_NV)
    entropy_N, lse_N1 = _entropy_and_lse(z_NV)
    return entropy_N, (lse_N1 - z_NV.gather(-1, targets_N[:, None])).squeeze(-1)


def score(
    logits_NV: Tensor,
    targets_N: Tensor,
    top_k: int,
    temperatures: Sequence[float] = (),
    uniform_N: Tensor | None = None,
) -> Reduced:
    """Reduce logits to the values that a shard stores.

    Args:
        logits_NV: any floating dtype.
        targets_N: the actual tokens, int64.
        top_k: K ≤ V, may be 0; for a sample 0 < K < V.
        temperatures: T ≠ 1 at which the top k can be computed later.
        uniform_N: random numbers in (0, 1), float64. If given, the K tokens are sampled.

    Returns:
        entropy_N, surprisal_N (nats), topk_ids_NK (int64, most probable first, ties to the lower id),
        topk_logprobs_NK (natural logs under the softmax over all of V, so the tail's mass is 1 - Σ exp), and lse_NT. Of
        a sample, topk_* are what ``sample`` returns.
    """
    z_NV = at_least_float32(logits_NV)
    entropy_N, lse_N1 = _entropy_and_lse(z_NV)
    surprisal_N = (lse_N1 - z_NV.gather(-1, targets_N[:, None])).squeeze(-1)
    if uniform_N is None:
        ids_NK = top_k_ids(z_NV, top_k)
        logprobs_NK = z_NV.gather(-1, ids_NK) - lse_N1
    else:
        ids_NK, logprobs_NK = sample(z_NV - lse_N1, top_k, uniform_N)
    max_N1 = z_NV.amax(-1, keepdim=True) if temperatures else lse_N1
    at_T = [((z_NV - max_N1) / t).exp_().sum(-1, keepdim=True).log() + (max_N1 - lse_N1) / t for t in temperatures]
    lse_NT = torch.cat([lse_N1[:, :0], *at_T], dim=-1)
    return Reduced(entropy_N, surprisal_N, ids_NK, logprobs_NK, lse_NT)


def sample(logprobs_NV: Tensor, k: int, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """K different tokens of each row, and weights w with ``E[w_i] = p_i`` for every token i (0 if it is not drawn).

    So a student that distils w has the gradient of the whole distribution in expectation (random sampling for
    distillation: Anshumann et al. 2025, arXiv 2503.16870). Token i is drawn with probability ``min(1, p_i/τ)``, without
    replacement, by systematic sampling (Madow 1949). τ is such that these probabilities sum to K. A drawn token has the
    weight ``max(p_i, τ)``. The weights sum to 1.

    Args:
        logprobs_NV: float32, natural logs.
        k: K < V.
        uniform_N: one number in (0, 1) for each row, float64; the same number always draws the same tokens.

    Returns:
        ids_NK (int64, those with larger weights first, ties to the lower id), and the logarithms of the weights [N, K].
    """
    return _in_parts(partial(_sample_at_once, k), logprobs_NV, uniform_N)


def _sample_at_once(k: int, logprobs_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    place_K = torch.arange(k, device=logprobs_NV.device)
    p_NV = logprobs_NV.exp()
    top_NK = top_k_ids(logprobs_NV, k)
    p_NK = p_NV.gather(1, top_NK).double()
    from_here_NK = p_NV.sum(1, keepdim=True, dtype=torch.float64) - p_NK.cumsum(1) + p_NK  # without the better tokens
    # a token is certain if the better ones are, and if it would get at least one of the draws that remain
    enough_NK = (p_NK * (k - place_K) >= from_here_NK * (1 - MARGIN)) | (from_here_NK < NEGLIGIBLE)
    certain_NK = enough_NK.cummin(1).values
    certain_N1 = certain_NK.sum(1, keepdim=True)
    p_NV.scatter_(1, top_NK, torch.where(certain_NK, 0, p_NK).to(p_NV.dtype))
    cumulative_NV = p_NV.cumsum(1, dtype=torch.float64)
    tau_N1 = cumulative_NV[:, -1:] / (k - certain_N1).clamp_min(1)
    point_NK = (uniform_N[:, None] + place_K - certain_N1) * tau_N1
    drawn_NK = torch.searchsorted(cumulative_NV, point_NK).clamp_max(p_NV.shape[1] - 1)
    weight_NK = torch.where(certain_NK, p_NK, tau_N1)
    return torch.where(certain_NK, top_NK, drawn_NK), weight_NK.log().to(logprobs_NV.dtype)


def top_k_ids(z_NV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values of each row, largest first, ties to the lower id: independent of hardware.

    ``torch.topk`` leaves the order of ties open and takes longer than the softmax. So neighbouring ids form groups,
    which are ranked by their largest value, ties to the lower ids. The k best ids lie in the k best groups, because
    each of these groups has an id that is better than all ids of the other groups. Only the ids of the k groups are
    sorted.
    """
    V = z_NV.shape[-1]
    groups = V // GROUP
    if groups <= 2 * k or z_NV.dtype != torch.float32:
        return z_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    largest_NG = z_NV[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(-1)
    if groups * GROUP < V:  # the remaining ids are a group too
        largest_NG = torch.cat([largest_NG, z_NV[:, groups * GROUP :].amax(-1, keepdim=True)], dim=1)
    group_NK = _best(largest_NG, torch.arange(largest_NG.shape[1], device=z_NV.device).expand_as(largest_NG), k)
    ids_NC = (group_NK[:, :, None] * GROUP + torch.arange(GROUP, device=z_NV.device)).flatten(1)
    values_NC = z_NV.gather(-1, ids_NC.clamp_max(V - 1)).masked_fill(ids_NC >= V, -torch.inf)
    return _best(values_NC, ids_NC, k)


def _best(values_NC: Tensor, ids_NC: Tensor, k: int) -> Tensor:
    """The ids [N, k] of the k largest float32 values, largest first, ties to the lower id."""
    # read as integers, the bits of floats sort like the floats, if all bits but the sign of negative ones are flipped;
    # + 0 turns -0 into 0
    bits_NC = (values_NC + 0.0).view(torch.int32)
    bits_NC = bits_NC ^ ((bits_NC >> 31) & 0x7FFFFFFF)
    key_NC = (bits_NC.long() << 32) | (0xFFFFFFFF - ids_NC)
    return 0xFFFFFFFF - (key_NC.topk(k, dim=-1).values & 0xFFFFFFFF)


def _entropy_and_lse(z_NV: Tensor) -> tuple[Tensor, Tensor]:
    """H_N and logsumexp_N1 with one exponential: ``log Σ e^d - Σ e^d·d / Σ e^d`` with d = z - max, two terms ≥ 0."""
    return _in_parts(_entropy_and_lse_at_once, z_NV)


def _in_parts(compute: Callable[..., tuple[Tensor, Tensor]], z_NV: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """``compute`` on tensors of N rows: on a CPU in parts that fit into its cache."""
    if z_NV.device.type != "cpu":
        return compute(z_NV, *others)
    rows = max(1, IN_CACHE // z_NV.shape[-1]) * torch.get_num_threads()
    # at least as many rows as threads: threads would split the sum of a single row, which rounds differently
    parts = [tensor.tensor_split(max(1, len(z_NV) // rows)) for tensor in (z_NV, *others)]
    one, other = zip(*map(compute, *parts), strict=True)
    return torch.cat(one), torch.cat(other)


def _entropy_and_lse_at_once(z_NV: Tensor) -> tuple[Tensor, Tensor]:
    max_N1 = z_NV.amax(-1, keepdim=True)
    d_NV = (z_NV - max_N1).clamp_min_(torch.finfo(z_NV.dtype).min)  # -inf logits (p = 0) contribute nothing
    e_NV = d_NV.exp()
    sum_N1 = e_NV.sum(-1, keepdim=True)
    log_sum_N1 = sum_N1.log()
    return (log_sum_N1 - e_NV.mul_(d_NV).sum(-1, keepdim=True) / sum_N1).squeeze(-1), max_N1 + log_sum_N1


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, in which all values are computed; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
