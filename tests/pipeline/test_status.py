"""status.py: what a run's records say, without a cluster and without a model."""

import json
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, refused, run

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests
from pipeline import status, verify
from pipeline.status import duration

STATUS = [sys.executable, str(ROOT / "pipeline" / "status.py")]
NOW = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def under_way(scored: Path, tmp_path: Path) -> Path:
    """The scored shards as a run leaves them that lacks the first three: two of them were begun, one of these twice."""
    directory = Path(shutil.copytree(scored, tmp_path / "under way"))
    (directory / "manifest.json").unlink()
    for index in range(3):
        (directory / "_records" / f"part-{index:05d}.json").unlink()
    (directory / "_attempts").mkdir(exist_ok=True)
    for index, run_name, attempts, age in ((0, "new", 2, 1), (1, "new", 1, 2), (5, "new", 1, 3), (2, "old", 3, 4)):
        note = directory / "_attempts" / f"part-{index:05d}.json"
        note.write_text(json.dumps({"run": run_name, "attempts": attempts}))
        os.utime(note, (NOW.timestamp() - age,) * 2)
    return directory


def stamp(directory: Path, last: datetime) -> list[dict[str, Any]]:
    """Make the records those of shards that took two seconds each, the last one ended at ``last``."""
    records = []
    for number, path in enumerate(sorted(directory.glob("_records/part-*.json"), reverse=True)):
        ended = (last - timedelta(seconds=2 * number)).isoformat(timespec="milliseconds")
        times = {"finished_at": ended, "seconds": 2.0, "forward_seconds": 1.5, "worker": f"node:{number % 2}"}
        records.append(json.loads(path.read_text()) | times)
        path.write_text(json.dumps(records[-1]))
    return records


def test_a_run_under_way(scored: Path, under_way: Path) -> None:
    records = stamp(under_way, datetime.now(UTC) - timedelta(seconds=10))
    total, tokens = len(manifests.read_manifest(str(scored)).shards), sum(record["tokens"] for record in records)
    found = json.loads(run(*STATUS, under_way, "--json"))
    assert (found["finished"], found["done"], found["shards"]) == (False, total - 3, total)
    assert found["unfinished_attempts"] == {"part-00000.parquet": 2, "part-00001.parquet": 1}
    assert found["tokens"] == tokens and found["totals"]["workers"] == 2
    entropy, scored_tokens = (sum(record[name] for record in records) for name in ("entropy_sum", "scored_tokens"))
    assert found["seconds_since_last_shard"] >= 10
    # two seconds a shard
    assert found["tokens_per_second"] == pytest.approx(tokens / 2 / (total - 3), 0.01)
    assert found["remaining_seconds"] == 6
    assert found["totals"]["utilisation"] == pytest.approx(
        sum(r["forward_seconds"] for r in records) / 2 / (total - 4), 0.2
    )

    text = run(*STATUS, under_way)
    assert f"unfinished, {total - 3} of {total} shards" in text and f"  {'tokens':<19} {tokens:,}\n" in text
    assert "part-00000.parquet (2), part-00001.parquet (1)" in text and "rejected documents" in text
    assert f"{entropy / scored_tokens:.3f} nats" in text and "  remaining           6 s of work" in text
    stamp(under_way, datetime.now(UTC) - timedelta(hours=3))
    assert "the last one 3.0 h ago" in run(*STATUS, under_way)


def test_a_finished_run_says_what_its_manifest_says(scored: Path, tmp_path: Path) -> None:
    found = json.loads(run(*STATUS, scored, "--json"))
    manifest = manifests.read_manifest(str(scored))
    assert found["finished"] and found["totals"] == manifest.totals and found["done"] == len(manifest.shards)
    assert sum(worker["shards"] for worker in found["totals"]["by_worker"].values()) == len(manifest.shards)
    shutil.copytree(scored, tmp_path / "copy", ignore=shutil.ignore_patterns("_records"))
    text = run(*STATUS, tmp_path / "copy")
    assert "finished" in text and f"{manifest.totals['tokens']:,}" in text


def test_a_run_that_has_just_begun(under_way: Path) -> None:
    for record in under_way.glob("_records/part-*.json"):
        record.unlink()
    assert "0 of " in (text := run(*STATUS, under_way)) and "remaining" not in text


def test_what_is_no_run_is_refused(scored: Path, tmp_path: Path) -> None:
    assert "not a shard directory" in refused(*STATUS, tmp_path / "missing")
    (tmp_path / "text.txt").write_text("text")
    assert "not a shard directory" in refused(*STATUS, tmp_path)
    (tmp_path / "_records").mkdir()
    (tmp_path / "_records" / "run.json").write_text('{"shards": 3}')
    assert "run.json cannot be read" in refused(*STATUS, tmp_path)


def test_what_is_unreadable_is_refused(
    scored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(uri: str) -> bytes:
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr(storage, "read_bytes", denied)
    monkeypatch.setattr(console.signal, "signal", lambda *_: None)
    for main in (status.main, verify.main):
        with pytest.raises(SystemExit, match=r"^2$"):
            console.run(partial(main, [str(scored)]))
        assert "manifest.json: Permission denied; give this user permission" in capsys.readouterr().err
        with pytest.raises(UsageError, match=r"^an argument is empty; give it a value"):
            main([""])


def test_it_needs_neither_ray_nor_a_model(scored: Path) -> None:
    imported = run(sys.executable, "-X", "importtime", *STATUS[1:], scored)
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "pyarrow" in names and not names & {"ray", "torch", "transformers"}


def test_durations() -> None:
    assert [duration(s) for s in (12.3, 200, 9000, 400000)] == ["12 s", "3 min", "2.5 h", "4.6 d"]
