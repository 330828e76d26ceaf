"""Shards → batches: order, lanes, resuming by index, loader workers."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LENGTH
from in_process import RANDOM, train_here
from torch.utils.data import DataLoader

from entropy_masking.errors import RunError, UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards import manifests
from entropy_masking.shards.parquet import TOP_K_COLUMNS
from entropy_masking.shards.read import masker_of, read_rows
from train.data import LANES, LANES_OF_BATCH, TURNS, TrainingSequences
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


def sequences(
    manifest: manifests.Manifest, size: int, batch: int = 8, seed: int = 0, prepare: Any = as_it_is, times: int = 1
) -> TrainingSequences:
    """The data of a run on a directory that is repeated some times."""
    parts, columns = all_rows(manifest) * times, ["entropy", *TOP_K_COLUMNS]
    return TrainingSequences(manifest, parts, columns, size=size, batch=batch, seed=seed, prepare=prepare)


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
        for batch_size, workers in ((8, 0), (8, 2), (4, 0), (4, 1), (2, 2))
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


@pytest.mark.parametrize("batch", [1, 3, 8, 100, 2000])
def test_any_position_is_read_directly(manifest: manifests.Manifest, batch: int) -> None:
    """Reading from the middle gives what reading from the start gives there."""
    rows = manifest.totals["sequences"]
    whole = sequences(manifest, 3 * rows, batch).__getitems__(list(range(3 * rows)))
    numbers, counts = whole["sequence_id"].unique(return_counts=True)
    assert len(numbers) == rows and (counts == 3).all()
    for start in (0, 1, rows - 1, rows, 2 * rows + 3):
        part = sequences(manifest, 3 * rows, batch).__getitems__(list(range(start, start + 7)))
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name][start : start + 7], equal_nan=True)


@pytest.mark.parametrize(
    ("ranks", "accumulation", "workers"), [(1, 1, 1), (1, 1, 2), (1, 1, 4), (2, 2, 2), (8, 1, 1), (8, 1, 4), (3, 1, 2)]
)
def test_a_process_decodes_only_its_lanes(
    manifest: manifests.Manifest, monkeypatch: pytest.MonkeyPatch, ranks: int, accumulation: int, workers: int
) -> None:
    """Ranks take batches in turn, and so do the workers of a rank. Together they decode what one process does."""
    times, batch = 24, 8 * ranks * accumulation
    size, groups = times * manifest.totals["sequences"], times * len(manifest.shards)
    starts = range(0, size // batch * batch, batch // ranks // accumulation)
    decoded = []
    for rank in range(ranks):
        for worker in range(workers):
            dataset = sequences(manifest, size, batch, times=times)
            read, own = dataset._read, []
            monkeypatch.setattr(dataset, "_read", lambda *key, read=read, own=own: own.append(key[:2]) or read(*key))
            lanes, most = set(), 0
            for start in starts[rank::ranks][worker::workers]:
                indices = list(range(start, start + batch // ranks // accumulation))
                lanes |= {dataset._locate(index)[1] for index in indices}
                dataset.__getitems__(indices)
                most = max(most, len(dataset._decoded) + len(dataset._free))
            assert len(own) <= len(lanes) * (groups / LANES + 2)
            assert len(own) - len(set(own)) < len(lanes)  # only the last of a lane may be the first of another
            assert most <= len(lanes) + LANES_OF_BATCH  # two for a lane whose row group ends within the batch
            decoded.append(len(lanes))
    if LANES_OF_BATCH % (ranks * accumulation) == 0 and TURNS * accumulation % workers == 0:
        assert sum(decoded) == LANES
    assert set(decoded) != {LANES} or ranks * workers == 1


def test_a_batch_mixes_rows_of_many_row_groups(manifest: manifests.Manifest) -> None:
    batch, rows = 64, manifest.totals["sequences"]
    dataset = sequences(manifest, 24 * rows, batch, times=24)
    batches = [[dataset._locate(index) for index in range(start, start + batch)] for start in range(0, 2000, batch)]
    groups = [{group for *_, group, _ in places} for places in batches]
    assert all(len(each) >= LANES_OF_BATCH for each in groups)
    assert all(not one & other for one, other in pairwise(groups))  # the next batch has rows of others


def test_a_run_in_the_order_of_earlier_versions_is_refused(scored: Path, tmp_path: Path) -> None:
    train_here(scored, tmp_path, *RANDOM, "--max-steps", 1)
    flags = json.loads((tmp_path / "run.json").read_text())
    assert flags.pop("ordered_by") == "lanes"
    (tmp_path / "run.json").write_text(json.dumps(flags))
    with pytest.raises(UsageError, match="ordered_by: windows → lanes"):
        train_here(scored, tmp_path, *RANDOM, "--max-steps", 1)


def test_rows_are_those_of_the_file(manifest: manifests.Manifest) -> None:
    batch = sequences(manifest, 64).__getitems__(list(range(64)))
    by_shard = {entry.index: read_rows(manifest, entry, ["entropy", *TOP_K_COLUMNS]) for entry in manifest.shards}
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
        read_rows(manifest, entry, ["entropy"])
    assert "\n" not in str(caught.value)


def test_a_file_that_takes_the_place_of_another_is_named(scored: Path, tmp_path: Path) -> None:
    """Sizes and footers need not show it, and a run that goes on looks at no more when it starts."""
    shutil.copytree(scored, tmp_path / "shards")
    manifest = manifests.read_manifest(str(tmp_path / "shards"))
    first, second = manifest.shards[:2]
    shutil.copy(tmp_path / "shards" / first.file, tmp_path / "shards" / second.file)
    with pytest.raises(RunError, match=r"part-00001.parquet does not match its manifest; .*pipeline/verify.py"):
        sequences(manifest, 64).__getitems__(list(range(64)))
