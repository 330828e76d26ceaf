"""Distillation from stored top-k log-probabilities. Pure tensor functions; nats."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation(
    logits_NV: Tensor,
    teacher_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    temperature: float = 1.0,
    temperature_lse_N: Tensor | None = None,
) -> Tensor:
    """T²·KL(teacher ‖ student), both at temperature T (Hinton et al. 2015, arXiv 1503.02531), by ``tail_kl``.

    The teacher's logits z are not kept, but its log-probabilities at T follow exactly from those at 1 and
    ``lse_T = log Σ e^{z/T} - (1/T)·log Σ e^z``: they are ``log p / T - lse_T``.

    Args:
        teacher_logprobs_NK: at temperature 1; see ``tail_kl``.
        temperature: T > 0.
        temperature_lse_N: lse_T in nats; needed unless T = 1.

    Returns:
        loss_N ≥ 0. T² keeps its gradient as large as at T = 1.
    """
    if temperature_lse_N is not None:
        teacher_logprobs_NK = teacher_logprobs_NK / temperature - temperature_lse_N[:, None]
    elif temperature != 1:
        raise ValueError(f"the teacher's log-probabilities at temperature {temperature:g} need temperature_lse_N")
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return temperature**2 * tail_kl(logits_NV / temperature, teacher_ids_NK, teacher_logprobs_NK)


def tail_kl(logits_NV: Tensor, teacher_ids_NK: Tensor, teacher_logprobs_NK: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the teacher's top K and one bucket for all other tokens.

    With teacher probabilities p and student probabilities q of the K tokens, P = Σ p and Q = Σ q::

        Σ p·log(p/q) + (1 - P)·log((1 - P)/(1 - Q))

    By the log-sum inequality a lower bound of the KL over the whole vocabulary, equal to it at K = V, and zero with
    zero gradient where student and teacher agree. Without the bucket it would be no divergence and could go negative.

    Args:
        logits_NV: the student's, any floating dtype; computed in float32 (float64 stays).
        teacher_ids_NK: int64.
        teacher_logprobs_NK: natural logs under the softmax over the whole vocabulary. Rounded storage may make P ≥ 1:
            p is renormalised then, and the bucket dropped. A row with NaN (not scored by the teacher) gives 0.

    Returns:
        kl_N ≥ 0, in nats.
    """
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    V = logits_NV.shape[1]
    K = teacher_ids_NK.shape[1]
    scored_N = ~teacher_logprobs_NK.isnan().any(1)
    log_p_NK = teacher_logprobs_NK.to(logits_NV.dtype).nan_to_num(nan=-torch.inf)
    lse_N1 = logits_NV.logsumexp(1, keepdim=True)
    log_q_NK = logits_NV.gather(1, teacher_ids_NK) - lse_N1

    mass_N1 = log_p_NK.exp().sum(1, keepdim=True)
    has_tail_N1 = mass_N1 < 1 if K < V else torch.zeros_like(mass_N1, dtype=torch.bool)
    log_p_NK = torch.where(has_tail_N1, log_p_NK, log_p_NK - mass_N1.clamp_min(1e-30).log())
    p_NK = log_p_NK.exp()
    kl_N = (p_NK * (log_p_NK.clamp_min(torch.finfo(log_p_NK.dtype).min) - log_q_NK)).sum(1)
    if K < V:
        tail_N = torch.where(has_tail_N1, 1 - mass_N1, 1).squeeze(1)
        # log(1 - Q) as a logsumexp over the other logits: 1 - Q itself would cancel
        log_rest_N = logits_NV.scatter(1, teacher_ids_NK, -torch.inf).logsumexp(1) - lse_N1.squeeze(1)
        bucket_N = tail_N * (tail_N.log() - log_rest_N)
        kl_N = kl_N + torch.where(has_tail_N1.squeeze(1), bucket_N, 0)
    # only rounding can take it below zero
    return torch.where(scored_N, kl_N, 0).clamp_min(0)
