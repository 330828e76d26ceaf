"""verify.py and the checks before training: every damage is named, and nothing is trained on it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import LENGTH, ROOT, SCORE, TOP_K, TRAIN, command, refused, run, save_bert
from transformers import AutoTokenizer

import train.run
from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.faults import Depth, check_shards, contract, manifest_faults, table_faults
from entropy_masking.shards.schema import Manifest, Record, ShardEntry
from entropy_masking.shards.targets import MaskedRows, row_groups, rows_of
from entropy_masking.shards.values import list_lengths

VERIFY = [sys.executable, str(ROOT / "pipeline" / "verify.py")]
MASKED = 5  # positions of a sequence


@pytest.fixture
def copy(scored: Path, tmp_path: Path) -> Path:
    """The scored shards, to be damaged."""
    return Path(shutil.copytree(scored, tmp_path / "copy"))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_files_are_what_the_models_write(scored: Path, copy: Path) -> None:
    """Field by field in this order, so that directories of one version are alike to the byte."""
    named, counted = ["index", "file", "bytes", "sha256"], ["rows", "tokens", "scored_tokens", "entropy_sum"]
    cost = ["fingerprint_hash", "attempt", "forward_seconds", "flops", "device", "worker", "documents", "rejected"]
    for file in sorted(scored.glob("_records/part-*.json")):
        record = Record.model_validate_json(file.read_text())
        assert list(json.loads(file.read_text())) == [*named, *counted, *cost, "seconds", "finished_at"]
        storage.write_json(str(copy / "again.json"), record.to_json())
        assert (copy / "again.json").read_text() == file.read_text()
    manifest = json.loads((scored / "manifest.json").read_text())
    assert list(manifest)[:2] == ["schema_version", "kind"] and list(manifest)[-2:] == ["totals", "versions"]
    assert list(manifest["shards"][0]) == [*named[:2], *counted[:3], *named[2:], counted[3]]
    storage.write_json(str(copy / "again.json"), manifests.read_manifest(str(scored)).model_dump())
    assert (copy / "again.json").read_text() == (scored / "manifest.json").read_text()


# --- damages ---------------------------------------------------------------------------------------------------------


def flip_a_byte(directory: Path) -> None:
    data = bytearray((directory / "part-00002.parquet").read_bytes())
    data[len(data) // 3] ^= 1
    (directory / "part-00002.parquet").write_bytes(data)


def truncate(directory: Path) -> None:
    data = (directory / "part-00002.parquet").read_bytes()
    (directory / "part-00002.parquet").write_bytes(data[:-100])


def lose_a_shard(directory: Path) -> None:
    (directory / "part-00002.parquet").unlink()


def swap_two_shards(directory: Path) -> None:
    first, second = directory / "part-00002.parquet", directory / "part-00003.parquet"
    first.rename(directory / "third")
    second.rename(first)
    (directory / "third").rename(second)


def edit_a_record(directory: Path) -> None:
    edit(directory / "_records" / "part-00002.json", entropy_sum=1.0)


def change_the_tokenizer(directory: Path) -> None:
    definition = json.loads((directory / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition))


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (flip_a_byte, "part-00002.parquet: is not the file that was committed", "part-00002.parquet is not the file"),
    (truncate, "part-00002.parquet: has ", "part-00002.parquet has "),
    (lose_a_shard, "part-00002.parquet: is missing", "part-00002.parquet is missing"),
    (swap_two_shards, "part-00003.parquet: holds sequences of shard 2, not of 3", "part-00002.parquet"),
    (
        edit_a_record,
        "_records/part-00002.json: differs from the manifest in entropy_sum",
        "differs from the manifest in entropy_sum",
    ),
    (change_the_tokenizer, "tokenizer: is not the tokenizer that made the ids", "is not the tokenizer that made"),
]


@pytest.mark.parametrize(("damage", "named", "refusal"), DAMAGES, ids=[damage.__name__ for damage, *_ in DAMAGES])
def test_a_damage_is_named_and_not_trained_on(
    copy: Path, tmp_path: Path, damage: Callable[[Path], None], named: str, refusal: str
) -> None:
    damage(copy)
    output = run(*VERIFY, copy, code=1)
    assert named in output and "Traceback" not in output
    faulty = {line.partition(": ")[0] for line in output.splitlines() if "part-0" in line and line[0] in "p_"}
    assert all("part-00002" in name or "part-00003" in name for name in faulty), output
    flags = ["--entropy-source", "random", "--output-dir", tmp_path / "student", "--max-steps", 1]
    assert refusal in refused(*TRAIN, "--shards", copy, *flags)
    assert not (tmp_path / "student").exists()


def test_the_mend_mends(work: Path, scored: Path, copy: Path) -> None:
    flip_a_byte(copy)
    with pytest.raises(UsageError, match=r"delete its record in _records/ and run pipeline/score.py again"):
        check_shards(manifests.read_manifest(str(copy)))
    (copy / "_records" / "part-00002.json").unlink()
    assert "(1 scored now)" in run(*command(work, copy, "--backend", "local"))
    check_shards(manifests.read_manifest(str(copy)))
    assert (copy / "part-00002.parquet").read_bytes() == (scored / "part-00002.parquet").read_bytes()


def test_what_the_checks_before_training_refuse_and_allow(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests.read_manifest(str(copy))
    check_shards(manifest)
    with pytest.raises(UsageError, match=r"manifest\.json lacks part-00001"):
        check_shards(manifest.model_copy(update={"shards": [manifest.shards[0], *manifest.shards[2:]]}))
    check_shards(
        manifest.model_copy(update={"shards": manifest.shards[1:], "failed": {"part-00000.parquet": "it was given up"}})
    )
    (copy / "_records" / "part-00001.json").write_text("{")
    with pytest.raises(UsageError, match=r"_records/part-00001\.json is missing or unreadable"):
        check_shards(manifest)
    shutil.rmtree(copy / "_records")
    check_shards(manifest)
    rows = [entry.model_copy(update={"rows": entry.rows + 1}) for entry in manifest.shards]
    with pytest.raises(UsageError, match="rows, but its manifest says"):
        check_shards(manifest.model_copy(update={"shards": rows}))

    def denied(uri: str) -> str:
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr(storage, "sha256", denied)
    with pytest.raises(UsageError, match=r"is not readable for this user .*permission to read"):
        check_shards(manifest)


def test_a_run_that_goes_on_trusts_the_bytes_that_its_start_checked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it trains within seconds, whatever the corpus; names, sizes and the tokenizer are looked at again."""
    output, hashed = tmp_path / "student", []
    flags = ["--shards", copy, "--output-dir", output, "--entropy-source", "random", "--eval-fraction", 0]
    argv = [str(flag) for flag in (*flags, "--max-steps", 2, "--save-steps", 1, "--per-device-train-batch-size", 4)]
    original = storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda uri: hashed.append(uri) or original(uri))
    shards = {str(copy / entry.file) for entry in manifests.read_manifest(str(copy)).shards}
    train.run.main(argv)
    assert shards <= set(hashed)

    def start_again(*more: str, checkpoint: bool = True) -> None:
        (output / "summary.json").unlink()
        shutil.rmtree(output / "checkpoint-2")
        if not checkpoint:
            shutil.rmtree(output / "checkpoint-1")
        hashed.clear()
        train.run.main([*argv, *more])

    start_again()
    assert not hashed
    start_again("--overwrite")
    assert shards <= set(hashed)
    start_again(checkpoint=False)
    assert shards <= set(hashed)
    truncate(copy)
    with pytest.raises(UsageError, match=r"part-00002\.parquet has "):
        start_again()


