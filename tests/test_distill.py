"""The distillation loss against the dense divergence in float64, and where storage rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train.distill import distillation, tail_kl

N, V = 64, 300


def logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def top(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_p = logits_NV.log_softmax(1).topk(k)
    return log_p.indices, log_p.values


def slow_tail_kl(student_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor) -> Tensor:
    """The formula, row by row."""
    rows = []
    for student_V, ids_K, log_p_K in zip(student_NV.softmax(1), ids_NK, log_p_NK, strict=True):
        p, q = log_p_K.exp(), student_V[ids_K]
        rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
        rows.append((p * (p / q).log()).sum() + rest_p * (rest_p / rest_q).log())
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 4, 16, 100])
def test_it_is_the_divergence_with_one_bucket_for_the_tail(k: int) -> None:
    teacher, student = logits(0), logits(1)
    kl_N = tail_kl(student, *top(teacher, k))
    torch.testing.assert_close(kl_N, slow_tail_kl(student, *top(teacher, k)), atol=1e-9, rtol=1e-9)
    dense_N = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert (kl_N <= dense_N + 1e-12).all() and (kl_N > 0).all()


def test_it_equals_the_dense_divergence_where_nothing_is_left_out() -> None:
    teacher, student = logits(0), logits(1)
    dense_N = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    torch.testing.assert_close(tail_kl(student, *top(teacher, V)), dense_N, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 8, V - 1, V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_zero_where_student_and_teacher_agree(k: int, dtype: torch.dtype) -> None:
    teacher = logits(0, dtype=dtype)
    student = teacher.clone().requires_grad_()
    kl_N = tail_kl(student, *top(teacher, k))
    kl_N.sum().backward()
    assert kl_N.max() <= 1e-6
    assert student.grad is not None and student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 8, 64, V])
def test_gradient_is_student_minus_teacher_on_the_head(k: int) -> None:
    teacher = logits(0)
    student = logits(1).requires_grad_()
    ids_NK, log_p_NK = top(teacher, k)
    tail_kl(student, ids_NK, log_p_NK).sum().backward()
    q_NV = student.detach().softmax(1)
    expected_NK = q_NV.gather(1, ids_NK) - log_p_NK.exp()
    torch.testing.assert_close(student.grad.gather(1, ids_NK), expected_NK, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(N, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 4, 16, V])
def test_it_is_never_negative_nor_nan_through_float16_storage(scale: float, k: int) -> None:
    for seed in range(20):
        teacher = logits(seed, scale, torch.float32)
        ids_NK, log_p_NK = top(teacher, k)
        stored_NK = torch.from_numpy(log_p_NK.numpy().astype(np.float16).astype(np.float32))
        for student in (teacher, logits(seed + 100, scale, torch.float32)):
            student = student.clone().requires_grad_()
            kl_N = tail_kl(student, ids_NK, stored_NK)
            kl_N.sum().backward()
            assert kl_N.isfinite().all() and (kl_N >= 0).all()
            assert student.grad is not None and student.grad.isfinite().all()


def test_mass_rounded_above_one_is_renormalised() -> None:
    ids_NK = torch.tensor([[3, 5]])
    too_much_NK = torch.tensor([[0.6, 0.401]]).log()
    student = torch.full((1, V), -50.0)
    student[0, 3], student[0, 5] = np.log(0.6 / 1.001), np.log(0.401 / 1.001)
    student.requires_grad_()
    kl_N = tail_kl(student, ids_NK, too_much_NK)
    kl_N.sum().backward()
    assert 0 <= float(kl_N.detach()) < 1e-6
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    certain = tail_kl(student, torch.tensor([[3]]), torch.zeros(1, 1))
    assert float(certain.detach()) == pytest.approx(-np.log(0.6 / 1.001), abs=1e-4)


def test_a_certain_teacher_and_impossible_tokens_are_finite() -> None:
    ids_NK = torch.tensor([[7, 8]])
    log_p_NK = torch.tensor([[0.0, -torch.inf]])
    student = torch.randn(1, V).requires_grad_()
    kl_N = tail_kl(student, ids_NK, log_p_NK)
    kl_N.sum().backward()
    assert float(kl_N.detach()) == pytest.approx(float(-student.detach().log_softmax(1)[0, 7]), abs=1e-5)
    assert student.grad is not None and student.grad.isfinite().all()


def test_positions_without_scores_give_nothing() -> None:
    ids_NK, log_p_NK = top(logits(0, dtype=torch.float32), 4)
    log_p_NK = log_p_NK.clone()
    log_p_NK[::2] = torch.nan
    student = logits(1, dtype=torch.float32).requires_grad_()
    kl_N = tail_kl(student, ids_NK, log_p_NK)
    kl_N.sum().backward()
    assert (kl_N[::2] == 0).all() and (kl_N[1::2] > 0).all()
    assert student.grad is not None and (student.grad[::2] == 0).all() and student.grad.isfinite().all()


# --- temperature -----------------------------------------------------------------------------------------------------


def lse_at(logits_NV: Tensor, T: float) -> Tensor:
    return (logits_NV / T).logsumexp(1) - logits_NV.logsumexp(1) / T


@pytest.mark.parametrize("T", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("k", [1, 16, V])
def test_at_a_temperature_it_is_the_divergence_of_both_at_that_temperature(T: float, k: int) -> None:
    teacher, student = logits(0), logits(1)
    ids_NK, log_p_NK = top(teacher, k)
    found_N = distillation(student, ids_NK, log_p_NK, T, lse_at(teacher, T))
    at_T_NK = (teacher / T).log_softmax(1).gather(1, ids_NK)
    expected_N = T**2 * tail_kl(student / T, ids_NK, at_T_NK)
    torch.testing.assert_close(found_N, expected_N, atol=1e-9, rtol=1e-9)
    if k == V:
        dense_N = F.kl_div(
            (student / T).log_softmax(1), (teacher / T).log_softmax(1), reduction="none", log_target=True
        )
        torch.testing.assert_close(found_N, T**2 * dense_N.sum(1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("k", [1, 16, V])
@pytest.mark.parametrize("stored", [False, True])
def test_a_student_that_agrees_has_nothing_to_learn_at_any_temperature(T: float, k: int, stored: bool) -> None:
    """Exactly in float64; as far as float16 tells them apart through storage, where the gradient is one of rounding."""
    teacher = logits(0)
    ids_NK, log_p_NK = top(teacher, k)
    lse_N = lse_at(teacher, T)
    if stored:
        log_p_NK, lse_N = log_p_NK.half().double(), lse_N.half().double()
    student = teacher.clone().requires_grad_()
    loss_N = distillation(student, ids_NK, log_p_NK, T, None if T == 1 else lse_N)
    loss_N.sum().backward()
    assert student.grad is not None and (loss_N >= 0).all()
    off = 2e-3 if stored else 1e-12  # a half of 2 to 4 is off by 2^-10 at most
    assert float(loss_N.detach().max()) <= off * T**2
    assert float(student.grad.abs().max()) <= off * T


def test_a_temperature_keeps_the_size_of_the_gradient() -> None:
    teacher, student = logits(0, 0.01), logits(1, 0.01)
    norms = []
    for T in (1.0, 5.0):
        student = student.detach().requires_grad_()
        distillation(student, *top(teacher, V), T, lse_at(teacher, T)).sum().backward()
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_a_temperature_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="temperature 2 need"):
        distillation(logits(1), *top(logits(0), 4), 2.0)
