"""A finished run is finished: the same command again loads no teacher and starts no Ray."""

import os
import subprocess
import sys
from pathlib import Path

from harness import SCORE

from entropy_masking.shards import manifests

SHARDS = 1000
FLAGS = ["--sequence-length", "8", "--passes", "2", "--top-k", "2", "--dtype", "float32", "--batch-tokens", "256"]


def test_a_finished_run_of_a_thousand_shards_resumes_at_once(work: Path, tmp_path: Path) -> None:
    lines = [f'{{"text": "abcde {"fgh" * (number % 7)}"}}\n' for number in range(2 * SHARDS)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    size = (tmp_path / "corpus.jsonl").stat().st_size
    flags = ["--corpus", tmp_path / "corpus.jsonl", "--teacher", work / "teacher", "--output", tmp_path / "scored"]
    flags += [*FLAGS, "--shard-tokens", size // SHARDS // 4]
    subprocess.run([*SCORE, *map(str, flags), "--backend", "local"], check=True, timeout=240)
    found = len(manifests.read_manifest(str(tmp_path / "scored")).shards)
    assert found >= SHARDS

    (tmp_path / "temporary").mkdir()
    elsewhere = {name: str(tmp_path / "temporary") for name in ("TMPDIR", "RAY_TMPDIR")}
    again = [sys.executable, "-X", "importtime", *SCORE[1:], *map(str, flags)]
    result = subprocess.run(again, check=True, timeout=240, capture_output=True, text=True, env=os.environ | elsewhere)
    assert f"{found} shards (0 scored now)" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in imported and not imported & {"ray", "pipeline.worker", "transformers.models.bert.modeling_bert"}
    assert not list((tmp_path / "temporary").iterdir())
