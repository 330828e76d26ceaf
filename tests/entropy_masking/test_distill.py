"""The loss against the dense divergence in float64, where storage rounds, and its gradient against autograd's."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_masking.losses import distillation, masked_lm_loss
from entropy_masking.masking.masker import IGNORED_LABEL

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
    kl_N = distillation(student, *top(teacher, k))
    torch.testing.assert_close(kl_N, slow_tail_kl(student, *top(teacher, k)), atol=1e-9, rtol=1e-9)
    dense_N = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert (kl_N <= dense_N + 1e-12).all() and (kl_N > 0).all()


def test_it_equals_the_dense_divergence_where_nothing_is_left_out() -> None:
    teacher, student = logits(0), logits(1)
    dense_N = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    torch.testing.assert_close(distillation(student, *top(teacher, V)), dense_N, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 8, V - 1, V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_zero_where_student_and_teacher_agree(k: int, dtype: torch.dtype) -> None:
    teacher = logits(0, dtype=dtype)
    student = teacher.clone().requires_grad_()
    kl_N = distillation(student, *top(teacher, k))
    kl_N.sum().backward()
    assert kl_N.max() <= 1e-6
    assert student.grad is not None and student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 8, 64, V])
def test_gradient_is_student_minus_teacher_on_the_head(k: int) -> None:
    teacher = logits(0)
    student = logits(1).requires_grad_()
    ids_NK, log_p_NK = top(teacher, k)
    distillation(student, ids_NK, log_p_NK).sum().backward()
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
            kl_N = distillation(student, ids_NK, stored_NK)
            kl_N.sum().backward()
            assert kl_N.isfinite().all() and (kl_N >= 0).all()
            assert student.grad is not None and student.grad.isfinite().all()


def test_mass_rounded_above_one_is_renormalised() -> None:
    ids_NK = torch.tensor([[3, 5]])
    too_much_NK = torch.tensor([[0.6, 0.401]]).log()
    student = torch.full((1, V), -50.0)
    student[0, 3], student[0, 5] = np.log(0.6 / 1.001), np.log(0.401 / 1.001)
    student.requires_grad_()
    kl_N = distillation(student, ids_NK, too_much_NK)
    kl_N.sum().backward()
    assert 0 <= float(kl_N.detach()) < 1e-6
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    certain = distillation(student, torch.tensor([[3]]), torch.zeros(1, 1))
    assert float(certain.detach()) == pytest.approx(-np.log(0.6 / 1.001), abs=1e-4)


def test_a_certain_teacher_and_impossible_tokens_are_finite() -> None:
    ids_NK = torch.tensor([[7, 8]])
    log_p_NK = torch.tensor([[0.0, -torch.inf]])
    student = torch.randn(1, V).requires_grad_()
    kl_N = distillation(student, ids_NK, log_p_NK)
    kl_N.sum().backward()
    assert float(kl_N.detach()) == pytest.approx(float(-student.detach().log_softmax(1)[0, 7]), abs=1e-5)
    assert student.grad is not None and student.grad.isfinite().all()


def test_positions_without_scores_give_nothing() -> None:
    ids_NK, log_p_NK = top(logits(0, dtype=torch.float32), 4)
    log_p_NK = log_p_NK.clone()
    log_p_NK[::2] = torch.nan
    student = logits(1, dtype=torch.float32).requires_grad_()
    kl_N = distillation(student, ids_NK, log_p_NK)
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
    expected_N = T**2 * distillation(student / T, ids_NK, at_T_NK)
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


# --- the loss on masked positions: one softmax for both terms --------------------------------------------------------


def labels(ids_NK: Tensor) -> Tensor:
    """Some in the teacher's head, some outside of it, some ignored."""
    labels_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    labels_N[1::3] = ids_NK[1::3, 0]
    labels_N[::7] = IGNORED_LABEL
    return labels_N


def with_holes(ids_NK: Tensor, log_p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Through storage: some rows not scored, some with a mass above one."""
    ids_NK, log_p_NK = ids_NK.clone(), log_p_NK.half().to(log_p_NK.dtype)
    ids_NK[::5], log_p_NK[::5] = 0, torch.nan
    log_p_NK[3::5] += 0.01 - log_p_NK[3::5].logsumexp(1, keepdim=True)
    return ids_NK, log_p_NK


def plain_tail_kl(logits_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor) -> Tensor:
    """``distillation`` by autograd, with the other logits' logsumexp for log(1 - Q)."""
    scored_N = ~log_p_NK.isnan().any(1)
    log_p_NK = log_p_NK.to(logits_NV.dtype).nan_to_num(nan=-torch.inf)
    lse_N = logits_NV.logsumexp(1)
    log_q_NK = logits_NV.gather(1, ids_NK) - lse_N[:, None]
    mass_N = log_p_NK.exp().sum(1)
    has_tail_N = mass_N < 1 if ids_NK.shape[1] < V else torch.zeros_like(scored_N)
    log_p_NK = torch.where(has_tail_N[:, None], log_p_NK, log_p_NK - mass_N.clamp_min(1e-30).log()[:, None])
    kl_N = (log_p_NK.exp() * (log_p_NK.clamp_min(torch.finfo(log_p_NK.dtype).min) - log_q_NK)).sum(1)
    if ids_NK.shape[1] < V:
        tail_N = torch.where(has_tail_N, 1 - mass_N, 1)
        log_rest_N = logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1) - lse_N
        kl_N = kl_N + torch.where(has_tail_N, tail_N * (tail_N.log() - log_rest_N), 0)
    return torch.where(scored_N, kl_N, 0).clamp_min(0)


