"""Sampled tokens: their weights are unbiased for every distribution, and so is a student's gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_masking import codes, entropy
from entropy_masking.losses import masked_lm_loss

DRAWS = 20_000
# vocabulary, tokens drawn, spread of the logits; the last is one-hot
DISTRIBUTIONS = [
    *((50, 12, 2.0), (50, 12, 0.0), (300, 8, 4.0), (50, 12, 12.0), (13, 12, 1.0), (50, 1, 2.0)),
    (50, 12, 1e4),
]


def grid() -> Tensor:
    """One random number for each draw, evenly spread: the mean over them is the expectation, almost exactly."""
    return (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS


def logprobs(V: int, scale: float) -> Tensor:
    return (torch.randn(1, V, generator=torch.Generator().manual_seed(V)) * scale).log_softmax(1)


@pytest.mark.parametrize(("V", "k", "scale"), DISTRIBUTIONS)
def test_the_expected_weight_of_a_token_is_its_probability(V: int, k: int, scale: float) -> None:
    exact_V = logprobs(V, scale)[0].double().exp()
    ids_NK, log_w_NK = entropy.sample(logprobs(V, scale).repeat(DRAWS, 1), k, grid())
    w_NK = log_w_NK.double().exp()
    mean_V = torch.zeros(V, dtype=torch.float64).index_add_(0, ids_NK.flatten(), w_NK.flatten()) / DRAWS
    torch.testing.assert_close(mean_V, exact_V, atol=1 / DRAWS, rtol=0)
    torch.testing.assert_close(w_NK.sum(1), torch.ones(DRAWS, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (ids_NK.sort(1).values.diff(dim=1) > 0).all(), "all tokens of a draw are different"
    assert (w_NK.diff(dim=1) <= 0).all(), "larger weights come first"


@pytest.mark.parametrize("rounded", [False, True])
def test_the_gradient_of_a_student_is_unbiased(rounded: bool) -> None:
    """Over many draws, the mean gradient is that of the whole distribution; the top k alone have another one."""
    V, k, N = 300, 12, 64
    generator = torch.Generator().manual_seed(1)
    teacher_NV = (torch.randn(N, V, generator=generator) * 2).log_softmax(1)
    student_NV = torch.randn(N, V, generator=generator) * 2
    exact_NV = student_NV.softmax(1) - teacher_NV.exp()

    def gradient(ids_NK: Tensor, logprobs_NK: Tensor) -> Tensor:
        leaf_NV = student_NV.clone().requires_grad_()
        loss_N = masked_lm_loss(leaf_NV, torch.zeros(N, dtype=torch.long), ids_NK, logprobs_NK, 1.0)
        (gradient_NV,) = torch.autograd.grad(loss_N.sum(), leaf_NV)
        return gradient_NV.double()

    draws, total_NV = 200, torch.zeros(N, V, dtype=torch.float64)
    for draw in range(draws):  # evenly spread, so that few are enough
        ids_NK, log_w_NK = entropy.sample(teacher_NV, k, torch.full((N,), (draw + 0.5) / draws, dtype=torch.float64))
        if rounded:  # as a reader of targets does
            log_w_NK = torch.from_numpy(codes.decode(codes.encode(log_w_NK.numpy()))).log_softmax(1)
        total_NV += gradient(ids_NK, log_w_NK)
    error = (total_NV / draws - exact_NV).norm() / exact_NV.norm()
    top_k = teacher_NV.topk(k)
    biased = (gradient(top_k.indices, top_k.values) - exact_NV).norm() / exact_NV.norm()
    assert error < 0.02 < 0.1 < biased


def test_score_samples_alike() -> None:
    logits_NV = torch.randn(32, 300, generator=torch.Generator().manual_seed(2)) * 3
    uniform_N = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    reduced = entropy.score(logits_NV, torch.zeros(32, dtype=torch.long), 12, uniform_N=uniform_N)
    ids_NK, log_w_NK = entropy.sample(F.log_softmax(logits_NV, 1), 12, uniform_N)
    assert torch.equal(reduced.topk_ids_NK, ids_NK)
    torch.testing.assert_close(reduced.topk_logprobs_NK, log_w_NK, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("V", "k", "scale"), [(300, 64, 10.0), (300, 12, 40.0), (33, 26, 30.0)])
def test_sharp_predictions_give_different_tokens_too(V: int, k: int, scale: float) -> None:
    """Almost all probability belongs to fewer than k tokens, and rounding decides about the others."""
    generator = torch.Generator().manual_seed(0)
    logprobs_NV = (torch.randn(5000, V, generator=generator) * scale).log_softmax(1)
    ids_NK, log_w_NK = entropy.sample(logprobs_NV, k, torch.rand(5000, dtype=torch.float64, generator=generator))
    w_NK = log_w_NK.double().exp()
    assert (ids_NK.sort(1).values.diff(dim=1) > 0).all()
    assert (w_NK.diff(dim=1) <= 1e-9).all() and (w_NK.sum(1) - 1).abs().max() < 1e-6
