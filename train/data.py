"""Shards → batches: a windowed shuffle that is a pure function of (seed, epoch), so that to resume is to index."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline import masks, storage
from pipeline.cli import RunError, UsageError
from pipeline.manifests import Manifest, ShardEntry, load_tokenizer, read_table
from pipeline.shards import ROW_GROUP, TOP_K_COLUMNS, column_2d, temperature_column
from train.masking import Masker, MaskPolicy
from train.noise import hash_order, hashes
from train.words import continuing_tokens

WINDOW = 16  # row groups that are shuffled together, and all that a loader keeps decoded
REMOTE_READS = 8  # row groups asked of an object store at a time: one answer takes long, eight no longer
SPLIT_SEED = 0  # the split is the same for every run on the same shards, whatever its --seed
ORDER_STREAM = 1


def split_shards(manifest: Manifest, eval_fraction: float) -> tuple[list[ShardEntry], list[ShardEntry]]:
    """(train, evaluation) shards: ⌈fraction · n⌉ shards by hash, at least one on each side.

    Shards are ranked by a hash of their index, so that a reference, trained on tokens, and students, trained on the
    same shards scored, hold out the same documents, even where a scoring run ended without some of its shards.

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
    ranks = hashes(SPLIT_SEED, of_N=torch.tensor([entry.index for entry in entries])).tolist()
    entries = [entry for _, entry in sorted(zip(ranks, entries, strict=True), key=lambda pair: pair[0])]
    held_out = min(len(entries) - 1, math.ceil(eval_fraction * len(entries)))
    return sorted(entries[held_out:], key=lambda e: e.index), sorted(entries[:held_out], key=lambda e: e.index)


def masker_of(manifest: Manifest, unit: str = "token") -> Masker:
    """What masks the sequences of a shard directory, by tokens or by words.

    Raises:
        UsageError: by words, and the tokenizer does not say which tokens go on with one.
    """
    continues_V = None
    if unit == "word":
        try:
            continues_V = continuing_tokens(load_tokenizer(manifest.uri), manifest.vocab_size)
        except ValueError as error:
            raise UsageError(f"--mask-unit word has no use with {manifest.uri}: {error}") from None
    return Masker(
        vocab_size=manifest.vocab_size,
        special_token_ids=manifest.special_token_ids,
        mask_id=manifest.special_ids["mask"],
        pad_id=manifest.special_ids["pad"],
        continues_V=continues_V,
    )


@dataclass(frozen=True)
class Columns:
    """What of a shard is read: no more than a run uses. ``temperature``: at which the top k are to be known."""

    entropy: bool = False
    top_k: bool = False
    temperature: float = 1.0
    surprisal: bool = False

    def names(self) -> list[str]:
        columns = ["sequence_id", "input_ids"] + ["entropy"] * self.entropy + ["surprisal"] * self.surprisal
        if self.top_k:
            columns += TOP_K_COLUMNS
            columns += [temperature_column(self.temperature)] * (self.temperature != 1)
        return columns


Rows = dict[str, np.ndarray]


def columns_of(policy: MaskPolicy, source: str, top_k: bool = False, temperature: float = 1.0) -> Columns:
    """What of the shards a run reads."""
    predict_by = "random" if policy.predicts_all else policy.predict_by
    read = {"surprisal"} if "excess" in (predict_by, None if policy.uniform else policy.by) else set()
    if source == "parquet":
        read |= {predict_by} | (set() if policy.uniform else {policy.by})
    return Columns(entropy="entropy" in read, surprisal="surprisal" in read, top_k=top_k, temperature=temperature)


def read_rows(manifest: Manifest, entry: ShardEntry, columns: Columns, row_groups: list[int] | None = None) -> Rows:
    """Rows of a shard: sequence_id [N]; input_ids, entropy, surprisal, temperature_lse [N, L]; topk_* [N, L, k].

    Raises:
        RunError: the file cannot be read.
    """
    table = _table(manifest, entry, columns.names(), row_groups)
    length = manifest.sequence_length
    rows: Rows = {"sequence_id": table["sequence_id"].to_numpy()}
    for name in columns.names()[1:]:
        if name in TOP_K_COLUMNS:
            rows[name] = column_2d(table, name, length * manifest.top_k).reshape(-1, length, manifest.top_k)
        elif name == temperature_column(columns.temperature):
            rows["temperature_lse"] = column_2d(table, name, length)
        else:
            rows[name] = column_2d(table, name, length)
    return rows


