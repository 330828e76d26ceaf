"""Muon for the hidden weight matrices and AdamW for everything else, as one optimizer.

Muon orthogonalises the momentum of a matrix before it updates the matrix (Jordan et al. 2024; ``torch.optim.Muon``).
It fits matrices between hidden layers only, so embeddings, the vocabulary projection, norms and biases take AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D


class MuonAdamW(Optimizer):
    """Two optimizers behind one interface: learning-rate schedulers and checkpoints see their groups as one list.

    Args:
        hidden: matrices for Muon.
        others: parameter groups for AdamW, with their ``weight_decay``.
        adamw: AdamW's arguments, with ``lr``.
        muon_learning_rate, muon_weight_decay: of Muon.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        muon_learning_rate: float,
        muon_weight_decay: float,
        adamw: dict[str, Any],
    ) -> None:
        self.adamw = AdamW(others, **adamw)
        self.muon = Muon(hidden, lr=muon_learning_rate, weight_decay=muon_weight_decay)
        super().__init__(self._groups(), defaults={"lr": adamw["lr"]})  # some schedulers read it

    def _groups(self) -> list[dict[str, Any]]:
        # AdamW's groups first, because Trainer logs the learning rate of the first group
        return [*self.adamw.param_groups, *self.muon.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        self.adamw.step()
        self.muon.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state_dict["adamw"])
        self.muon.load_state_dict(state_dict["muon"])
        self.param_groups = self._groups()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of the linear layers between hidden layers: no embedding, no vocabulary projection."""
    outer: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if (projection := model.get_output_embeddings()) is not None:  # type: ignore[operator]
        outer.append(projection.weight)
    ends = {id(weight) for weight in outer}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)} - ends
    return [p for p in model.parameters() if p.requires_grad and id(p) in linear]
