"""Self-masking without an extra forward: running means of the student's own scores at masked positions, by token type.

A masked LM gets no loss at visible positions, so its entropy there is not a prediction. At masked positions it is, and
the training forward computes it anyway. The running mean of a type ranks the tokens of the next batches::

    mean(type) ← mean(type) + n · (mean of the n new scores - mean(type)) / (count + n)        count ≤ ``MAX_COUNT``

A type without scores has the mean of all scores of the last step. Scores are summed as whole numbers, so their sums do
not depend on how a batch is split among devices and accumulation.

Shapes: V vocabulary, B rows, L tokens, M measured positions of a row, N scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_COUNT = 20.0  # the earlier mean counts as this many scores at most
UNITS = 1 << 20  # per nat: sums of integers are exact in any order


class TypeMeans:
    """The running mean score of each token type, in nats, on the device that trains.

    Args:
        reduce: maps the sums of one rank to the sums over all ranks.
    """

    def __init__(self, vocab_size: int, device: torch.device, reduce: Callable[[Tensor], Tensor]) -> None:
        self.reduce = reduce
        self.mean_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.count_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.fallback = torch.zeros((), dtype=torch.float64, device=device)  # mean of a type without scores
        self._sums_2V = torch.zeros((2, vocab_size), dtype=torch.int64, device=device)  # Σ score, n
        self._step: int | None = None  # the step that the sums come from

    def add(self, step: int, tokens_BM: Tensor, score_BM: Tensor) -> None:
        """Add the scores of masked tokens; negative tokens and non-finite scores do not count."""
        valid_N = ((tokens_BM >= 0) & score_BM.isfinite()).flatten()
        token_N = tokens_BM.flatten().clamp_min(0)
        units_N = (score_BM.flatten().double().nan_to_num(0.0, 0.0, 0.0) * UNITS).round().long() * valid_N
        self._sums_2V[0].scatter_add_(0, token_N, units_N)
        self._sums_2V[1].scatter_add_(0, token_N, valid_N.long())
        self._step = step

    def update(self, before: int | None = None) -> None:
        """Add the sums to the means if they come from a step before ``before`` (None: from any step).

        All ranks must call this at the same step.
        """
        if self._step is None or (before is not None and self._step >= before):
            return
        sums_2V = self.reduce(self._sums_2V)
        sum_V, n_V = sums_2V[0].double() / UNITS, sums_2V[1].double()
        self.mean_V += (sum_V - n_V * self.mean_V) / (self.count_V + n_V).clamp_min(1)
        self.count_V = (self.count_V + n_V).clamp_max(MAX_COUNT)
        total = n_V.sum()
        self.fallback = torch.where(total > 0, sum_V.sum() / total.clamp_min(1), self.fallback)
        self._clear()

    def scores_of(self, ids_BL: Tensor) -> Tensor:
        """The scores of tokens [B, L], float64, in nats."""
        return torch.where(self.count_V > 0, self.mean_V, self.fallback)[ids_BL]

    def state(self) -> dict[str, Tensor]:
        """The state that a resumed run needs."""
        self.update()
        return {"mean_V": self.mean_V, "count_V": self.count_V, "fallback": self.fallback}

    def load(self, state: dict[str, Tensor]) -> None:
        self._clear()
        device = self.mean_V.device
        self.mean_V, self.count_V = state["mean_V"].to(device), state["count_V"].to(device)
        self.fallback = state["fallback"].to(device)

    def _clear(self) -> None:
        self._sums_2V.zero_()
        self._step = None
