"""verify.py and the checks before training: every damage to a directory is named, and nothing is trained on it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import LENGTH, ROOT, TOP_K, command, refused, run, save_bert
from in_process import RANDOM, train_here
from tables import recommitted, replace_list
from transformers import AutoTokenizer

import pipeline.verify
from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.schema import Record

VERIFY = [sys.executable, str(ROOT / "pipeline" / "verify.py")]


@pytest.fixture
def copy(scored: Path, tmp_path: Path) -> Path:
    """The scored shards, to be damaged."""
    return Path(shutil.copytree(scored, tmp_path / "copy"))


def verified(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What verify.py prints in this process; it must end with this exit code."""
    capsys.readouterr()
    assert pipeline.verify.main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    named: str,
    refusal: str,
) -> None:
    damage(copy)
    output = verified(capsys, copy, code=1)
    assert named in output
    faulty = {line.partition(": ")[0] for line in output.splitlines() if "part-0" in line and line[0] in "p_"}
    assert all("part-00002" in name or "part-00003" in name for name in faulty), output
    with pytest.raises(UsageError) as caught:
        train_here(copy, tmp_path / "student", *RANDOM, "--max-steps", 1)
    assert refusal in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "student").exists()


def test_the_fix_in_the_message_works(work: Path, scored: Path, copy: Path, tmp_path: Path) -> None:
    flip_a_byte(copy)
    with pytest.raises(UsageError, match=r"delete its record in _records/ and run pipeline/score\.py again"):
        train_here(copy, tmp_path / "student", *RANDOM, "--max-steps", 1)
    (copy / "_records" / "part-00002.json").unlink()
    assert "(1 scored now)" in run(*command(work, copy, "--backend", "local"))
    check_shards(manifests.read_manifest(str(copy)))
    assert (copy / "part-00002.parquet").read_bytes() == (scored / "part-00002.parquet").read_bytes()


