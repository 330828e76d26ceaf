"""Whether a self-masking student finds the same tokens hard as the teacher of its shards.

Shapes: N sequences of a sample, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from entropy_masking.shards.manifests import sampled
from entropy_masking.shards.read import Columns, read_rows
from entropy_masking.shards.schema import Manifest
from train.split import Part

TOKENS = 8192  # of a sample; the correlation takes 2 ms


@dataclass(frozen=True)
class TeacherSample:
    """Some sequences with a teacher's scores, NaN where a token has none."""

    ids_NL: Tensor
    score_NL: np.ndarray

    def correlation(self, student_NL: Tensor) -> dict[str, float]:
        """Spearman's rank correlation of both scores over all tokens; nothing if it is undefined."""
        known_NL = ~np.isnan(self.score_NL)
        teacher, student = self.score_NL[known_NL], student_NL.cpu().numpy()[known_NL]
        if np.ptp(teacher) == 0 or np.ptp(student) == 0:
            return {}
        return {"teacher_correlation": float(spearmanr(teacher, student).statistic)}


def teacher_sample(manifest: Manifest, parts: list[Part], score: str, device: torch.device) -> TeacherSample | None:
    """The first sequences of some parts; None if no token of them is scored. Raises RunError like ``read_rows``.

    Args:
        score: ``entropy`` or ``surprisal``.
    """
    scored = sampled([part for part in parts if part.entry.scored_tokens])
    if not scored:
        return None
    columns = Columns(entropy=score == "entropy", surprisal=score == "surprisal")
    rows = max(1, TOKENS // (manifest.sequence_length * len(scored)))
    read: list[tuple[np.ndarray, np.ndarray]] = []
    for part in scored:
        group, own = next(part.groups())
        block = read_rows(manifest, part.entry, columns, [group])
        read.append((block["input_ids"][own][:rows], block[score][own][:rows]))
    ids_NL, score_NL = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    if np.isnan(score_NL).all():
        return None
    return TeacherSample(torch.from_numpy(ids_NL.astype(np.int64)).to(device), score_NL.astype(np.float32))
