"""Which rows of the shards train and which are held out: whole documents, the same for every run on the same text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from entropy_masking.errors import UsageError
from entropy_masking.masking.noise import hashes
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import read_rows
from entropy_masking.shards.schema import Manifest, ShardEntry

SEED = 0  # the split does not depend on --seed
SHARD, PLACE = range(2)  # the two uses of hashes
BLOCKS = 16  # a corpus that would hold out fewer shards holds out blocks of rows in up to this many shards
MIN_BLOCK = 8  # rows of a block; a border costs a row, so small blocks would waste text


@dataclass(frozen=True)
class Part:
    """The rows of a shard from ``start`` to ``stop``."""

    entry: ShardEntry
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        """Tokens without padding, as a share of the shard's."""
        return round(self.entry.tokens * self.rows / self.entry.rows)

    def has_padding(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens is padded. Only the last one of a shard can be."""
        return self.stop == self.entry.rows and self.entry.tokens < self.entry.rows * length

    def groups(self) -> Iterator[tuple[int, slice]]:
        """The row groups that hold the part, and which of their rows belong to it."""
        for group in range(self.start // ROW_GROUP, -(-self.stop // ROW_GROUP)):
            first = group * ROW_GROUP
            yield group, slice(max(0, self.start - first), min(ROW_GROUP, self.stop - first))


@dataclass(frozen=True)
class Split:
    """The rows to train on and the rows to evaluate on."""

    training: list[Part]
    held_out: list[Part]
    cut: int = 0  # held-out parts that are a passage of a longer document, which also trains


def all_rows(manifest: Manifest) -> list[Part]:
    """All rows of a directory."""
    return [Part(entry, 0, entry.rows) for entry in manifest.shards if entry.rows]


def split(manifest: Manifest, fraction: float) -> Split:
    """Hold out a fraction of the rows: contiguous blocks, each in a shard of its own, at hashed places.

    A block begins and ends with a document. The two rows at its borders hold tokens of both sides, so they are left
    out. A large corpus gives up whole shards.

    The block of a shard depends on the fraction, the index and rows of the shard, the planned number of shards and the
    rows of the longest shard. So a teacher that was trained on tokens and students that are trained on the same tokens
    with scores hold out the same documents, even if other shards could not be scored.

    Raises:
        UsageError: there is too little text.
        RunError: a shard cannot be read.
    """
    parts = all_rows(manifest)
    if not fraction or not parts:
        return Split(parts, [])
    planned, wanted = manifest.planned_shards, fraction * manifest.planned_shards
    number, share = round(wanted), 1.0
    if wanted < BLOCKS:
        blocks = int(wanted * max(part.rows for part in parts) / MIN_BLOCK)
        number = min(planned, max(1, math.ceil(wanted), min(BLOCKS, blocks)))
        share = wanted / number
    ranked = hashes(SEED, SHARD, of_N=torch.arange(planned)).argsort(stable=True)
    chosen = set(ranked[:number].tolist())
    training, held_out, cut = [], [], 0
    for part in parts:
        if part.entry.index not in chosen:
            training.append(part)
            continue
        block, is_cut = held_out_block(manifest, part.entry, share)
        border = 0 if is_cut else 1
        sides = Part(part.entry, 0, block.start - border), Part(part.entry, block.stop + border, part.stop)
        training += [side for side in sides if side.rows > 0]
        held_out.append(block)
        cut += is_cut
    if not training or not held_out:
        raise UsageError(
            f"{manifest.uri} has too little text to hold out {fraction:g} of it; use more text, or another "
            "--eval-fraction (0 for no evaluation)"
        )
    return Split(training, held_out, cut)


def held_out_block(manifest: Manifest, entry: ShardEntry, share: float) -> tuple[Part, bool]:
    """The rows of a shard that are held out, and whether they are a passage of a longer document.

    They are such a passage if no document begins in the planned block, or none ends in it or soon after it.
    """
    length = min(entry.rows, max(1, round(share * entry.rows)))
    if length == entry.rows:
        return Part(entry, 0, length), False
    start = int(hashes(SEED, PLACE, of_N=torch.tensor([entry.index]))) % (entry.rows - length + 1)
    planned, end = Part(entry, start, start + length), min(entry.rows, start + 2 * length)
    # a block begins after a row with a border, and ends before one; the end of the shard also ends a document
    borders = rows_with_borders(manifest, entry, max(0, start - 1), end) + [entry.rows] * (end == entry.rows)
    begin = next((row + 1 for row in borders if row < planned.stop), entry.rows) if start else 0
    ends = [row for row in borders if row > begin]
    if not ends:
        return planned, True
    # the block ends with the document that brings it nearest to its length
    return Part(entry, begin, min(ends, key=lambda row: abs(row - begin - length))), False


def rows_with_borders(manifest: Manifest, entry: ShardEntry, start: int, stop: int) -> list[int]:
    """The rows of a shard from ``start`` to ``stop`` in which a document ends and another one may begin."""
    part, special = Part(entry, start, stop), manifest.special_ids
    found: list[int] = []
    for group, rows in part.groups():
        ids_NL = read_rows(manifest, entry, [], [group])["input_ids"][rows]
        # every sequence ends with [SEP], followed by padding in the last sequence of a shard
        border_N = ((ids_NL[:, 1:-1] == special["sep"]) & (ids_NL[:, 2:] != special["pad"])).any(1)
        found += (group * ROW_GROUP + rows.start + np.flatnonzero(border_N)).tolist()
    return found
