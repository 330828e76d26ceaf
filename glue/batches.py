"""Rows of a task → token ids, once for all seeds → batches of rows of like length. Pure but for the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glue.tasks import Split, Task, TaskData


@dataclass(frozen=True)
class Tokens:
    """Encoded rows, end to end: row n is ``ids[starts[n] : starts[n + 1]]``.

    Attributes:
        ids: token ids, int32.
        segments: which text of a pair a token is of, uint8; None where the tokenizer does not say.
        starts: [N + 1] int64.
        labels: [N] int64, float64 for a regression.
        pad_id: the token that fills a batch up.
    """

    ids: np.ndarray
    segments: np.ndarray | None
    starts: np.ndarray
    labels: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [N]."""
        return np.diff(self.starts)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``token_type_ids`` [B, L] int64; L is the longest of these rows."""
        length_B = self.lengths[rows]
        position_L = np.arange(length_B.max())
        there_BL = position_L < length_B[:, None]
        place_BL = np.where(there_BL, self.starts[rows][:, None] + position_L, 0)
        columns = {"input_ids": np.where(there_BL, self.ids[place_BL], self.pad_id), "attention_mask": there_BL}
        if self.segments is not None:
            columns["token_type_ids"] = np.where(there_BL, self.segments[place_BL], 0)
        return {name: torch.from_numpy(column_BL.astype(np.int64)) for name, column_BL in columns.items()}


@dataclass(frozen=True)
class TaskTokens:
    """A task's training rows, and its evaluations by suffix."""

    task: Task
    train: Tokens
    evaluations: dict[str, Tokens]


def encode_task(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, limit_train: int | None
) -> TaskTokens:
    """The rows of a task as one tokenizer sees them, cut to ``max_length`` tokens."""
    train = encode(limited(data.train, limit_train), tokenizer, max_length)
    evaluations = {suffix: encode(split, tokenizer, max_length) for suffix, split in data.evaluations.items()}
    return TaskTokens(data.task, train, evaluations)


def limited(split: Split, rows: int | None) -> Split:
    """At most ``rows`` rows, the same whatever the seed of the run."""
    if rows is None or rows >= len(split.labels):
        return split
    kept = np.sort(np.random.default_rng(0).permutation(len(split.labels))[:rows])
    return Split([[texts[row] for row in kept] for texts in split.texts], split.labels[kept])


def encode(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """A text or a pair a row."""
    encoded = tokenizer(*split.texts, truncation=True, max_length=max_length, return_attention_mask=False)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded["input_ids"]])])
    segments = None
    if "token_type_ids" in encoded:
        segments = np.concatenate([np.array(row, np.uint8) for row in encoded["token_type_ids"]])
    ids = np.concatenate([np.array(row, np.int32) for row in encoded["input_ids"]])
    return Tokens(ids, segments, starts, split.labels, tokenizer.pad_token_id)


def shuffled_batches(lengths: np.ndarray, size: int, pool: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """An epoch's batches of row numbers: shuffled, but of rows of like length, so that little is padded.

    Rows are shuffled, sorted by length within ``pool`` batches' worth of them, and cut into batches, whose order is
    shuffled again. Each row is in one batch; all are of ``size`` rows but the last one made.

    Args:
        lengths: of the rows [N].
        key: all that the order depends on besides.
    """
    rng = np.random.default_rng(key)
    order = rng.permutation(len(lengths))
    pools = np.split(order, range(size * pool, len(order), size * pool))
    batches = [batch for rows in pools for batch in batches_by_length(rows, lengths, size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def batches_by_length(rows: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """These rows, shortest first, cut into batches; rows of one length stay in their order."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.split(rows, range(size, len(rows), size))
