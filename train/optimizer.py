"""Muon for the weight matrices between hidden layers and AdamW for all other parameters, as one optimizer.

Muon orthogonalises the momentum of a matrix before it updates the matrix (Jordan et al. 2024; ``torch.optim.Muon``).
M and N are the rows and columns of a matrix, S and L its shorter and its longer side.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D


class Muon(torch.optim.Muon):
    """Muon that orthogonalises in ``dtype``.

    PyTorch's Muon always uses bfloat16. A processor without bfloat16 emulates it, and then Muon takes most of the time
    of a training step. The other settings, and the state in a checkpoint, are those of PyTorch.
    """

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient, as PyTorch's Muon does but for the dtype."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix_MN in group["params"]:
                if (gradient_MN := matrix_MN.grad) is None:
                    continue
                state = self.state[matrix_MN]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient_MN)
                momentum_MN = state["momentum_buffer"].lerp_(gradient_MN, 1 - momentum)
                nesterov_MN = gradient_MN.lerp(momentum_MN, momentum).to(self.dtype)
                update_MN = orthogonal(nesterov_MN, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = matrix_MN.shape
                matrix_MN.mul_(1 - rate * group["weight_decay"])
                matrix_MN.add_(update_MN, alpha=-rate * max(1, rows / columns) ** 0.5)


def orthogonal(matrix_MN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Move the singular values of a matrix close to 1, by the Newton-Schulz iteration of Muon (Jordan et al. 2024).

    Args:
        matrix_MN: (M, N) of any floating-point dtype. The result has its shape and dtype.
        coefficients: a, b and c of a step, which maps a singular value s to a·s + b·s³ + c·s⁵.
        steps: number of steps.
        eps: the least Frobenius norm by which the matrix is divided before the first step.
    """
    a, b, c = coefficients
    tall = matrix_MN.size(0) > matrix_MN.size(1)
    x_SL = matrix_MN.T if tall else matrix_MN  # so that the products are small
    x_SL = x_SL / x_SL.norm().clamp(min=eps)
    for _ in range(steps):
        gram_SS = x_SL @ x_SL.T
        polynomial_SS = torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c)
        x_SL = torch.addmm(x_SL, polynomial_SS, x_SL, beta=a)
    return x_SL.T if tall else x_SL


class MuonAdamW(Optimizer):
    """Two optimizers behind one interface, so that schedulers and checkpoints see one list of parameter groups.

    Args:
        groups: parameter groups of Trainer; AdamW trains the parameters that Muon does not train.
        matrices: the parameters for Muon.
        muon, adamw: the arguments of each optimizer.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, matrices: list[nn.Parameter], muon: dict[str, Any], **adamw: Any
    ) -> None:
        for_muon = set(map(id, matrices))
        others = [group | {"params": [p for p in group["params"] if id(p) not in for_muon]} for group in groups]
        self.adamw, self.muon = AdamW(others, **adamw), Muon(matrices, **muon)
        super().__init__(self._groups(), defaults={"lr": adamw["lr"]})  # some schedulers read it

    def _groups(self) -> list[dict[str, Any]]:
        # AdamW's groups first, because Trainer logs the learning rate of the first group
        return [*self.adamw.param_groups, *self.muon.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        self.adamw.step()
        self.muon.step()
        return loss

    def state_dict(self) -> dict[str, object]:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state_dict["adamw"])
        self.muon.load_state_dict(state_dict["muon"])
        self.param_groups = self._groups()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of the linear layers between hidden layers: no embedding, no vocabulary projection."""
    outer = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if (projection := model.get_output_embeddings()) is not None:  # type: ignore[operator]
        outer.append(projection.weight)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)} - set(map(id, outer))
    return [p for p in model.parameters() if p.requires_grad and id(p) in linear]
