"""Shards → batches: a windowed shuffle that is a pure function of (seed, epoch), so that to resume is to index."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.cli import UsageError
from pipeline.shards import ROW_GROUP, TOP_K_COLUMNS, Manifest, ShardEntry, column_2d, read_table
from train.masking import hash_order

WINDOW = 16  # row groups that are shuffled together, and the most that a loader keeps decoded, twice
SPLIT_SEED = 0  # the split is the same for every run on the same shards, whatever its --seed
ORDER_STREAM = 1


def split_shards(manifest: Manifest, eval_fraction: float) -> tuple[list[ShardEntry], list[ShardEntry]]:
    """(train, evaluation) shards: ⌈fraction · n⌉ shards by hash, at least one on each side.

    A function of the number of shards alone, so that a reference, trained on tokens, and students, trained on the same
    shards scored, hold out the same documents.

    Raises:
        UsageError: there are fewer than two shards.
    """
    entries = [entry for entry in manifest.shards if entry.rows]
    if not eval_fraction:
        return entries, []
    if len(entries) < 2:
        raise UsageError(
            f"{manifest.uri} has only one shard, so none can be held out; make more with a smaller --shard-tokens, "
            "or train without evaluation (--eval-fraction 0)"
        )
    order = hash_order(SPLIT_SEED, size=len(manifest.shards)).tolist()
    entries.sort(key=lambda entry: order[entry.index])
    held_out = min(len(entries) - 1, math.ceil(eval_fraction * len(entries)))
    return sorted(entries[held_out:], key=lambda e: e.index), sorted(entries[:held_out], key=lambda e: e.index)


@dataclass(frozen=True)
class Columns:
    """What of a shard is read: no more than a run uses."""

    entropy: bool = False
    top_k: bool = False

    def names(self) -> list[str]:
        columns = ["sequence_id", "input_ids"]
        return columns + ["entropy"] * self.entropy + list(TOP_K_COLUMNS) * self.top_k


Rows = dict[str, np.ndarray]


def read_rows(manifest: Manifest, entry: ShardEntry, columns: Columns, row_groups: list[int] | None = None) -> Rows:
    """Rows of a shard as arrays: sequence_id [N], input_ids [N, L], entropy [N, L], topk_* [N, L, k]."""
    table = read_table(manifest, entry, columns.names(), row_groups)
    length = manifest.sequence_length
    rows: Rows = {"sequence_id": table["sequence_id"].to_numpy()}
    for name in columns.names()[1:]:
        if name in TOP_K_COLUMNS:
            rows[name] = column_2d(table, name, length * manifest.top_k).reshape(-1, length, manifest.top_k)
        else:
            rows[name] = column_2d(table, name, length)
    return rows


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """Integers as int64, floats as float32: what torch computes with."""
    return {
        name: torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))
        for name, array in rows.items()
    }


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """The sequences of a whole run, epoch after epoch, as a map from the position in the run to a sequence.

    Order of an epoch: row groups shuffled, windows of ``WINDOW`` of them taken, rows shuffled within a window. Memory
    is bounded by two decoded windows, whatever the corpus.

    Args:
        entries: the shards to train on.
        columns: what to read.
        size: sequences of the whole run.
        seed: of the order.
        prepare: from raw batch to what the model takes, called in the loader's worker. A raw batch has ``input_ids``
            [B, L], ``sequence_id`` and ``epoch`` [B], and by ``columns`` ``entropy`` [B, L] and ``topk_*`` [B, L, k].
    """

    def __init__(
        self,
        manifest: Manifest,
        entries: list[ShardEntry],
        columns: Columns,
        *,
        size: int,
        seed: int,
        prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        self.manifest, self.columns = manifest, columns
        self.size, self.seed, self.prepare = size, seed, prepare
        self.groups = [
            (entry, group, min(ROW_GROUP, entry.rows - group * ROW_GROUP))
            for entry in entries
            for group in range(math.ceil(entry.rows / ROW_GROUP))
        ]
        self.rows = sum(rows for _, _, rows in self.groups)
        self._windows: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch at these positions of the run."""
        parts: list[Rows] = []
        for epoch, window, offsets in self._runs(indices):
            rows = self._window(epoch, window)
            part = {name: array[offsets] for name, array in rows.items()}
            parts.append(part | {"epoch": np.full(len(offsets), epoch, np.int64)})
        return self.prepare(to_tensors({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}))

    def _runs(self, indices: list[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, window, offsets in it) of the indices, neighbours in the same window together."""
        current: tuple[int, int] | None = None
        offsets: list[int] = []
        for index in indices:
            epoch, position = divmod(index, self.rows)
            _, starts = self._epoch(epoch)
            window = bisect_right(starts, position) - 1
            if current != (epoch, window):
                if current:
                    yield *current, offsets
                current, offsets = (epoch, window), []
            offsets.append(position - starts[window])
        if current:
            yield *current, offsets

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """(order of the row groups, first position of each window) of an epoch; the two used last are kept."""
        if epoch not in self._epochs:
            order = hash_order(self.seed, ORDER_STREAM, epoch, size=len(self.groups)).tolist()
            sizes = [self.groups[group][2] for group in order]
            starts = np.cumsum([0, *(sum(sizes[i : i + WINDOW]) for i in range(0, len(sizes), WINDOW))])
            _keep(self._epochs, epoch, (order, starts[:-1].tolist()))
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> Rows:
        """A decoded window in its order; the two used last are kept."""
        key = (epoch, window)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        order, _ = self._epoch(epoch)
        parts = []
        for index in order[window * WINDOW : (window + 1) * WINDOW]:
            entry, group, _ = self.groups[index]
            parts.append(read_rows(self.manifest, entry, self.columns, [group]))
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        shuffled = hash_order(self.seed, ORDER_STREAM, epoch, window, size=len(rows["sequence_id"])).numpy()
        _keep(self._windows, key, {name: array[shuffled] for name, array in rows.items()})
        return self._windows[key]


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Remember the two values that were added or used last: a batch touches no more."""
    while len(cache) > 1:
        cache.popitem(last=False)
    cache[key] = value


def evaluation_batches(
    manifest: Manifest, entries: list[ShardEntry], columns: Columns, batch_size: int
) -> Iterator[dict[str, Any]]:
    """The sequences of the held-out shards in order, as raw batches."""
    for entry in entries:
        tensors = to_tensors(read_rows(manifest, entry, columns))
        for start in range(0, entry.rows, batch_size):
            yield {name: tensor[start : start + batch_size] for name, tensor in tensors.items()}
