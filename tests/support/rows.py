"""Rows to mask, and slow references of the selection."""

import math
from typing import Any

import torch
from torch import Tensor

from entropy_masking.masking.noise import SELECTION, noise
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED

L, K = 32, 4  # round(0.15 · 30), half to even
PAD, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 200


def keys(rows: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) + (7 << 32), torch.full((rows,), epoch)


def candidates(rows: int, length: int = L) -> Tensor:
    inner = torch.ones(rows, length, dtype=torch.bool)
    inner[:, 0] = inner[:, -1] = False
    return inner


def entropies(rows: int, length: int = L) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) * 8


def as_sets(positions_BK: Tensor) -> list[set[int]]:
    return [{p for p in row if p != IGNORED} for row in positions_BK.tolist()]


def slow_paper(
    score_BL: Tensor, candidates_BL: Tensor, sequence_B: Tensor, epoch_B: Tensor, policy: MaskPolicy
) -> list[set[int]]:
    """The selection of arXiv 2605.28526: the highest scores, ties by noise, then by position."""
    noise_BL = noise(policy.seed, SELECTION, epoch_B, sequence_B, torch.arange(score_BL.shape[1]))
    chosen = []
    for score, candidate, draw in zip(score_BL.tolist(), candidates_BL.tolist(), noise_BL.tolist(), strict=True):
        places = [p for p, is_candidate in enumerate(candidate) if is_candidate and not math.isnan(score[p])]
        places.sort(key=lambda p, score=score, draw=draw: (-score[p], -draw[p], p))
        count = sum(candidate)
        chosen.append(set(places[: min(max(1, round(policy.ratio * count)), count)]))
    return chosen


def words_of(candidate: list[bool], continues: list[bool], without: set[int] = frozenset()) -> list[list[int]]:
    """Positions word by word: a candidate outside ``without``, and the tokens after it that continue its word."""
    words: list[list[int]] = []
    for position, is_candidate in enumerate(candidate):
        if is_candidate and position not in without:
            if continues[position] and words and words[-1][-1] == position - 1:
                words[-1].append(position)
            else:
                words.append([position])
    return words


def slow_words(
    score: list[float],
    candidate: list[bool],
    continues: list[bool],
    draw: list[float],
    hard_draw: list[float],
    policy: MaskPolicy,
) -> set[int]:
    """The documented rule, word after word: first the uniform part, then the hard part of the rest."""
    score = [-math.inf if math.isnan(h) else h for h in score]
    count = sum(candidate)
    left = min(count, max(1, round(policy.ratio * count)), policy.max_masked(len(score)))
    chosen: set[int] = set()

    def fill(room: int, key_of_words: Any, key_of_tokens: Any) -> None:
        """Keys: from scores by place to what is sorted by, ascending."""
        words = words_of(candidate, continues, chosen)
        key = key_of_words({word[0]: sum(score[p] for p in word) / len(word) for word in words})
        for word in sorted(words, key=lambda w: key(w[0])):
            if len(chosen) + len(word) <= room:
                chosen.update(word)
        tokens = [p for p, is_candidate in enumerate(candidate) if is_candidate and p not in chosen]
        tokens.sort(key=key_of_tokens({p: score[p] for p in tokens}))
        chosen.update(tokens[: room - len(chosen)])

    def by_chance(scores: dict[int, float]) -> Any:
        return lambda p: (-draw[p], p)

    def by_score(scores: dict[int, float]) -> Any:
        below = {p: sum(o < s for o in scores.values()) for p, s in scores.items()}
        rank = {p: (below[p] + below[p] + list(scores.values()).count(s) + 1) / 2 for p, s in scores.items()}

        def key(p: int) -> tuple[float, float, int]:
            gumbel = -math.log(-math.log(hard_draw[p]))
            hard = rank[p] / len(scores) + policy.temperature * gumbel if policy.temperature else scores[p]
            return -hard, -draw[p], p

        return key

    fill(left - round(policy.hard_share * left), by_chance, by_chance)
    if policy.hard_share:
        fill(left, by_score, by_score)
    return chosen
