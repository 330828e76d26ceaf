"""The loss on masked positions: cross-entropy, and distillation from stored top-k log-probabilities. Pure; nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from entropy_masking.masking.masker import IGNORED_LABEL


def masked_lm_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_ids_NK: Tensor | None = None,
    teacher_logprobs_NK: Tensor | None = None,
    distill_weight: float | Tensor = 0.0,
    temperature: float = 1.0,
    temperature_lse_N: Tensor | None = None,
) -> Tensor:
    """``(1 - α)·CE + α·T²·KL(teacher ‖ student)`` of N masked positions.

    Args:
        logits_NV: the student's, any floating dtype; computed in float32 (float64 stays).
        labels_N: the hidden tokens, int64; a row with ``IGNORED_LABEL`` gives 0.
        teacher_ids_NK, teacher_logprobs_NK, temperature, temperature_lse_N: see ``distillation``.
        distill_weight: α, of all positions or one for each [N]; without a teacher the loss is the cross-entropy.

    Returns:
        loss_N ≥ 0, in nats.
    """
    weighted = isinstance(distill_weight, Tensor) or distill_weight > 0
    if not weighted or teacher_ids_NK is None or teacher_logprobs_NK is None:
        return F.cross_entropy(_wide(logits_NV), labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    if temperature == 1:
        α_N1 = distill_weight[:, None] if isinstance(distill_weight, Tensor) else distill_weight
        return _OneSoftmax.apply(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, α_N1)
    logits_NV = _wide(logits_NV)
    ce_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    kl_N = distillation(logits_NV, teacher_ids_NK, teacher_logprobs_NK, temperature, temperature_lse_N)
    return (1 - distill_weight) * ce_N + distill_weight * torch.where(labels_N != IGNORED_LABEL, kl_N, 0)


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
    return temperature**2 * tail_kl(_wide(logits_NV) / temperature, teacher_ids_NK, teacher_logprobs_NK)


def tail_kl(logits_NV: Tensor, teacher_ids_NK: Tensor, teacher_logprobs_NK: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the teacher's top K and one bucket for all other tokens.

    With teacher probabilities p and student probabilities q of the K tokens, P = Σ p and Q = Σ q::

        Σ p·log(p/q) + (1 - P)·log((1 - P)/(1 - Q))

    By the log-sum inequality a lower bound of the KL over the whole vocabulary, equal to it at K = V, and zero with
    zero gradient where student and teacher agree. Without the bucket it would be no divergence and could go negative.

    Args:
        logits_NV: the student's, any floating dtype; computed in float32 (float64 stays).
        teacher_ids_NK: int64, all different in a row.
        teacher_logprobs_NK: natural logs under the softmax over the whole vocabulary. Rounded storage may make P ≥ 1:
            p is renormalised then, and the bucket dropped. A row with NaN (not scored by the teacher) gives 0.

    Returns:
        kl_N ≥ 0, in nats.
    """
    logits_NV = _wide(logits_NV)
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


class _OneSoftmax(torch.autograd.Function):
    """``(1 - α)·CE + α·tail_kl``, row by row, with one softmax over [N, V] and its gradient in closed form.

    With y the label, and e the softmax over the tokens outside of the teacher's head alone, the gradient is::

        q_i - α·p_i                      in the head
        e_j·((1 - Q) - α·(1 - P))        outside of it
        less 1 - α                       at y

    So what is kept for the backward is e, which can neither overflow nor cancel, and two numbers and the head a row.
    Autograd through the two losses takes six times as long on a CPU, as it comes to [N, V] a dozen times.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, teacher_ids_NK: Tensor, teacher_logprobs_NK: Tensor, α: Any
    ) -> Tensor:
        outside_NV = logits_NV.to(_wide(logits_NV[:0]).dtype, copy=True)
        lowest = torch.finfo(outside_NV.dtype).min  # finite, so that nothing is NaN where the head is all there is
        scored_N1 = ~teacher_logprobs_NK.isnan().any(1, keepdim=True)
        labels_N1 = labels_N.clamp_min(0)[:, None]
        head_NK, label_N1 = outside_NV.gather(1, teacher_ids_NK), outside_NV.gather(1, labels_N1)
        # a row that no teacher scored has no head: all its tokens are outside
        outside_NV.scatter_(1, teacher_ids_NK, torch.where(scored_N1, lowest, head_NK))
        head_NK = torch.where(scored_N1, head_NK, -torch.inf)

        largest_N1 = outside_NV.amax(1, keepdim=True)
        e_NV = outside_NV.softmax(1)
        outside_lse_N1 = largest_N1 - e_NV.amax(1, keepdim=True).log()
        lse_N1 = torch.logaddexp(outside_lse_N1, head_NK.logsumexp(1, keepdim=True))
        log_rest_N1, log_q_NK = outside_lse_N1 - lse_N1, head_NK - lse_N1

        log_p_NK = teacher_logprobs_NK.to(e_NV.dtype).nan_to_num(nan=-torch.inf)
        mass_N1 = log_p_NK.exp().sum(1, keepdim=True)
        has_tail_N1 = mass_N1 < 1 if log_p_NK.shape[1] < e_NV.shape[1] else torch.zeros_like(scored_N1)
        p_NK = torch.where(has_tail_N1, log_p_NK, log_p_NK - mass_N1.clamp_min(1e-30).log()).exp()
        tail_N1 = torch.where(has_tail_N1, 1 - mass_N1, 0)
        kl_N1 = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(1, keepdim=True)
        kl_N1 = kl_N1 + torch.where(has_tail_N1, tail_N1 * (tail_N1.log() - log_rest_N1), 0)
        loss_N1 = (1 - α) * (lse_N1 - label_N1) + α * torch.where(scored_N1, kl_N1, 0).clamp_min(0)

        kept_N1 = labels_N[:, None] != IGNORED_LABEL
        of_e_N1 = torch.where(scored_N1, log_rest_N1.exp() - α * tail_N1, 1 - α) * kept_N1
        of_head_NK = torch.where(scored_N1, log_q_NK.exp() - α * p_NK, 0) * kept_N1
        of_label_N1 = (α - 1) * kept_N1.to(e_NV.dtype)
        ctx.save_for_backward(e_NV, of_e_N1, teacher_ids_NK, of_head_NK, labels_N1, of_label_N1)
        ctx.dtype = logits_NV.dtype
        return torch.where(kept_N1, loss_N1, 0).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor) -> tuple[Tensor | None, ...]:
        e_NV, of_e_N1, teacher_ids_NK, of_head_NK, labels_N1, of_label_N1 = ctx.saved_tensors
        grad_N1 = grads_N[0][:, None]
        grad_NV = e_NV * (of_e_N1 * grad_N1)
        grad_NV.scatter_add_(1, teacher_ids_NK, of_head_NK * grad_N1)
        grad_NV.scatter_add_(1, labels_N1, of_label_N1 * grad_N1)
        return grad_NV.to(ctx.dtype), None, None, None, None


def _wide(logits_NV: Tensor) -> Tensor:
    """As float32, in which losses are computed; float64 stays."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
