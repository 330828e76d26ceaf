"""verify.py on the tables of shards and targets: every wrong value is named."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from harness import LENGTH, ROOT, TOP_K, refused, run
from in_process import score_here
from made_shards import write_shards
from tables import recommitted, replace_list

from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.faults import Depth, table_faults
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.schema import Manifest, ShardEntry
from entropy_masking.shards.targets import MaskedRows, row_groups, rows_of
from entropy_masking.shards.values import list_lengths

VERIFY = [sys.executable, str(ROOT / "pipeline" / "verify.py")]
TOP_4 = ["--top-k", TOP_K, "--temperatures", "1,2"]
MASKED = 5  # positions of a sequence


def file_faults(manifest: Manifest, entry: ShardEntry, data: bytes, deep: bool = False) -> list[str]:
    """The faults of a shard of these bytes."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return table_faults(manifest, entry, file, Depth.VALUES if deep else Depth.TABLES)


@pytest.fixture(scope="module")
def tempered(work: Path) -> Path:
    """A scored shard with a temperature; not to be changed."""
    sizes = ["--limit-documents", 60, "--shard-tokens", 1500, "--sequence-length", LENGTH]
    return score_here(work / "corpus.jsonl", work / "teacher", work / "tempered", *sizes, *TOP_4)


# --- shards ----------------------------------------------------------------------------------------------------------


K, L = TOP_K, LENGTH
FIRST = (0, 3 * TOP_K)  # the first row's third word
VALUES: list[tuple[str, int, tuple[int, int], float, str]] = [
    ("input_ids", L, (1, 4), 300, "has token ids outside the vocabulary"),
    ("entropy", L, (1, 4), np.nan, "its entropy must be NaN exactly at special tokens"),
    ("entropy", L, (1, 0), 1, "its entropy must be NaN exactly at special tokens"),
    ("entropy", L, (1, 4), 5.8, "has entropies outside 0 … 5.70 nats"),
    ("entropy", L, (1, 4), -0.1, "has entropies outside 0 … 5.70 nats"),
    ("surprisal", L, (1, 4), np.nan, "its surprisal must be NaN exactly at special tokens"),
    ("surprisal", L, (1, 4), -0.1, "has surprisals below 0"),
    ("topk_ids", L * K, FIRST, 300, "has top-k ids outside the vocabulary"),
    ("topk_logprobs", L * K, (0, FIRST[1] + 1), 255, "has log-probabilities that are not sorted"),
    ("topk_logprobs", L * K, FIRST, 0, "has probabilities that sum to more than 1"),
    ("topk_logprobs", L * K, FIRST, 255, "its log-probabilities must be NaN exactly where there is no score"),
    ("topk_logprobs", L * K, (0, 0), 64, "its log-probabilities must be NaN exactly where there is no score"),
    ("temperature_lse_2", L, (1, 4), np.inf, "its temperature_lse_2 must be finite exactly at scored positions"),
    ("temperature_lse_2", L, (1, 0), 1, "its temperature_lse_2 must be finite exactly at scored positions"),
]


def changed(table: pa.Table, name: str, width: int, place: tuple[int, int], value: float) -> pa.Table:
    values = parquet.column_2d(table, name, width).copy()
    values[place] = value
    return replace_list(table, name, values)


@pytest.mark.parametrize(("name", "width", "place", "value", "fault"), VALUES, ids=[f"{v[0]}={v[3]}" for v in VALUES])
def test_wrong_values_are_named(
    tempered: Path, name: str, width: int, place: tuple[int, int], value: float, fault: str
) -> None:
    manifest = manifests.read_manifest(str(tempered))
    table = manifests.read_table(manifest, manifest.shards[0], parquet.schema_of(manifest).names)
    entry, data = recommitted(manifest.shards[0], table)
    assert not file_faults(manifest, entry, data, deep=True)
    entry, data = recommitted(entry, changed(table, name, width, place, value))
    # the check before training reads the token ids of the first row group too
    assert bool(file_faults(manifest, entry, data)) == ("vocabulary" in fault)
    faults = file_faults(manifest, entry, data, deep=True)
    assert any(named.startswith(fault) for named in faults), faults


def test_wrong_tables_are_named(tempered: Path) -> None:
    manifest = manifests.read_manifest(str(tempered))
    table = manifests.read_table(manifest, manifest.shards[0], parquet.schema_of(manifest).names)
    topk_ids = parquet.column_2d(table, "topk_ids", L * K).copy()
    topk_ids[0, FIRST[1] + 1] = topk_ids[FIRST]
    entropy = parquet.column_2d(table, "entropy", L)
    padded = changed(table, "input_ids", L, (0, 4), manifest.special_ids["pad"])
    wide = table.cast(pa.schema([f if f.name != "sequence_id" else f.with_type(pa.int64()) for f in table.schema]))
    numbers = pa.array(table["sequence_id"].to_numpy()[::-1])
    reverse = table.set_column(0, table.schema.field(0), numbers)
    huge = replace_list(table, "entropy", np.zeros((len(table), 40 * L * K)))
    cases: list[tuple[pa.Table, list[pa.Table] | None, str]] = [
        (huge, None, "claims "),
        (replace_list(table, "topk_ids", topk_ids), None, "has a top-k id twice at a position"),
        (replace_list(table, "entropy", entropy[:, 1:]), None, f"has entropy of another length than {L}"),
        (padded, None, "its entropy must be NaN exactly at special tokens"),
        (wide, None, "does not have the expected columns"),
        (reverse, None, "its sequence ids are not contiguous (first at row 0)"),
        (table, [table.slice(0, 7), table.slice(7)], "its row groups do not have the expected sizes"),
    ]
    for bad, groups, fault in cases:
        entry, data = recommitted(manifest.shards[0], bad, groups)
        faults = file_faults(manifest, entry, data, deep=True)
        assert any(named.startswith(fault) for named in faults), (fault, faults)
    entry, data = recommitted(manifest.shards[0], table)
    for field in ("tokens", "scored_tokens"):
        short = entry.model_copy(update={field: getattr(entry, field) - 1})
        assert f"{field.replace('_', ' ')}, not" in file_faults(manifest, short, data, deep=True)[0]
    less = entry.model_copy(update={"entropy_sum": entry.entropy_sum * 0.99})
    assert "its entropies sum to" in file_faults(manifest, less, data, deep=True)[0]


