"""An object store as input and output: moto's S3 server, through the entry points, with a kill and a resume."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
from harness import LENGTH, ROOT, SCORE, TOP_K, TRAIN, run
from moto.server import ThreadedMotoServer
from trap import save_trap

from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests

BUCKET = "corpora"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of a server on loopback; the usual environment variables lead everything there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


def test_a_wrong_uri_is_named_with_its_own_error() -> None:
    with pytest.raises(UsageError, match=r"cannot open s3://name:x@@/a .*syntax error.*; check the URI"):
        storage.resolve("s3://name:x@@/a")


def objects(s3: Any, prefix: str) -> dict[str, bytes]:
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    found = {}
    for key in (each["Key"] for each in listed):
        with contextlib.suppress(s3.exceptions.NoSuchKey):  # a note that its worker has deleted since the listing
            found[key] = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return found


def score(work: Path, teacher: Path, output: str, *more: str) -> list[str]:
    flags = ["--corpus", f"s3://{BUCKET}/text/corpus.jsonl", "--teacher", teacher, "--output", output]
    sizes = ["--sequence-length", LENGTH, "--top-k", TOP_K, "--shard-tokens", 1500, "--batch-tokens", 1024]
    return [*SCORE, *map(str, flags + sizes), "--dtype", "float32", "--trust-remote-code", *more]


def test_from_s3_to_s3_killed_and_resumed(s3: Any, work: Path, scored: Path, tmp_path: Path) -> None:
    s3.upload_file(str(work / "corpus.jsonl"), BUCKET, "text/corpus.jsonl")
    teacher = save_trap(work / "teacher", tmp_path / "teacher", "none", seconds_a_forward=0.02)
    arguments = score(work, teacher, f"s3://{BUCKET}/scored", "--backend", "local")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = 0
    while done < 4:
        assert process.poll() is None, process.communicate()[0].decode()
        found = objects(s3, "scored/")
        done = sum("_records/part-" in key for key in found)
        for key, data in found.items():  # whatever a reader sees at any moment is whole
            if key.endswith(".parquet"):
                assert pq.read_metadata(io.BytesIO(data)).num_rows >= 0
            elif key.endswith(".json"):
                json.loads(data)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {key: data for key, data in objects(s3, "scored/").items() if "_records/part-" in key}
    assert "scored/manifest.json" not in objects(s3, "scored/")
    assert "is unfinished" in run(*TRAIN, *student(tmp_path), code=2)

    run(*arguments)
    after = objects(s3, "scored/")
    assert {key: after[key] for key in before} == before, "a shard that was done was scored again"
    manifest = manifests.read_manifest(f"s3://{BUCKET}/scored")
    local = manifests.read_manifest(str(scored))
    assert [entry.sha256 for entry in manifest.shards] == [entry.sha256 for entry in local.shards]
    assert "(0 scored now)" in run(*arguments)

    for script in ("status.py", "verify.py"):
        run(sys.executable, ROOT / "pipeline" / script, f"s3://{BUCKET}/scored")
    run(*TRAIN, *student(tmp_path))
    assert (tmp_path / "student" / "summary.json").exists()


def student(tmp_path: Path) -> list[object]:
    flags = ["--shards", f"s3://{BUCKET}/scored", "--entropy-source", "parquet", "--output-dir", tmp_path / "student"]
    return [*flags, "--max-steps", 2, "--per-device-train-batch-size", 8, "--dataloader-num-workers", 1]


@pytest.mark.exhaustive
def test_ray_workers_write_to_s3(s3: Any, work: Path, scored: Path) -> None:
    s3.upload_file(str(work / "corpus.jsonl"), BUCKET, "text/corpus.jsonl")
    run(*score(work, work / "teacher", f"s3://{BUCKET}/ray", "--workers", "2"))
    manifest = manifests.read_manifest(f"s3://{BUCKET}/ray")
    assert [e.sha256 for e in manifest.shards] == [e.sha256 for e in manifests.read_manifest(str(scored)).shards]


def test_another_object_under_the_same_name_is_another_corpus(s3: Any, work: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="text/corpus.jsonl", Body=b'{"text": "abcd efgh"}\n')
    arguments = score(work, work / "teacher", f"s3://{BUCKET}/small", "--backend", "local")
    run(*arguments)
    s3.put_object(Bucket=BUCKET, Key="text/corpus.jsonl", Body=b'{"text": "abcd efga"}\n')
    assert "was made with other settings" in run(*arguments, code=2)


def test_mistakes_with_stores_are_one_sentence(s3: Any, work: Path) -> None:
    assert os.environ["AWS_ENDPOINT_URL"]
    output = run(*score(work, work / "teacher", f"s3://{BUCKET}/o", "--corpus", f"s3://{BUCKET}/none.jsonl"), code=2)
    assert "does not exist" in output and "Traceback" not in output
    output = run(*score(work, work / "teacher", "s3://nobody/o", "--backend", "local", *corpus(work)), code=2)
    assert "nobody" in output and "Traceback" not in output


def corpus(work: Path) -> list[str]:
    return ["--corpus", str(work / "corpus.jsonl")]