def read_block(manifest: Manifest, entry: ShardEntry, columns: Columns, block: int) -> Rows:
    """One row group of a shard.

    Raises:
        RunError: it cannot be read, or is not what the manifest says: files may change under a run.
    """
    rows = read_rows(manifest, entry, columns, [block])
    expected = np.arange(block * ROW_GROUP, min(entry.rows, (block + 1) * ROW_GROUP), dtype=np.uint64)
    if not np.array_equal(rows["sequence_id"], (entry.index << 32) + expected):
        raise RunError(
            f"{manifest.shard_uri(entry)} does not hold the rows that its manifest says; "
            "pipeline/verify.py says what is wrong with it"
        )
    return rows


def read_targets(targets: Manifest, entry: ShardEntry, sequences: Rows, block: int, variant: int, T: float) -> Rows:
    """What a teacher says of one variant of one row group of sequences (``pipeline.masks``).

    Args:
        targets: manifest of a target directory, and ``entry`` its shard.
        sequences: the rows of the row group ``block``.
        T: temperature at which the top k are to be known.

    Returns:
        planned_positions [N, K] (``NO_POSITION`` where a row hides fewer), input_crc32 [N], teacher_ids and
        teacher_logprobs [N, K, k], and with T ≠ 1 temperature_lse [N, K].

    Raises:
        RunError: the file cannot be read, or holds other rows.
    """
    assert targets.masks
    K, variants, lse = targets.masks["positions"], targets.masks["variants"], [T] if T != 1 else []
    columns = ["sequence_id", "variant", "positions", *TOP_K_COLUMNS, *map(temperature_column, lse), "input_crc32"]
    table = _table(targets, entry, columns, [masks.row_group(block, variant, variants)])
    rows = masks.rows_of(table, K)
    if not np.array_equal(rows.sequence_id_N, sequences["sequence_id"]) or (rows.variant_N != variant).any():
        raise RunError(f"{targets.shard_uri(entry)} does not hold the rows that its manifest says; make it anew")
    found = masks.targets_of(table, K, targets.top_k, lse)
    joined = {
        "planned_positions": rows.positions_NK,
        "input_crc32": rows.crc32_N,
        "teacher_ids": found.topk_ids_NKT,
        "teacher_logprobs": found.topk_logprobs_NKT,
    }
    return joined if T == 1 else joined | {"temperature_lse": found.temperature_lse_NK[T]}