def two_losses(student_NV: Tensor, labels_N: Tensor, ids_NK: Tensor, log_p_NK: Tensor, weight: float) -> Tensor:
    ce_N = F.cross_entropy(student_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    kl_N = plain_tail_kl(student_NV, ids_NK, log_p_NK) * (labels_N != IGNORED_LABEL)
    return (1 - weight) * ce_N + weight * kl_N


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 16, V - 1, V])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_one_softmax_gives_the_two_losses_and_their_gradient(
    weight: float, scale: float, k: int, dtype: torch.dtype, off: float
) -> None:
    ids_NK, log_p_NK = with_holes(*top(logits(0, scale), k))
    student, labels_N = logits(1, scale).to(dtype).requires_grad_(), labels(ids_NK)
    upstream_N = torch.linspace(0.5, 2, N, dtype=torch.float64)
    found_N = masked_lm_loss(student, labels_N, ids_NK, log_p_NK, weight)
    (found_NV,) = torch.autograd.grad((found_N * upstream_N).sum(), student)
    exact = student.detach().double().requires_grad_()
    expected_N = two_losses(exact, labels_N, ids_NK, log_p_NK, weight)
    (expected_NV,) = torch.autograd.grad((expected_N * upstream_N).sum(), exact)
    torch.testing.assert_close(found_N.double(), expected_N, atol=off, rtol=off)
    # a logarithm of some hundred nats is rounded before it is exponentiated
    torch.testing.assert_close(found_NV.double(), expected_NV, atol=off * max(1, scale), rtol=0)
    assert (found_N[labels_N == IGNORED_LABEL] == 0).all() and (found_NV[labels_N == IGNORED_LABEL] == 0).all()


def test_its_gradient_is_that_of_finite_differences() -> None:
    ids_NK, log_p_NK = with_holes(*top(logits(0)[:8, :20], 3))
    labels_N = torch.tensor([1, int(ids_NK[1, 0]), 19, IGNORED_LABEL, 4, 5, int(ids_NK[6, 2]), 7])
    student = logits(1)[:8, :20].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: masked_lm_loss(z, labels_N, ids_NK, log_p_NK, 0.4), student)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    ids_NK, log_p_NK = top(logits(0, dtype=torch.float32), 16)
    student, labels_N = logits(1).bfloat16().requires_grad_(), labels(ids_NK)
    with torch.autocast("cpu", torch.bfloat16):
        found_N = masked_lm_loss(student, labels_N, ids_NK, log_p_NK, 0.5)
    (found_NV,) = torch.autograd.grad(found_N.sum(), student)
    wide = student.detach().float().requires_grad_()
    expected_N = two_losses(wide, labels_N, ids_NK, log_p_NK, 0.5)
    (expected_NV,) = torch.autograd.grad(expected_N.sum(), wide)
    assert found_N.dtype == torch.float32 and found_NV.dtype == torch.bfloat16
    torch.testing.assert_close(found_N, expected_N, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found_NV.float(), expected_NV, atol=1e-6, rtol=2**-8)


def test_a_temperature_and_no_teacher_take_the_plain_way() -> None:
    teacher, student = logits(0), logits(1)
    ids_NK, log_p_NK = top(teacher, 8)
    labels_N, lse_N = labels(ids_NK), lse_at(teacher, 2.0)
    ce_N = F.cross_entropy(student, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    kl_N = distillation(student, ids_NK, log_p_NK, 2.0, lse_N) * (labels_N != IGNORED_LABEL)
    found_N = masked_lm_loss(student, labels_N, ids_NK, log_p_NK, 0.25, 2.0, lse_N)
    torch.testing.assert_close(found_N, 0.75 * ce_N + 0.25 * kl_N)
    torch.testing.assert_close(masked_lm_loss(student, labels_N), ce_N)


def test_it_compiles_as_one_graph() -> None:
    ids_NK, log_p_NK = with_holes(*top(logits(0), 4))
    student, labels_N = logits(1).requires_grad_(), labels(ids_NK)
    loss = torch.compile(masked_lm_loss, fullgraph=True, backend="aot_eager")  # traced as for any other backend
    (found_NV,) = torch.autograd.grad(loss(student, labels_N, ids_NK, log_p_NK, 0.5).sum(), student)
    (expected_NV,) = torch.autograd.grad(masked_lm_loss(student, labels_N, ids_NK, log_p_NK, 0.5).sum(), student)
    torch.testing.assert_close(found_NV, expected_NV, atol=1e-12, rtol=1e-12)
