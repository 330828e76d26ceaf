"""Rows of a task → token ids, once for all seeds → batches of rows of similar length.

Shapes: B rows of a batch, L tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glue.tasks import Task, TaskData


@dataclass(frozen=True)
class Tokens:
    """Encoded rows, end to end: row n is ``ids[starts[n] : starts[n + 1]]``.

    Attributes:
        ids: token ids [T], int32.
        segments: the text of a pair that each token comes from [T], uint8; None if the tokenizer does not return it.
        starts: [N + 1] int64.
        labels: [N] int64, float64 for a regression.
        pad_id: the padding token.
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
        """``input_ids``, ``attention_mask``, ``token_type_ids`` [B, L] int64; L is the length of the longest row."""
        length_B = self.lengths[rows]
        position_L = np.arange(length_B.max())
        real_BL = position_L < length_B[:, None]
        place_BL = np.where(real_BL, self.starts[rows][:, None] + position_L, 0)
        columns = {"input_ids": np.where(real_BL, self.ids[place_BL], self.pad_id), "attention_mask": real_BL}
        if self.segments is not None:
            columns["token_type_ids"] = np.where(real_BL, self.segments[place_BL], 0)
        return {name: torch.from_numpy(column_BL.astype(np.int64)) for name, column_BL in columns.items()}


@dataclass(frozen=True)
class TaskTokens:
    """The encoded training rows of a task, and its evaluations by suffix. Other fields are as in ``TaskData``."""

    task: Task
    train: Tokens
    evaluations: dict[str, Tokens]
    train_split: str
    overlap: int


def encode_task(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, limit_train: int | None
) -> TaskTokens:
    """The rows of a task, encoded by one tokenizer and cut to ``max_length`` tokens.

    If there are more training rows than ``limit_train``, this many are drawn, the same for every seed.
    """
    train = data.train
    if limit_train is not None and limit_train < len(train):
        train = train[np.sort(np.random.default_rng(0).permutation(len(train))[:limit_train])]
    evaluations = {suffix: encode(rows, tokenizer, max_length) for suffix, rows in data.evaluations.items()}
    return TaskTokens(data.task, encode(train, tokenizer, max_length), evaluations, data.train_split, data.overlap)


def encode(rows: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Encode each row, a text or a pair of texts and its label, as one sequence."""
    *columns, labels = rows
    texts = [column.to_list() for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
    starts = np.cumsum([0, *map(len, encoded["input_ids"])])
    ids = np.concatenate([np.array(row, np.int32) for row in encoded["input_ids"]])
    segments = None
    if "token_type_ids" in encoded:
        segments = np.concatenate([np.array(row, np.uint8) for row in encoded["token_type_ids"]])
    return Tokens(ids, segments, starts, labels.to_numpy(writable=True), tokenizer.pad_token_id)


def shuffled_batches(lengths: np.ndarray, size: int, pool: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """The row numbers of the batches of an epoch. Rows of similar length share a batch, to save padding.

    Rows are shuffled, cut into pools of ``pool`` batches, sorted by length within a pool, and cut into batches, whose
    order is shuffled again. Each row is in one batch. All batches but one have ``size`` rows.

    Args:
        lengths: lengths of the rows [N].
        key: seed of the order.
    """
    rng = np.random.default_rng(key)
    order = rng.permutation(len(lengths))
    pools = np.split(order, range(size * pool, len(order), size * pool))
    batches = [batch for rows in pools for batch in batches_by_length(rows, lengths, size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def batches_by_length(rows: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows, shortest first, cut into batches; rows of equal length keep their order."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.split(rows, range(size, len(rows), size))