def _table(manifest: Manifest, entry: ShardEntry, columns: list[str], row_groups: list[int] | None) -> pa.Table:
    try:
        return read_table(manifest, entry, columns, row_groups)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"cannot read {manifest.shard_uri(entry)} ({reason}); pipeline/verify.py says what is wrong with it"
        ) from None


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """Integers as int64, floats as float32: what torch computes with. The top k stay as they are stored.

    Those are k times as many as the rest, and few of them will be wanted.
    """
    wide = {name: array for name, array in rows.items() if name not in TOP_K_COLUMNS}
    tensors = {
        name: torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))
        for name, array in wide.items()
    }
    return tensors | {
        name: torch.from_numpy(np.require(rows[name], requirements="W")) for name in TOP_K_COLUMNS if name in rows
    }


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """The sequences of a whole run, epoch after epoch, as a map from the position in the run to a sequence.

    Order of an epoch: row groups shuffled, windows of ``WINDOW`` of them taken, rows shuffled within a window. So a
    run goes through the windows one after another, and one is kept decoded, each in the place of the last: that bounds
    the memory, whatever the corpus. Each loader worker keeps one and decodes all of them, as its batches come from
    each; more workers share the masking, not the decoding.

    Args:
        entries: the shards to train on.
        columns: what to read.
        size: sequences of the whole run.
        seed: of the order.
        prepare: from raw batch to what the model takes, called in the loader's worker. A raw batch has ``input_ids``
            [B, L], ``sequence_id``, ``epoch`` and ``progress`` (place in the run, from 0 to 1) [B], and by ``columns``
            ``entropy``, ``surprisal`` and ``temperature_lse`` [B, L] and ``topk_*`` [B, L, k].
        targets: a target directory, whose rows are added to the raw batch (see ``read_targets``). ``epoch``, which
            decides the mask, is then the variant: epoch e has variant e mod R.
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
        targets: Manifest | None = None,
    ) -> None:
        self.manifest, self.columns = manifest, columns
        self.size, self.seed, self.prepare = size, seed, prepare
        self.targets = targets
        self.target_shards = {entry.index: entry for entry in targets.shards} if targets else {}
        self.groups = [
            (entry, group, min(ROW_GROUP, entry.rows - group * ROW_GROUP))
            for entry in entries
            for group in range(math.ceil(entry.rows / ROW_GROUP))
        ]
        self.rows = sum(rows for _, _, rows in self.groups)
        self._order_of: tuple[int, list[int], list[int]] | None = None  # the epoch used last
        self._decoded: tuple[int, int] | None = None  # (epoch, window) that the rows below are of
        self._rows: Rows = {}
        self._shuffled = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch at these positions of the run."""
        parts: list[Rows] = []
        for epoch, window, offsets in self._runs(indices):
            self._decode(epoch, window)
            rows = self._shuffled[offsets]
            part = {name: array[rows] for name, array in self._rows.items()}  # copied: the next window comes here
            parts.append(part | {"epoch": np.full(len(offsets), self._mask_of(epoch), np.int64)})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        progress_B = torch.tensor(indices, dtype=torch.float64) / self.size
        return self.prepare(to_tensors(joined) | {"progress": progress_B})

    def _mask_of(self, epoch: int) -> int:
        return epoch % self.targets.masks["variants"] if self.targets and self.targets.masks else epoch

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
        """(order of the row groups, first position of each window) of an epoch."""
        if not self._order_of or self._order_of[0] != epoch:
            order = hash_order(self.seed, ORDER_STREAM, epoch, size=len(self.groups)).tolist()
            sizes = [self.groups[group][2] for group in order]
            starts = np.cumsum([0, *(sum(sizes[i : i + WINDOW]) for i in range(0, len(sizes), WINDOW))])
            self._order_of = epoch, order, starts[:-1].tolist()
        return self._order_of[1:]

    def _decode(self, epoch: int, window: int) -> None:
        """Have the rows of a window, and their order, in place of those of the one before."""
        if self._decoded == (epoch, window):
            return
        self._decoded = None  # until all of it is there
        groups = self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        starts = np.cumsum([0, *(self.groups[group][2] for group in groups)]).tolist()

        def place(start: int, group: int) -> None:
            for name, array in self._read(epoch, group).items():
                if name not in self._rows:
                    self._rows[name] = np.empty((WINDOW * ROW_GROUP, *array.shape[1:]), array.dtype)
                self._rows[name][start : start + len(array)] = array

        places = zip(starts[:-1], groups, strict=True)
        if not self._rows:
            place(*next(places))
        with ThreadPoolExecutor(REMOTE_READS if storage.is_remote(self.manifest.uri) else 1) as pool:
            for placed in [pool.submit(place, *each) for each in places]:
                placed.result()
        self._shuffled = hash_order(self.seed, ORDER_STREAM, epoch, window, size=starts[-1]).numpy()
        self._decoded = epoch, window

    def _read(self, epoch: int, group: int) -> Rows:
        """A row group, joined with its targets. Raises RunError as ``read_block``."""
        entry, block, _ = self.groups[group]
        rows = read_block(self.manifest, entry, self.columns, block)
        if self.targets:
            variant, T = self._mask_of(epoch), self.columns.temperature
            rows |= read_targets(self.targets, self.target_shards[entry.index], rows, block, variant, T)
        return rows
