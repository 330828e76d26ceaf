"""Muon for the weight matrices between hidden layers and AdamW for all other parameters, as one optimizer.

Muon orthogonalises the momentum of a matrix before it updates the matrix (Jordan et al. 2024; ``torch.optim.Muon``).
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D


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
