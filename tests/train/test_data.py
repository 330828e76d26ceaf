"""Shards → batches: order, windows, resuming by index, loader workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LENGTH
from torch.utils.data import DataLoader

import train.data
from entropy_masking.errors import RunError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards import manifests, read
from entropy_masking.shards.read import Columns, masker_of, read_rows
from train.data import TrainingSequences
from train.split import all_rows

POLICY = MaskPolicy.paper(hard_share=0.7, temperature=0.3, warmup=0.2, ramp=0.5, predict_ratio=0.1)


class MaskBatch:
    def __init__(self, manifest: manifests.Manifest) -> None:
        self.masker = masker_of(manifest)

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.masker(batch, POLICY) | {
            name: batch[name] for name in ("sequence_id", "epoch", "entropy", "progress")
        }


def as_it_is(batch: Any) -> Any:
    return batch


def sequences(manifest: manifests.Manifest, size: int, seed: int = 0, prepare: Any = as_it_is) -> TrainingSequences:
    columns = Columns(entropy=True, top_k=True)
    return TrainingSequences(manifest, all_rows(manifest), columns, size=size, seed=seed, prepare=prepare)


@pytest.fixture(scope="module")
def manifest(scored: Path) -> manifests.Manifest:
    return manifests.read_manifest(str(scored))


def load(dataset: TrainingSequences, batch_size: int, workers: int) -> dict[str, np.ndarray]:
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=as_it_is)
    batches = list(loader)
    names = ("sequence_id", "epoch", "progress", "input_ids", "positions_BP", "labels_BP", "teacher_ids_BPT")
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in names}


def test_masks_are_the_same_for_any_workers_and_batch_size(manifest: manifests.Manifest) -> None:
    size = 2 * manifest.totals["sequences"] + 16  # into the third epoch
    results = [
        load(sequences(manifest, size, prepare=MaskBatch(manifest)), batch_size, workers)
        for batch_size in (8, 4)
        for workers in (0, 2)
    ]
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
    np.testing.assert_array_equal(results[0]["progress"], np.arange(size) / size)
    special = manifest.special_token_ids
    assert not np.isin(results[0]["labels_BP"], special).any()
    counts = (results[0]["positions_BP"] != IGNORED).sum(1)
    assert (counts[:-1] > 0).all() and counts.max() == POLICY.max_predicted(LENGTH)


def test_an_epoch_visits_every_sequence_once_in_an_order_of_its_own(manifest: manifests.Manifest) -> None:
    rows = manifest.totals["sequences"]
    batch = sequences(manifest, 2 * rows).__getitems__(list(range(2 * rows)))
    first, second = batch["sequence_id"][:rows].tolist(), batch["sequence_id"][rows:].tolist()
    expected = sorted((entry.index << 32) + row for entry in manifest.shards for row in range(entry.rows))
    assert sorted(first) == sorted(second) == expected
    assert first != second and first != expected
    assert batch["epoch"].tolist() == [0] * rows + [1] * rows
    other = sequences(manifest, rows, seed=1).__getitems__(list(range(rows)))["sequence_id"].tolist()
    assert other != first


@pytest.mark.parametrize("window", [1, 2, 16])
def test_any_position_is_read_directly(
    manifest: manifests.Manifest, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Reading from the middle gives what reading from the start gives there."""
    monkeypatch.setattr(train.data, "WINDOW", window)
    rows = manifest.totals["sequences"]
    whole = sequences(manifest, 3 * rows).__getitems__(list(range(3 * rows)))
    for start in (0, 1, rows - 1, rows, 2 * rows + 3):
        part = sequences(manifest, 3 * rows).__getitems__(list(range(start, start + 7)))
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name][start : start + 7], equal_nan=True)


def test_one_window_is_kept_and_each_takes_the_place_of_the_last(
    manifest: manifests.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.data, "WINDOW", 2)
    for module in (train.data, read):
        monkeypatch.setattr(module, "ROW_GROUP", max(entry.rows for entry in manifest.shards))
    dataset = sequences(manifest, 2 * manifest.totals["sequences"])
    places, decoded, decode = set(), [], dataset._read
    monkeypatch.setattr(dataset, "_read", lambda epoch, group: decoded.append((epoch, group)) or decode(epoch, group))
    for start in range(0, len(dataset), 7):
        dataset.__getitems__(list(range(start, min(start + 7, len(dataset)))))
        places |= {(array.ctypes.data, len(array)) for array in dataset._rows.values()}
    assert len(places) == len(dataset._rows)
    assert {size for _, size in places} == {2 * train.data.ROW_GROUP}
    # and no row group is read twice in an epoch
    assert sorted(decoded) == [(epoch, group) for epoch in (0, 1) for group in range(len(manifest.shards))]


def test_rows_are_those_of_the_file(manifest: manifests.Manifest) -> None:
    batch = sequences(manifest, 64).__getitems__(list(range(64)))
    by_shard = {entry.index: read_rows(manifest, entry, Columns(True, True)) for entry in manifest.shards}
    for number, sequence in enumerate(batch["sequence_id"].tolist()):
        rows, row = by_shard[sequence >> 32], sequence & 0xFFFFFFFF
        for name in ("input_ids", "entropy", "topk_ids", "topk_logprobs"):
            np.testing.assert_array_equal(
                batch[name][number].numpy(), rows[name][row].astype(batch[name].numpy().dtype)
            )


def test_a_shard_that_cannot_be_read_is_named(scored: Path, tmp_path: Path) -> None:
    shutil.copytree(scored, tmp_path / "shards")
    manifest = manifests.read_manifest(str(tmp_path / "shards"))
    entry = manifest.shards[0]
    file = tmp_path / "shards" / entry.file
    data = bytearray(file.read_bytes())
    data[50 : len(data) // 2] = bytes(len(data) // 2 - 50)  # the footer stays as it was
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"cannot read .*part-00000.parquet .*pipeline/verify.py") as caught:
        read_rows(manifest, entry, Columns(entropy=True))
    assert "\n" not in str(caught.value)


def test_a_file_that_takes_the_place_of_another_is_named(scored: Path, tmp_path: Path) -> None:
    """Sizes and footers need not show it, and a run that goes on looks at no more when it starts."""
    shutil.copytree(scored, tmp_path / "shards")
    manifest = manifests.read_manifest(str(tmp_path / "shards"))
    first, second = manifest.shards[:2]
    shutil.copy(tmp_path / "shards" / first.file, tmp_path / "shards" / second.file)
    with pytest.raises(RunError, match=r"part-00001.parquet does not match its manifest; .*pipeline/verify.py"):
        sequences(manifest, 64).__getitems__(list(range(64)))