def test_an_entropy_sum_above_the_range_of_float16(work: Path, tmp_path: Path) -> None:
    sizes = ["--shard-tokens", 20_000, "--sequence-length", LENGTH, "--passes", 2]
    large = score_here(work / "corpus.jsonl", work / "teacher", tmp_path / "large", *sizes)
    manifest, data = manifests.read_manifest(str(large)), (large / "part-00000.parquet").read_bytes()
    entry = manifest.shards[0]
    assert entry.entropy_sum > 65_504 and not file_faults(manifest, entry, data, deep=True)
    less = entry.model_copy(update={"entropy_sum": entry.entropy_sum * 0.99})
    assert "its entropies sum to" in file_faults(manifest, less, data, deep=True)[0]


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(work: Path, tempered: Path) -> Path:
    """Targets for ``tempered``, with a temperature; not to be changed."""
    masks = ["--mask-source", "random", "--variants", 2, "--mask-ratio", MASKED / (LENGTH - 2)]
    return score_here(tempered, work / "teacher", work / "targets", *masks, *TOP_4)


def test_targets_are_verified_too(work: Path, targets: Path, tmp_path: Path) -> None:
    output = run(*VERIFY, targets, "--deep")
    assert "of targets" in output and "no faults" in output
    copy = Path(shutil.copytree(targets, tmp_path / "copy"))
    data = bytearray((copy / "part-00000.parquet").read_bytes())
    data[99] ^= 1
    (copy / "part-00000.parquet").write_bytes(data)
    assert "part-00000.parquet: is not the file" in run(*VERIFY, copy, code=1)
    assert "leave out --teacher" in refused(*VERIFY, targets, "--teacher", work / "teacher")


def test_wrong_targets_are_named(targets: Path) -> None:
    manifest = manifests.read_manifest(str(targets), "targets")
    table = manifests.read_table(manifest, manifest.shards[0], parquet.schema_of(manifest).names)
    rows = rows_of(table, MASKED)

    def faults(bad: pa.Table, manifest: Manifest = manifest, rows: MaskedRows = rows) -> list[str]:
        entry, data = recommitted(manifest.shards[0], bad, row_groups(bad, rows))
        return file_faults(manifest, entry, data, deep=True)

    assert not faults(table)
    for name, place, value, fault in (
        ("positions", 0, LENGTH, "has positions past the end"),
        ("positions", 3, 1, "has positions that do not ascend"),
        ("topk_ids", 0, 300, "has top-k ids outside the vocabulary"),
        ("topk_logprobs", 1, 255, "has log-probabilities that are not sorted"),
        ("temperature_lse_2", 0, np.nan, "its temperature_lse_2 must be finite"),
    ):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
        flat[place] = value
        named = faults(replace_list(table, name, flat, list_lengths(table, name)))
        assert any(text.startswith(fault) for text in named), (fault, named)
    numbers = table.schema.get_field_index("variant")
    same = table.set_column(numbers, table.schema.field("variant"), pa.array(np.zeros(len(table), np.uint16)))
    assert any("does not have variants 0 … 1 in each block" in text for text in faults(same))
    short = replace_list(table, "positions", np.ones(len(table)))
    assert any("of another length than its positions" in text for text in faults(short))
    narrow = manifest.model_copy(update={"masks": (manifest.masks or {}) | {"positions": MASKED - 1}})
    assert any(f"masks {MASKED} positions" in text for text in faults(table, narrow))


@pytest.mark.parametrize(("vocab_size", "kind"), [(65_536, pa.uint16()), (65_537, pa.uint32())])
def test_token_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, kind: pa.DataType) -> None:
    manifest = read_manifest(str(write_shards(tmp_path))).model_copy(update={"vocab_size": vocab_size})
    shape, last = (3, manifest.sequence_length), vocab_size - 1
    scores = {name: np.ones(shape, np.float32) for name in parquet.SCORE_COLUMNS}
    scores |= {"topk_ids": np.full((*shape, manifest.top_k), last), "topk_logprobs": np.zeros((*shape, manifest.top_k))}
    table = parquet.to_table(manifest, 0, np.full(shape, last), scores)
    stored = pq.read_table(pa.BufferReader(parquet.to_parquet(parquet.row_groups(table))))
    for name in ("input_ids", "topk_ids"):
        assert stored.schema.field(name).type.value_type == kind
        assert pc.unique(pc.list_flatten(stored[name])).to_pylist() == [last]
