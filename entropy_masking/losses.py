"""The loss on masked positions: cross-entropy, and distillation from stored top-k log-probabilities. Pure; nats.

Shapes: N positions, K tokens that the teacher names at each (its head), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from entropy_masking.entropy import at_least_float32
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
        labels_N: the original tokens, int64; a row with ``IGNORED_LABEL`` gives 0.
        teacher_ids_NK, teacher_logprobs_NK, temperature, temperature_lse_N: see ``distillation``.
        distill_weight: α, a number or one per position [N]; without a teacher the loss is the cross-entropy.

    Returns:
        loss_N ≥ 0, in nats.
    """
    distils = isinstance(distill_weight, Tensor) or distill_weight > 0
    if not distils or teacher_ids_NK is None or teacher_logprobs_NK is None:
        return F.cross_entropy(at_least_float32(logits_NV), labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    if temperature == 1:
        return _OneSoftmax.apply(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, distill_weight)
    ce_N = F.cross_entropy(at_least_float32(logits_NV), labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    kl_N = distillation(logits_NV, teacher_ids_NK, teacher_logprobs_NK, temperature, temperature_lse_N)
    return (1 - distill_weight) * ce_N + distill_weight * torch.where(labels_N != IGNORED_LABEL, kl_N, 0)


def distillation(
    logits_NV: Tensor,
    teacher_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    temperature: float = 1.0,
    temperature_lse_N: Tensor | None = None,
) -> Tensor:
    """T²·KL(teacher ‖ student), both at temperature T (Hinton et al. 2015, arXiv 1503.02531).

    The KL is over the teacher's top K and one bucket for all other tokens. With teacher probabilities p and student
    probabilities q of the K tokens, P = Σ p and Q = Σ q::

        Σ p·log(p/q) + (1 - P)·log((1 - P)/(1 - Q))

    By the log-sum inequality this is a lower bound of the KL over the whole vocabulary. It equals that KL at K = V, and
    it is zero with zero gradient where student and teacher agree. Without the bucket it could be negative.

    The teacher's logits z are not stored. With ``lse_T = log Σ e^{z/T} - (1/T)·log Σ e^z``, its log-probabilities at T
    are exactly ``log p / T - lse_T``.

    Args:
        logits_NV: the student's, any floating dtype; computed in float32 (float64 stays).
        teacher_ids_NK: int64, all different in a row.
        teacher_logprobs_NK: natural logs under the softmax over the whole vocabulary, at temperature 1. If rounding
            makes P ≥ 1, p is renormalised and the bucket is dropped. A row with NaN (not scored) gives 0.
        temperature: T > 0.
        temperature_lse_N: lse_T in nats; needed unless T = 1.

    Returns:
        loss_N ≥ 0, in nats. The factor T² keeps the gradient as large as at T = 1.

    Raises:
        ValueError: T is not 1, and ``temperature_lse_N`` is missing.
    """
    if temperature_lse_N is not None:
        teacher_logprobs_NK = teacher_logprobs_NK / temperature - temperature_lse_N[:, None]
    elif temperature != 1:
        raise ValueError(f"the teacher's log-probabilities at temperature {temperature:g} need temperature_lse_N")
    logits_NV = at_least_float32(logits_NV) / temperature
    return temperature**2 * _OneSoftmax.apply(logits_NV, teacher_ids_NK[:, 0], teacher_ids_NK, teacher_logprobs_NK, 1.0)


class _OneSoftmax(torch.autograd.Function):
    """``(1 - α)·CE + α·KL`` at T = 1, row by row, with one softmax over [N, V] and its gradient in closed form.

    Let y be the label, and e the softmax over only the tokens outside of the teacher's head. The gradient is::

        q_i - α·p_i                      in the head
        e_j·((1 - Q) - α·(1 - P))        outside of it
        minus 1 - α                      at y

    So the backward needs e, which can neither overflow nor cancel, and for each row the values in the head and two
    numbers. Autograd through the two losses takes six times as long on a CPU, with a dozen passes over [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        teacher_ids_NK: Tensor,
        teacher_logprobs_NK: Tensor,
        weight: float | Tensor,
    ) -> Tensor:
        α = weight[:, None] if isinstance(weight, Tensor) else weight
        z_NV = logits_NV.to(at_least_float32(logits_NV[:0]).dtype, copy=True)
        lowest = torch.finfo(z_NV.dtype).min  # finite, so that nothing is NaN where all tokens are in the head
        labels_N1, kept_N1 = labels_N.clamp_min(0)[:, None], labels_N[:, None] != IGNORED_LABEL
        scored_N1 = ~teacher_logprobs_NK.isnan().any(1, keepdim=True)

        # the teacher: p in its head, 1 - P outside of it; p is 0 in a row that is not scored
        log_p_NK = torch.where(scored_N1, teacher_logprobs_NK.to(z_NV.dtype), -torch.inf)
        mass_N1 = log_p_NK.exp().sum(1, keepdim=True)
        tail_N1 = (1 - mass_N1).clamp_min(0) if log_p_NK.shape[1] < z_NV.shape[1] else torch.zeros_like(mass_N1)
        p_NK = torch.where(tail_N1 > 0, log_p_NK, log_p_NK - mass_N1.clamp_min(1e-30).log()).exp()

        # the student: log q in the head, e and log (1 - Q) outside of it; a row that is not scored has no head
        label_logit_N1, z_NK = z_NV.gather(1, labels_N1), z_NV.gather(1, teacher_ids_NK)
        outside_NV = z_NV.scatter_(1, teacher_ids_NK, torch.where(scored_N1, lowest, z_NK))  # in the memory of z_NV
        e_NV = outside_NV.softmax(1)
        outside_lse_N1 = outside_NV.amax(1, keepdim=True) - e_NV.amax(1, keepdim=True).log()
        z_NK = torch.where(scored_N1, z_NK, lowest)
        lse_N1 = torch.logaddexp(outside_lse_N1, z_NK.logsumexp(1, keepdim=True))
        log_q_NK, log_rest_N1 = z_NK - lse_N1, outside_lse_N1 - lse_N1

        ce_N1 = lse_N1 - label_logit_N1
        kl_N1 = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(1, keepdim=True)
        kl_N1 = kl_N1 + torch.where(tail_N1 > 0, tail_N1 * (tail_N1.log() - log_rest_N1), 0)
        loss_N1 = (1 - α) * ce_N1 + α * kl_N1.clamp_min(0)

        # the three lines of the gradient in the docstring of this class
        of_head_NK = (log_q_NK.exp() - α * p_NK) * kept_N1
        of_e_N1 = torch.where(scored_N1, log_rest_N1.exp() - α * tail_N1, 1 - α) * kept_N1
        of_label_N1 = (α - 1) * kept_N1.to(z_NV.dtype)
        ctx.save_for_backward(e_NV, of_e_N1, teacher_ids_NK, of_head_NK, labels_N1, of_label_N1)
        ctx.dtype = logits_NV.dtype
        return torch.where(kept_N1, loss_N1, 0).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        e_NV, of_e_N1, teacher_ids_NK, of_head_NK, labels_N1, of_label_N1 = ctx.saved_tensors
        grad_N1 = grad_N[:, None]
        grad_NV = e_NV * (of_e_N1 * grad_N1)
        grad_NV.scatter_add_(1, teacher_ids_NK, of_head_NK * grad_N1)
        grad_NV.scatter_add_(1, labels_N1, of_label_N1 * grad_N1)
        return grad_NV.to(ctx.dtype), None, None, None, None