def test_sound_directories_have_no_faults(work: Path, scored: Path, copy: Path) -> None:
    assert "no faults" in run(*VERIFY, scored, "--deep")
    shutil.copy(copy / "part-00000.parquet", copy / "part-99999.parquet")
    shutil.rmtree(copy / "_records")
    output = run(*VERIFY, copy)
    assert "note: part-99999.parquet" in output and "note: there are no records" in output and "no faults" in output


def test_an_unfinished_run_says_how_far_it_is(scored: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    for index in (0, 4):
        (copy / "_records" / f"part-{index:05d}.json").unlink()
    total = len(manifests.read_manifest(str(scored)).shards)
    output = run(*VERIFY, copy, "--deep")
    assert f"unfinished, {total - 2} of {total} shards" in output and "note: part-00004.parquet" in output
    flip_a_byte(copy)
    assert "part-00002.parquet: is not the file that was committed" in run(*VERIFY, copy, code=1)
    assert "not a shard directory" in refused(*VERIFY, tmp_path)
    assert "manifest.json is not a shard directory" in refused(*VERIFY, scored / "manifest.json")


def test_the_manifest_is_checked_against_the_records(copy: Path) -> None:
    totals = json.loads((copy / "manifest.json").read_text())["totals"]
    edit(copy / "manifest.json", totals=totals | {"documents": 399, "worker_seconds": 1e9})
    assert "manifest.json: its totals differ from the records' in documents" in run(*VERIFY, copy, code=1)
    manifest = manifests.read_manifest(str(copy))
    assert not manifest_faults(manifest)
    forged = manifest.fingerprint | {"top_k": 99}
    renamed = [manifest.shards[0].model_copy(update={"index": 1}), *manifest.shards[1:]]
    for fields, fault in (
        ({"planned_shards": 99}, "lacks part-00098.parquet"),
        ({"fingerprint": forged}, "fingerprint_hash is not the hash of its fingerprint"),
        ({"shards": renamed}, "calls shard 1 part-00000.parquet"),
        ({"shards": manifest.shards[::-1]}, "does not list each shard once and in order"),
        ({"sequences_hash": "0"}, "sequences_hash"),
    ):
        assert any(fault in found for found in manifest_faults(manifest.model_copy(update=fields))), fault


def test_a_sample_is_scored_again(work: Path, copy: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", work / "teacher", "--sample", 200]
    assert "200 sequences with the teacher: no faults" in run(*VERIFY, copy, *teacher)
    # what no checksum shows: another teacher's scores, committed as they should be
    manifest = manifests.read_manifest(str(copy))
    table = pq.read_table(copy / "part-00001.parquet")
    entropy = np.abs(parquet.column_2d(table, "entropy", LENGTH) - np.float16(0.1))
    topk_ids = np.flip(parquet.column_2d(table, "topk_ids", LENGTH * TOP_K).reshape(-1, LENGTH, TOP_K), 2)
    changed = replace_list(replace_list(table, "entropy", entropy), "topk_ids", topk_ids)
    for name, width in (("surprisal", LENGTH), ("topk_logprobs", LENGTH * TOP_K)):
        changed = replace_list(changed, name, parquet.column_2d(table, name, width) - np.float16(0.2))
    entry, data = recommitted(manifest.shards[1], changed)
    (copy / entry.file).write_bytes(data)
    edit(copy / "_records" / "part-00001.json", **entry.model_dump())
    entries = [(entry if e.index == 1 else e).model_dump() for e in manifest.shards]
    totals = manifest.totals | {"bytes": sum(e["bytes"] for e in entries)}
    edit(copy / "manifest.json", shards=entries, totals=totals)
    assert "no faults" in run(*VERIFY, copy)
    output = run(*VERIFY, copy, *teacher, code=1)
    assert "part-00001.parquet: has entropies up to 0.1" in output and "different most probable token" in output
    assert "has surprisals up to 0.2" in output and "has log-probabilities up to 0.2" in output
    assert "part-00002" not in output

    save_bert(tmp_path / "other", AutoTokenizer.from_pretrained(work / "tokenizer"))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    assert "other weights" in refused(*VERIFY, copy, "--teacher", tmp_path / "other")
    assert "--sample needs --teacher" in refused(*VERIFY, copy, "--sample", 3)


# --- values ----------------------------------------------------------------------------------------------------------


def recommitted(entry: ShardEntry, table: pa.Table, groups: list[pa.Table] | None = None) -> tuple[ShardEntry, bytes]:
    """What a shard would be that was written so."""
    data = parquet.to_parquet(groups or parquet.row_groups(table))
    fields = {"rows": len(table), "bytes": len(data), "sha256": storage.sha256_bytes(data)}
    return entry.model_copy(update=fields), data


def file_faults(manifest: Manifest, entry: ShardEntry, data: bytes, deep: bool = False) -> list[str]:
    """What is wrong with a shard that has these bytes."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return table_faults(manifest, entry, file, Depth.VALUES if deep else Depth.TABLES)


def replace_list(table: pa.Table, name: str, values: np.ndarray, lengths: np.ndarray | None = None) -> pa.Table:
    """The table with other values in a list column [rows, …], or with rows of the given lengths."""
    field = table.schema.field(name)
    if lengths is None:
        lengths = np.full(len(table), values.reshape(len(table), -1).shape[1])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    flat = pa.array(values.reshape(-1).astype(field.type.value_type.to_pandas_dtype()))
    column = pa.ListArray.from_arrays(offsets, flat, type=field.type)
    return table.set_column(table.schema.get_field_index(name), field, column)


def changed(table: pa.Table, name: str, width: int, place: tuple[int, int], value: float) -> pa.Table:
    values = parquet.column_2d(table, name, width).copy()
    values[place] = value
    return replace_list(table, name, values)


@pytest.fixture(scope="module")
def tempered(work: Path) -> Path:
    """A scored shard with a temperature; not to be changed."""
    flags = ["--backend", "local", "--limit-documents", "60", "--temperatures", "1,2"]
    run(*command(work, work / "tempered", *flags))
    return work / "tempered"


K, L = TOP_K, LENGTH
FIRST = (0, 3 * TOP_K)  # the first row's third word
VALUES: list[tuple[str, int, tuple[int, int], float, str]] = [
    ("input_ids", L, (1, 4), 300, "has token ids outside the vocabulary"),
    ("entropy", L, (1, 4), np.nan, "has entropy at a special token, or none elsewhere"),
    ("entropy", L, (1, 0), 1, "has entropy at a special token, or none elsewhere"),
    ("entropy", L, (1, 4), 5.8, "has entropies outside 0 … 5.70 nats"),
    ("entropy", L, (1, 4), -0.1, "has entropies outside 0 … 5.70 nats"),
    ("surprisal", L, (1, 4), np.nan, "has surprisal at a special token, or none elsewhere"),
    ("surprisal", L, (1, 4), -0.1, "has surprisals below 0"),
    ("topk_ids", L * K, FIRST, 300, "has top-k ids outside the vocabulary"),
    ("topk_logprobs", L * K, FIRST, -9, "has log-probabilities that are not sorted"),
    ("topk_logprobs", L * K, FIRST, 0.5, "has log-probabilities above 0"),
    ("topk_logprobs", L * K, FIRST, 0.0, "has probabilities that sum to more than 1"),
    ("topk_logprobs", L * K, FIRST, np.nan, "has log-probabilities where nothing is scored, or none elsewhere"),
    ("topk_logprobs", L * K, (0, 0), -1, "has log-probabilities where nothing is scored, or none elsewhere"),
    ("temperature_lse_2", L, (1, 4), np.inf, "has temperature_lse_2 that is not finite exactly where it is scored"),
    ("temperature_lse_2", L, (1, 0), 1, "has temperature_lse_2 that is not finite exactly where it is scored"),
]


@pytest.mark.parametrize(("name", "width", "place", "value", "fault"), VALUES, ids=[f"{v[0]}={v[3]}" for v in VALUES])
def test_wrong_values_are_named(
    tempered: Path, name: str, width: int, place: tuple[int, int], value: float, fault: str
) -> None:
    manifest = manifests.read_manifest(str(tempered))
    table = manifests.read_table(manifest, manifest.shards[0], contract(manifest).names)
    entry, data = recommitted(manifest.shards[0], table)
    assert not file_faults(manifest, entry, data, deep=True)
    entry, data = recommitted(entry, changed(table, name, width, place, value))
    assert not file_faults(manifest, entry, data)
    faults = file_faults(manifest, entry, data, deep=True)
    assert any(found.startswith(fault) for found in faults), faults


def test_wrong_tables_are_named(tempered: Path) -> None:
    manifest = manifests.read_manifest(str(tempered))
    table = manifests.read_table(manifest, manifest.shards[0], contract(manifest).names)
    topk_ids = parquet.column_2d(table, "topk_ids", L * K).copy()
    topk_ids[0, FIRST[1] + 1] = topk_ids[FIRST]
    entropy = parquet.column_2d(table, "entropy", L)
    padded = changed(table, "input_ids", L, (0, 4), manifest.special_ids["pad"])
    wide = table.cast(pa.schema([f if f.name != "sequence_id" else f.with_type(pa.int64()) for f in table.schema]))
    numbers = pa.array(table["sequence_id"].to_numpy()[::-1])
    reverse = table.set_column(0, table.schema.field(0), numbers)
    cases: list[tuple[pa.Table, list[pa.Table] | None, str]] = [
        (replace_list(table, "topk_ids", topk_ids), None, "has a top-k id twice at a position"),
        (replace_list(table, "entropy", entropy[:, 1:]), None, f"has entropy of another length than {L}"),
        (padded, None, "has entropy at a special token"),
        (wide, None, "has other columns than the contract"),
        (reverse, None, "its sequence ids are not contiguous (first at row 0)"),
        (table, [table.slice(0, 7), table.slice(7)], "its row groups do not have the sizes"),
    ]
    for bad, groups, fault in cases:
        entry, data = recommitted(manifest.shards[0], bad, groups)
        faults = file_faults(manifest, entry, data, deep=True)
        assert any(found.startswith(fault) for found in faults), (fault, faults)
    entry, data = recommitted(manifest.shards[0], table)
    for field in ("tokens", "scored_tokens"):
        short = entry.model_copy(update={field: getattr(entry, field) - 1})
        assert f"{field.replace('_', ' ')}, not" in file_faults(manifest, short, data, deep=True)[0]
    less = entry.model_copy(update={"entropy_sum": entry.entropy_sum * 0.99})
    assert "its entropies sum to" in file_faults(manifest, less, data, deep=True)[0]


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(work: Path, tempered: Path) -> Path:
    """Targets for ``tempered``, with a temperature; not to be changed."""
    flags = ["--corpus", tempered, "--teacher", work / "teacher", "--output", work / "targets"]
    masks = ["--mask-source", "random", "--variants", 2, "--mask-ratio", MASKED / (LENGTH - 2)]
    scores = ["--top-k", TOP_K, "--temperatures", "1,2", "--dtype", "float32", "--backend", "local"]
    run(*SCORE, *flags, *masks, *scores)
    return work / "targets"


def test_targets_are_verified_too(work: Path, targets: Path, tmp_path: Path) -> None:
    output = run(*VERIFY, targets, "--deep")
    assert "of targets" in output and "no faults" in output
    copy = Path(shutil.copytree(targets, tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    assert "no faults" in run(*VERIFY, copy, "--deep")
    data = bytearray((copy / "part-00000.parquet").read_bytes())
    data[99] ^= 1
    (copy / "part-00000.parquet").write_bytes(data)
    assert "part-00000.parquet: is not the file" in run(*VERIFY, copy, code=1)
    assert "leave out --teacher" in refused(*VERIFY, targets, "--teacher", work / "teacher")


def test_wrong_targets_are_named(targets: Path) -> None:
    manifest = manifests.read_manifest(str(targets), "targets")
    table = manifests.read_table(manifest, manifest.shards[0], contract(manifest).names)
    rows = rows_of(table, MASKED)

    def faults(bad: pa.Table, manifest: Manifest = manifest, rows: MaskedRows = rows) -> list[str]:
        entry, data = recommitted(manifest.shards[0], bad, row_groups(bad, rows))
        return file_faults(manifest, entry, data, deep=True)

    assert not faults(table)
    for name, place, value, fault in (
        ("positions", 0, LENGTH, "has positions past the end"),
        ("positions", 3, 1, "has positions that do not ascend"),
        ("topk_ids", 0, 300, "has top-k ids outside the vocabulary"),
        ("topk_logprobs", 0, -9, "has log-probabilities that are not sorted"),
        ("temperature_lse_2", 0, np.nan, "has temperature_lse_2 that is not finite"),
    ):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
        flat[place] = value
        named = faults(replace_list(table, name, flat, list_lengths(table, name)))
        assert any(text.startswith(fault) for text in named), (fault, named)
    numbers = table.schema.get_field_index("variant")
    same = table.set_column(numbers, table.schema.field("variant"), pa.array(np.zeros(len(table), np.uint16)))
    assert any("variants are not 0 … 1" in text for text in faults(same))
    short = replace_list(table, "positions", np.ones(len(table)))
    assert any("of another length than its positions" in text for text in faults(short))
    narrow = manifest.model_copy(update={"masks": (manifest.masks or {}) | {"positions": MASKED - 1}})
    assert any(f"masks {MASKED} positions" in text for text in faults(table, narrow))
