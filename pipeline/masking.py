"""The inputs that a student will see: a mask policy applied to the sequences of a shard.

Shapes: N rows, L tokens, K masked positions.
"""

from __future__ import annotations

import numpy as np
import torch

from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import SAMPLE, noise
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.fields import Masks
from entropy_masking.shards.read import Rows, columns_of, read_block, to_tensors
from entropy_masking.shards.schema import Manifest, ShardEntry
from entropy_masking.shards.targets import MaskedRows, input_crc32


def mask_shard(sequences: Manifest, entry: ShardEntry, masks: Masks, masker: Masker) -> tuple[MaskedRows, np.ndarray]:
    """All variants of the sequences of a shard, in the order of a target file, and their inputs [N, L].

    Raises RunError if the shard cannot be read, or does not match its manifest.
    """
    policy, K, L = MaskPolicy(**masks["policy"]), masks["positions"], sequences.sequence_length
    columns = columns_of(policy, masks["source"])
    none = MaskedRows(
        np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty((0, K), np.int64), np.empty(0, np.uint32)
    )
    parts = [(none, np.empty((0, L), np.int64))]  # a shard may have no sequences
    for block in range(entry.row_groups):
        rows = read_block(sequences, entry, columns, block)
        parts += [mask(rows, variant, masker, policy) for variant in range(masks["variants"])]
    fields = zip(*(vars(masked).values() for masked, _ in parts), strict=True)
    return MaskedRows(*map(np.concatenate, fields)), np.concatenate([inputs_NL for _, inputs_NL in parts])


def mask(rows: Rows, variant: int, masker: Masker, policy: MaskPolicy) -> tuple[MaskedRows, np.ndarray]:
    """One variant of some sequences: their masks in the epoch of that number."""
    epoch_N = torch.full((len(rows["sequence_id"]),), variant)
    masked = masker(to_tensors(rows) | {"epoch": epoch_N}, policy)
    inputs_NL, positions_NK = masked["input_ids"].numpy(), masked["positions_BP"].numpy()
    variant_N = np.full(len(epoch_N), variant, np.uint16)
    return MaskedRows(rows["sequence_id"], variant_N, positions_NK, input_crc32(inputs_NL)), inputs_NL


def sampling_noise(rows: MaskedRows, masks: Masks) -> np.ndarray:
    """Random numbers in (0, 1) [N, K] float64 for ``entropy.sample``: one for each masked position of each variant."""
    variant_N, id_N = (torch.from_numpy(column.astype(np.int64)) for column in (rows.variant_N, rows.sequence_id_N))
    return noise(masks["policy"]["seed"], SAMPLE, variant_N, id_N, torch.from_numpy(rows.positions_NK)).numpy()
