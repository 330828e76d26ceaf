"""The inputs that a student will see: a mask policy applied to the sequences of a shard.

Shapes: N rows, L tokens, K masked positions.
"""

import numpy as np
import torch

from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import SAMPLE, noise
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.fields import Masks
from entropy_masking.shards.read import columns_of, read_block, to_tensors
from entropy_masking.shards.schema import Manifest, ShardEntry
from entropy_masking.shards.targets import MaskedRows, input_crc32


def mask_shard(sequences: Manifest, entry: ShardEntry, masks: Masks, masker: Masker) -> tuple[MaskedRows, np.ndarray]:
    """All variants of the sequences of a shard, in the order of a target file, and their inputs [N, L].

    Raises RunError if the shard cannot be read, or does not match its manifest.
    """
    policy = MaskPolicy(**masks["policy"])
    columns = columns_of(policy, masks["source"])
    fields, inputs = [], []
    for block in range(max(1, entry.row_groups)):  # a shard without sequences has an empty row group
        rows = read_block(sequences, entry, columns, block)
        tensors, id_N = to_tensors(rows), rows["sequence_id"]
        for variant in range(masks["variants"]):
            variant_N = np.full(len(id_N), variant, np.uint16)
            masked = masker(tensors | {"epoch": torch.from_numpy(variant_N.astype(np.int64))}, policy)
            inputs_NL = masked["input_ids"].numpy()
            fields.append((id_N, variant_N, masked["positions_BP"].numpy(), input_crc32(inputs_NL)))
            inputs.append(inputs_NL)
    return MaskedRows(*map(np.concatenate, zip(*fields, strict=True))), np.concatenate(inputs)


def sampling_noise(rows: MaskedRows, masks: Masks) -> np.ndarray:
    """Random numbers in (0, 1) [N, K] float64 for ``entropy.sample``: one for each masked position of each variant."""
    variant_N, id_N = (torch.from_numpy(column.astype(np.int64)) for column in (rows.variant_N, rows.sequence_id_N))
    return noise(masks["policy"]["seed"], SAMPLE, variant_N, id_N, torch.from_numpy(rows.positions_NK)).numpy()
