"""Log-probabilities in 8 bits: how far they are from the exact ones, and what that changes in distillation."""

import numpy as np
import pytest
import torch

from entropy_masking import codes
from entropy_masking.losses import distillation

V, K = 2000, 12


def top(sharpness: float) -> torch.Tensor:
    """Log-probabilities [N, K] of the most probable tokens: of flat, medium or sharp predictions."""
    logits_NV = torch.randn(4000, V, generator=torch.Generator().manual_seed(0)) * sharpness
    return logits_NV.log_softmax(1).topk(K).values


@pytest.mark.parametrize(("sharpness", "divergence"), [(1.0, 1e-4), (2.0, 1e-4), (4.0, 2e-4)])
def test_rounding_is_at_most_half_a_step_and_hardly_changes_the_distribution(
    sharpness: float, divergence: float
) -> None:
    exact_NK = top(sharpness).numpy()
    found_NK = codes.decode(codes.encode(exact_NK))
    assert found_NK.dtype == np.float32 and codes.encode(exact_NK).dtype == np.uint8
    assert (np.abs(found_NK - exact_NK) <= codes.rounding(found_NK) + 1e-6).all()
    # the exact distribution as the student: KL(rounded || exact), with a bucket for all other tokens
    exact, rounded, N = torch.from_numpy(exact_NK).double(), torch.from_numpy(found_NK).double(), len(exact_NK)
    rest_N1 = torch.log1p(-exact.exp().sum(1, keepdim=True))
    student_NV = torch.cat([exact, rest_N1], 1)
    kl_N = distillation(student_NV, torch.arange(K).expand(N, K), rounded)
    assert 0 < kl_N.mean() <= divergence


def test_all_codes_and_special_values() -> None:
    values = codes.LOGPROBS[:-1]
    assert (codes.decode(codes.encode(values)) == values).all()
    assert codes.rounding(values[values >= -1]).max() < 1 / 64
    assert np.isnan(codes.decode(codes.encode(np.full((2, 3), np.nan)))).all()
    ends = np.array([[1e-6, -14.1, -90.0], [0.0, -1e-9, -np.inf]], np.float32)
    assert codes.decode(codes.encode(ends)).tolist() == [[0.0, -np.inf, -np.inf], [0.0, 0.0, -np.inf]]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_tensors_are_decoded_alike(kind: torch.dtype) -> None:
    """``datasets`` gives the column as int64."""
    differences = codes.encode(np.concatenate([top(3.0).numpy(), np.full((1, K), np.nan)]))
    found = codes.decode_tensor(torch.from_numpy(differences).to(kind))
    np.testing.assert_array_equal(found.numpy(), codes.decode(differences))
    damaged = torch.full((1, 3), 200, dtype=kind)
    np.testing.assert_array_equal(codes.decode_tensor(damaged).numpy(), codes.decode(damaged.numpy()))