def test_what_the_checks_before_training_refuse_and_allow(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests.read_manifest(str(copy))
    check_shards(manifest)
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


def test_a_resumed_run_trusts_the_bytes_that_were_checked_when_it_began(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it trains within seconds, however large the corpus is. Names, sizes and the tokenizer are checked again."""
    output, hashed = tmp_path / "student", []
    flags = [*RANDOM, "--eval-fraction", 0, "--max-steps", 2, "--save-steps", 1]
    original = storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda uri: hashed.append(uri) or original(uri))
    shards = {str(copy / entry.file) for entry in manifests.read_manifest(str(copy)).shards}
    train_here(copy, output, *flags)
    assert shards <= set(hashed)

    def start_again(*more: str, checkpoint: bool = True) -> None:
        (output / "summary.json").unlink()
        shutil.rmtree(output / "checkpoint-2")
        if not checkpoint:
            shutil.rmtree(output / "checkpoint-1")
        hashed.clear()
        train_here(copy, output, *flags, *more)

    start_again()
    assert not hashed
    start_again("--overwrite")
    assert shards <= set(hashed)
    start_again(checkpoint=False)
    assert shards <= set(hashed)
    truncate(copy)
    with pytest.raises(UsageError, match=r"part-00002\.parquet has "):
        start_again()


@pytest.mark.parametrize(
    "broken",
    [
        {"special_ids": {}},
        {"special_ids": {"pad": "0", "cls": 1, "sep": 2, "mask": 3}},
        {"special_token_ids": None},
        {"vocab_size": "many"},
        {"shards": [{"index": 0}]},
        {"totals": []},
        {"totals": {}},
        {"fingerprint": {}},
        {"masks": {"source": "parquet"}},
        {"sequence_length": -3},
        {"schema_version": 1},
        {"unknown": 0},
    ],
)
def test_a_broken_manifest_is_refused(scored: Path, tmp_path: Path, broken: dict[str, Any]) -> None:
    shutil.copytree(scored, tmp_path / "shards")
    manifest = json.loads((scored / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest | broken))
    sentence = "format has version 1, but" if "schema_version" in broken else "is not a shard manifest"
    with pytest.raises(UsageError, match=sentence):
        train_here(tmp_path / "shards", tmp_path / "out", *RANDOM, "--max-steps", 1)


# --- the command -----------------------------------------------------------------------------------------------------


def test_sound_directories_have_no_faults(work: Path, scored: Path, copy: Path) -> None:
    assert "no faults" in run(*VERIFY, scored, "--deep")
    shutil.copy(copy / "part-00000.parquet", copy / "part-99999.parquet")
    shutil.rmtree(copy / "_records")
    output = run(*VERIFY, copy)
    assert "no faults" in output


def test_what_is_not_finished_is_not_verified(scored: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    assert "is unfinished" in refused(*VERIFY, copy)
    assert "not a shard directory" in refused(*VERIFY, tmp_path)
    assert "manifest.json is not a shard directory" in refused(*VERIFY, scored / "manifest.json")


def test_the_manifest_is_checked_against_the_records(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = json.loads((copy / "manifest.json").read_text())["totals"]
    edit(copy / "manifest.json", totals=totals | {"documents": 399, "worker_seconds": 1e9})
    assert "manifest.json: its totals differ from the records' in documents" in verified(capsys, copy, code=1)
    edit(copy / "manifest.json", vocab_size=9999)
    output = verified(capsys, copy, code=1)
    assert "manifest.json: does not match its tokenizer in vocab_size; delete it and run pipeline/score.py" in output


def test_the_files_are_what_the_models_write(scored: Path, copy: Path) -> None:
    """Field by field in this order, so that directories of one version are alike to the byte."""
    named, counted = ["index", "file", "bytes", "sha256"], ["rows", "tokens", "scored_tokens", "entropy_sum"]
    cost = ["fingerprint_hash", "attempt", "forward_seconds", "flops", "device", "worker", "documents"]
    cost += ["longest_document", "rejected"]
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


def test_a_sample_is_scored_again(work: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--teacher", str(work / "teacher"), "--sample", "200"]
    assert "200 sequences with the teacher: no faults" in verified(capsys, copy, *teacher)
    # the scores of another teacher in sound files: no checksum shows them
    manifest = manifests.read_manifest(str(copy))
    table = pq.read_table(copy / "part-00001.parquet")
    entropy = np.abs(parquet.column_2d(table, "entropy", LENGTH) - np.float16(0.1))
    topk_ids = np.flip(parquet.column_2d(table, "topk_ids", LENGTH * TOP_K).reshape(-1, LENGTH, TOP_K), 2)
    changed = replace_list(replace_list(table, "entropy", entropy), "topk_ids", topk_ids)
    for name, width, change in (
        ("surprisal", LENGTH, np.float16(-0.2)),
        ("topk_logprobs", LENGTH * TOP_K, np.uint8(1)),
    ):
        changed = replace_list(changed, name, parquet.column_2d(table, name, width) + change)
    entry, data = recommitted(manifest.shards[1], changed)
    (copy / entry.file).write_bytes(data)
    edit(copy / "_records" / "part-00001.json", **entry.model_dump())
    entries = [(entry if e.index == 1 else e).model_dump() for e in manifest.shards]
    totals = manifest.totals | {"bytes": sum(e["bytes"] for e in entries)}
    edit(copy / "manifest.json", shards=entries, totals=totals)
    verified(capsys, copy)
    output = verified(capsys, copy, *teacher, code=1)
    assert "part-00001.parquet: has entropies up to 0.1" in output and "different most probable token" in output
    assert "has surprisals up to 0.2" in output and "has log-probabilities up to" in output
    assert "part-00002" not in output

    save_bert(tmp_path / "other", AutoTokenizer.from_pretrained(work / "tokenizer"))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    for flags, sentence in (
        (["--teacher", str(tmp_path / "other")], "did not score"),
        (["--sample", "3"], "--sample needs"),
    ):
        with pytest.raises(UsageError, match=sentence):
            pipeline.verify.main([str(copy), *flags])
