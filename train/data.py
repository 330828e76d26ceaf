"""Shards → batches: a windowed shuffle that is a pure function of (seed, epoch), so a run resumes by index.

Shapes: B rows of a batch, L tokens, P predicted positions, N shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from entropy_masking import storage
from entropy_masking.errors import RunError
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import hash_order
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Columns, Rows, read_block, read_targets, to_tensors
from entropy_masking.shards.schema import Manifest
from entropy_masking.shards.targets import input_crc32
from train.progress import score_sums
from train.split import Part

WINDOW = 16  # row groups that are shuffled together; a loader keeps only these decoded
REMOTE_READS = 8  # row groups that are read at once from an object store: eight answers take as long as one
ORDER_STREAM = 1


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """The sequences of a whole run, epoch after epoch, as a map from the position in the run to a sequence.

    Order of an epoch: row groups are shuffled and split into windows of ``WINDOW``; rows are shuffled within a window.
    A run reads one window after another, each into the memory of the previous one. So the memory does not grow with the
    corpus. Each loader worker decodes all windows; workers share only the masking.

    Args:
        parts: the rows to train on.
        columns: the columns to read.
        size: sequences of the whole run.
        seed: of the order.
        prepare: turns a raw batch into the inputs of the model, in the loader worker. A raw batch has ``input_ids``
            [B, L], ``sequence_id``, ``epoch`` and ``progress`` (place in the run, from 0 to 1) [B], and by ``columns``
            ``entropy``, ``surprisal`` and ``temperature_lse`` [B, L] and ``topk_*`` [B, L, k].
        targets: a target directory; its rows are added to the raw batch (see ``read_targets``). Then ``epoch``, which
            decides the mask, is the variant e mod R.
    """

    def __init__(
        self,
        manifest: Manifest,
        parts: list[Part],
        columns: Columns,
        *,
        size: int,
        seed: int,
        prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        targets: Manifest | None = None,
    ) -> None:
        self.manifest, self.columns, self.targets = manifest, columns, targets
        self.size, self.seed, self.prepare = size, seed, prepare
        self.target_shards = {entry.index: entry for entry in targets.shards} if targets else {}
        self.groups = [(part.entry, group, rows) for part in parts for group, rows in part.groups()]
        self.sizes = [rows.stop - rows.start for *_, rows in self.groups]
        self.rows = sum(self.sizes)
        self._order_of: tuple[int, list[int], list[int]] | None = None  # of the epoch used last
        self._decoded: tuple[int, int] | None = None  # (epoch, window) of the rows below
        self._rows: Rows = {}
        self._shuffled = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch at these positions of the run."""
        parts: list[Rows] = []
        for (epoch, window), group in groupby(map(self._locate, indices), key=lambda place: place[:2]):
            self._decode(epoch, window)
            rows = self._shuffled[[offset for *_, offset in group]]
            part = {name: array[rows] for name, array in self._rows.items()}  # a copy: the next window overwrites them
            parts.append(part | {"epoch": np.full(len(rows), self._mask_epoch(epoch), np.int64)})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        progress_B = torch.tensor(indices, dtype=torch.float64) / self.size
        return self.prepare(to_tensors(joined) | {"progress": progress_B})

    def _mask_epoch(self, epoch: int) -> int:
        return epoch % self.targets.masks["variants"] if self.targets and self.targets.masks else epoch

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, window, offset in the window) of a position of the run."""
        epoch, position = divmod(index, self.rows)
        _, starts = self._epoch(epoch)
        window = bisect_right(starts, position) - 1
        return epoch, window, position - starts[window]

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """(order of the row groups, first position of each window) of an epoch."""
        if not self._order_of or self._order_of[0] != epoch:
            order = hash_order(self.seed, ORDER_STREAM, epoch, size=len(self.groups)).tolist()
            sizes = [self.sizes[group] for group in order]
            starts = np.cumsum([0, *(sum(sizes[i : i + WINDOW]) for i in range(0, len(sizes), WINDOW))])
            self._order_of = epoch, order, starts[:-1].tolist()
        return self._order_of[1:]

    def _decode(self, epoch: int, window: int) -> None:
        """Read the rows of a window into the memory of the previous one, and compute their order."""
        if self._decoded == (epoch, window):
            return
        self._decoded = None  # until all rows are read
        groups = self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        starts = np.cumsum([0, *(self.sizes[group] for group in groups)]).tolist()

        def place(start: int, group: int) -> None:
            for name, array in self._read(epoch, group).items():
                if name not in self._rows:
                    self._rows[name] = np.empty((WINDOW * ROW_GROUP, *array.shape[1:]), array.dtype)
                self._rows[name][start : start + len(array)] = array

        places = zip(starts[:-1], groups, strict=True)
        if not self._rows:
            place(*next(places))
        with ThreadPoolExecutor(REMOTE_READS if storage.is_remote(self.manifest.uri) else 1) as pool:
            list(pool.map(lambda where: place(*where), places))  # raises the errors of reads
        self._shuffled = hash_order(self.seed, ORDER_STREAM, epoch, window, size=starts[-1]).numpy()
        self._decoded = epoch, window

    def _read(self, epoch: int, group: int) -> Rows:
        """The rows of a row group, joined with their targets. Raises RunError like ``read_block``."""
        entry, block, own = self.groups[group]
        rows = read_block(self.manifest, entry, self.columns, block)
        if self.targets:
            variant, T = self._mask_epoch(epoch), self.columns.temperature
            rows |= read_targets(self.targets, self.target_shards[entry.index], rows, block, variant, T)
        return {name: array[own] for name, array in rows.items()}


class PrepareBatch:
    """Prepares a raw batch in a loader worker. A class, because it is pickled for workers that are not forked.

    Args:
        by_student: the batch is masked later, on the device, by the student's scores.
        padded: whether batches get an attention mask; None gives one to batches with padding.
    """

    def __init__(self, masker: Masker, policy: MaskPolicy, by_student: bool, padded: bool | None) -> None:
        self.masker, self.policy, self.by_student, self.padded = masker, policy, by_student, padded

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["padded"] = self.masker.attention_mask(batch) is not None if self.padded is None else self.padded
        if "excess" in (self.policy.by, self.policy.predict_by) and "surprisal" in batch:
            batch["reference"] = batch["surprisal"]
        if self.by_student:
            batch.pop("surprisal", None)
            batch["all_random"] = not self.policy.share_at(batch["progress"]).any()  # here it waits for no device
            # a GPU may not support every integer type
            return batch | {name: batch[name].long() for name in ("topk_ids",) if name in batch}
        masked: dict[str, Any] = self.masker(batch, self.policy)
        if (by := self.policy.by) in batch and not self.policy.uniform:
            candidates_BL = self.masker.candidates(batch["input_ids"])
            masked["score_sums"] = score_sums(by, batch[by], candidates_BL, masked["positions_BP"])
        return masked | _targets(batch, masked) if "input_crc32" in batch else masked


def whole_batch(batch: Any) -> Any:
    """Collator: the dataset already returns batches."""
    return batch


def _targets(batch: dict[str, Tensor], masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of a masked batch. Raises RunError if the teacher saw other inputs or other masked positions."""
    crc32_B = torch.from_numpy(input_crc32(masked["input_ids"].numpy()).astype(np.int64))
    same_B = (crc32_B == batch["input_crc32"]) & (masked["positions_BP"] == batch["target_positions"]).all(1)
    if not same_B.all():
        sequence = int(batch["sequence_id"][~same_B][0])
        raise RunError(
            f"the targets of sequence {sequence} were made for another masked input; make targets for these shards "
            "with pipeline/score.py --mask-source"
        )
    shapes = {"teacher_ids": "BPT", "teacher_logprobs": "BPT", "temperature_lse": "BP"}
    return {f"{name}_{shape}": batch[name] for name, shape in shapes.items() if name in batch}
