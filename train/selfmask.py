"""Cheap self-masking: scores of a part of the positions, kept until a sequence's next visit.

The training forward has the hidden states of the positions that are not masked anyway. At a rotating share of them the
head says how unsure the student is, without gradient (``train.student``), and what it says ranks the tokens when the
sequence comes again. A score is kept as three terms, nats all of them::

    score(sequence, position) ≈ level + mean of its token type + share · what was left when it was scored

The level is the mean of a step's scores, the types' means are relative to it, and ``share`` is how much of a rest is
found again, by least squares over the positions scored twice. So scores age well while the student learns,
and a sequence that was never seen is ranked by its tokens' types.

Only what is visible can be scored, so a token that is always masked would stay what it was once taken for. Therefore
a position whose turn it is to be scored is not masked in that visit: every type is measured all the time, and every
position once in so many visits.

All of it is on the host, in step with the visits in a canonical order: the same for any split of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.manifests import ShardEntry
from train.masking import IGNORED
from train.noise import hashes

SHARE_RATE = 0.05  # of the moving sums behind the share, a step
MOST_COUNTED = 2.0  # a type's mean is a running one over so many scores at most
TURN_SEED = 0


def turns(sequence_id_B: Tensor, visit_B: Tensor, length: int, every: int) -> Tensor:
    """Whose turn it is to be scored: positions_BR, R = ⌈L / every⌉, ``IGNORED`` past a sequence's end.

    Position p's turn comes at the visits v with p = v - hash(sequence) mod ``every``.
    """
    first_B = (visit_B - hashes(TURN_SEED, of_N=sequence_id_B)) % every
    position_BR = first_B[:, None] + every * torch.arange(-(-length // every), device=visit_B.device)
    return torch.where(position_BR < length, position_BR, IGNORED)


class ScoreMemory:
    """The scores of a run's sequences as they were last seen; 2 bytes a token.

    Args:
        every: a position is scored at one in so many visits.
    """

    def __init__(self, rows: int, length: int, vocab_size: int, every: int) -> None:
        self.every = every
        self.rest_NL = torch.full((rows, length), torch.nan, dtype=torch.float16)  # NaN: never scored
        self.mean_V = torch.zeros(vocab_size, dtype=torch.float64)
        self.count_V = torch.zeros(vocab_size, dtype=torch.float64)
        self.level = torch.tensor(torch.nan, dtype=torch.float64)
        self.products = torch.zeros(2, dtype=torch.float64)  # Σ before · now, Σ before²

    def estimate(self, row_B: Tensor, ids_BL: Tensor) -> Tensor:
        """Scores [B, L] float32 of some sequences, by what is kept of them."""
        rest_BL = self.rest_NL[row_B].double().nan_to_num(nan=0.0)
        return (self.level.nan_to_num(nan=0.0) + self.mean_V[ids_BL] + self.share() * rest_BL).float()

    def share(self) -> Tensor:
        """How much of a rest is found again; 1 until it is known."""
        both, before = self.products
        return (both / before).clamp(0, 1) if before > 0 else torch.ones((), dtype=torch.float64)

    def update(self, row_B: Tensor, ids_BL: Tensor, scored_BR: Tensor, score_BR: Tensor) -> None:
        """Take in the scores of one step, of sequences that are all different, at positions or ``IGNORED``."""
        V = len(self.mean_V)
        scored = scored_BR != IGNORED
        row_M, position_M = row_B[:, None].expand_as(scored_BR)[scored], scored_BR[scored]
        token_M, score_M = ids_BL.gather(1, scored_BR.clamp_min(0))[scored], score_BR[scored].double()
        if not len(score_M):
            return
        self.level = score_M.mean()
        relative_M = score_M - self.level
        count_V = torch.bincount(token_M, minlength=V).double()
        sum_V = torch.bincount(token_M, weights=relative_M, minlength=V)
        self.mean_V += (sum_V - count_V * self.mean_V) / (self.count_V + count_V).clamp_min(1)
        self.count_V = (self.count_V + count_V).clamp_max(MOST_COUNTED)
        rest_M, before_M = relative_M - self.mean_V[token_M], self.rest_NL[row_M, position_M].double()
        again_M = ~before_M.isnan()
        products = torch.stack([(before_M * rest_M)[again_M].sum(), before_M[again_M].square().sum()])
        self.products = (1 - SHARE_RATE) * self.products + products
        self.rest_NL[row_M, position_M] = rest_M.half()

    def kept(self, row_B: Tensor, ids_BL: Tensor) -> Tensor:
        """As ``estimate``, NaN where a position was never scored."""
        return self.estimate(row_B, ids_BL).masked_fill(self.rest_NL[row_B].isnan(), torch.nan)

    def state(self) -> dict[str, Tensor]:
        names = ("rest_NL", "mean_V", "count_V", "level", "products")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Visited:
    """What a run keeps of the sequences that it has visited: their last masks and, with a memory, scores.

    Args:
        entries: the shards that the run trains on.
        masked: K, positions that are masked of a sequence.
    """

    def __init__(self, entries: list[ShardEntry], masked: int, memory: ScoreMemory | None) -> None:
        self.memory = memory
        self.first_S = np.zeros(max(entry.index for entry in entries) + 1, np.int64)
        rows = 0
        for entry in entries:
            self.first_S[entry.index] = rows
            rows += entry.rows
        self.last_NK = torch.full((rows, masked), IGNORED, dtype=torch.int16)
        self._pending: list[tuple[int, dict[str, Tensor], Any]] = []

    def rows_of(self, sequence_id_B: np.ndarray) -> Tensor:
        """Where the sequences are kept: a number from 0 for each row of the shards, in order."""
        return torch.from_numpy(self.first_S[sequence_id_B >> 32] + (sequence_id_B & 0xFFFFFFFF))

    def note(self, step: int, visit: dict[str, Tensor]) -> None:
        """Remember a visit for later: on a GPU it is on its way, and nobody waits for it.

        Args:
            visit: sequence_id and epoch [B], positions_BK, and with a memory input_ids [B, L] as they are, scored_BR
                and score_BR; of all ranks, so that all of them keep the same.
        """
        copied = None
        on_host = {name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in visit.items()}
        if visit["positions_BK"].is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append((step, on_host, copied))

    def absorb(self, before: int | None = None) -> None:
        """Take in the visits of the steps before, whole steps in the order of (epoch, sequence), however split."""
        while self._pending and (before is None or self._pending[0][0] < before):
            step = self._pending[0][0]
            visits = [each for each in self._pending if each[0] == step]
            self._pending = self._pending[len(visits) :]
            for _, _, copied in visits:
                if copied is not None:
                    copied.synchronize()
            visit = {name: torch.cat([each[name] for _, each, _ in visits]) for name in visits[0][1]}
            visit["row"] = self.rows_of(visit["sequence_id"].numpy())
            order_B = torch.from_numpy(np.lexsort((visit["row"].numpy(), visit["epoch"].numpy())))
            visit = {name: tensor[order_B] for name, tensor in visit.items()}
            # a step may reach into the next epoch, and so see a sequence twice
            for epoch in visit["epoch"].unique().tolist():
                part = {name: tensor[visit["epoch"] == epoch] for name, tensor in visit.items()}
                self.last_NK[part["row"]] = part["positions_BK"].short()
                if self.memory:
                    names = ("row", "input_ids", "scored_BR", "score_BR")
                    self.memory.update(*(part[name] for name in names))

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, once the visits so far are taken in."""
        self.absorb()
        return {"last_NK": self.last_NK} | (self.memory.state() if self.memory else {})

    def load(self, state: dict[str, Tensor]) -> None:
        self._pending = []
        self.last_NK = state.pop("last_NK")
        if self.memory:
            self.memory.load(state)
