"""Muon against PyTorch's in bfloat16 and against an exact reference in float32, and the parameters that it trains."""

from pathlib import Path

import pytest
import torch
from in_process import RANDOM, train_here
from torch import nn
from transformers import FunnelConfig, FunnelForMaskedLM

from train.arguments import training_arguments
from train.optimizer import Muon, hidden_matrices
from train.options import parse
from train.trainer import muon_and_adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al. 2024, the defaults of torch.optim.Muon
SMALL = FunnelConfig(vocab_size=50, block_sizes=[1], d_model=8, n_head=2, d_head=4, d_inner=16)


def test_bfloat16_equals_pytorch_to_the_bit() -> None:
    torch.manual_seed(0)
    shapes = ((16, 48), (48, 16), (8, 8))
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    rates = {"lr": 0.02, "weight_decay": 0.01}
    optimizers = Muon(ours, dtype=torch.bfloat16, **rates), torch.optim.Muon(theirs, **rates)
    for _ in range(3):
        for one, other in zip(ours[:2], theirs[:2], strict=True):  # the last one has no gradient
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"] and states[0]["state"].keys() == {0, 1}
    assert all(
        torch.equal(states[0]["state"][i]["momentum_buffer"], states[1]["state"][i]["momentum_buffer"]) for i in (0, 1)
    )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 5)])
def test_float32_against_the_singular_values(shape: tuple[int, int]) -> None:
    """The iteration keeps the singular vectors. It applies its polynomial to each singular value."""
    matrix = nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix.grad.double(), full_matrices=False)
    values = values / matrix.grad.double().norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    Muon([matrix], lr=0.5, weight_decay=0, dtype=torch.float32).step()  # the first momentum is parallel to the gradient
    update = -0.5 * max(1, shape[0] / shape[1]) ** 0.5 * (left @ values.diag() @ right)
    torch.testing.assert_close(matrix.detach().double(), update, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bf16, dtype", [("true", torch.bfloat16), ("false", torch.float32)])
def test_muon_computes_in_the_dtype_of_the_training(bf16: str, dtype: torch.dtype) -> None:
    options, flags = parse(["--shards", "S", *RANDOM, "--output-dir", "O", "--use-cpu", "--bf16", bf16], None)
    model = FunnelForMaskedLM(SMALL)
    _, arguments = muon_and_adamw(model, training_arguments(options, flags), options)
    assert arguments["muon"]["dtype"] == dtype


def test_schedulers_and_matrices_of_muon(scored: Path, tmp_path: Path) -> None:
    """Some schedulers ask the optimizer for its rate. Muon gets no bias and no table, even if it is a matrix."""
    for schedule in ("polynomial", "warmup_stable_decay"):
        flags = [*RANDOM, "--max-steps", 2, "--lr-scheduler-type", schedule]
        assert train_here(scored, tmp_path / schedule, *flags)["flags"]["muon"]
    model = FunnelForMaskedLM(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in hidden_matrices(model)} == {"weight"}
