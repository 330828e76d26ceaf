"""Code that comes with a checkpoint or a tokenizer: it runs only with --trust-remote-code, and nothing ever asks."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import LENGTH, save_student_config
from in_process import RANDOM, SMALL

import glue.run
import pipeline.score
import pipeline.verify
import train.explore
import train.run
from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import weights_hash
from entropy_masking.shards.manifests import read_manifest

Main = Callable[[list[str]], object]
CODE = """
from transformers import BertConfig, BertForMaskedLM
open({marker!r}, "w").close()
class Config(BertConfig):
    model_type = "own"
class Model(BertForMaskedLM):
    config_class = Config
"""
MODELS = ("AutoModelForMaskedLM", "AutoModelForSequenceClassification")
OWN = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", **dict.fromkeys(MODELS, "own.Model")}}
OWN_MODEL = {"auto_map": dict.fromkeys(MODELS, "own.Model")}  # transformers has a model of its own for this type
OWN_TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}}


def with_code(source: Path, target: Path, marker: Path, file: str, **changes: object) -> Path:
    """A copy of a directory whose ``file`` names code that leaves ``marker``. A tokenizer is useless without it."""
    shutil.copytree(source, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | changes))
    (target / file).with_name("own.py").write_text(CODE.format(marker=str(marker)))
    if changes == OWN_TOKENIZER:
        (target / file).with_name("tokenizer.json").rename((target / file).with_name("vocab.json"))
    return target


def test_code_runs_only_if_it_is_trusted(
    work: Path, scored: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, out = tmp_path / "ran", tmp_path / "out"
    teacher = with_code(work / "teacher", tmp_path / "teacher", ran, "config.json", **OWN)
    plain = with_code(work / "teacher", tmp_path / "plain", ran, "config.json", **OWN_MODEL)
    tokenizer = with_code(work / "tokenizer", tmp_path / "tokenizer", ran, "tokenizer_config.json", **OWN_TOKENIZER)
    both = with_code(work / "teacher", tmp_path / "both", ran, "tokenizer_config.json", **OWN_TOKENIZER)
    shards = with_code(scored, tmp_path / "shards", ran, "tokenizer/tokenizer_config.json", **OWN_TOKENIZER)
    by_teacher = Path(shutil.copytree(scored, tmp_path / "by teacher"))
    for file in (by_teacher / "manifest.json", by_teacher / "_records" / "run.json"):
        content = json.loads(file.read_text())
        content["fingerprint"]["teacher"] = weights_hash(teacher)
        if "fingerprint_hash" in content:
            content["fingerprint_hash"] = storage.sha256_json(content["fingerprint"])
        file.write_text(json.dumps(content))
    save_student_config(tmp_path / "plain shape", read_manifest(str(scored)).vocab_size)
    shape = with_code(tmp_path / "plain shape", tmp_path / "shape", ran, "config.json", **OWN)

    text = ["--corpus", work / "corpus.jsonl", "--sequence-length", LENGTH, "--output", out, "--backend", "local"]
    again = ["--corpus", shards, "--output", out, "--backend", "local"]
    student = ["--output-dir", out, *SMALL, *RANDOM, "--max-steps", 1]
    tuning = ["--output", out, "--data", data, "--max-length", 32]
    refused: list[tuple[Main, list[object]]] = [
        (pipeline.score.main, [*text, "--teacher", teacher]),
        (pipeline.score.main, [*text, "--teacher", both]),
        (pipeline.score.main, [*text, "--teacher", "none", "--tokenizer", tokenizer]),
        (pipeline.score.main, [*text, "--teacher", teacher, "--tokenizer", work / "tokenizer"]),
        (pipeline.score.main, [*again, "--teacher", work / "teacher"]),
        (pipeline.verify.main, [by_teacher, "--teacher", teacher]),
        (train.run.main, [*student, "--shards", scored, "--model", teacher]),
        (train.run.main, [*student, "--shards", scored, "--model", both]),
        (train.run.main, [*student, "--shards", scored, "--model", shape]),
        (train.run.main, [*student, "--shards", scored, "--model", shape / "config.json"]),
        (train.run.main, [*student, "--shards", shards]),
        (train.run.main, [*student, "--shards", shards, "--mask-unit", "word"]),
        (train.explore.main, [shards]),
        *((glue.run.main, [*tuning, "--tasks", "rte", "--model", model]) for model in (teacher, both)),
    ]
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO("y\n" * 100))
    for main, flags in refused:
        with pytest.raises(UsageError, match=r"it brings its own code|cannot load the tokenizer") as caught:
            main([str(flag) for flag in flags])
        assert "\n" not in str(caught.value)
    assert not out.exists() and pipeline.verify.main([str(shards)]) == 1
    train.run.main([str(flag) for flag in (*student, "--shards", scored, "--model", plain, "--dry-run")])
    small = ["--output", tmp_path / "by plain", "--limit-documents", 3]
    pipeline.score.main([str(flag) for flag in (*text, "--teacher", plain, *small)])
    assert stdin.tell() == 0, "something asked"
    assert not ran.exists(), "code ran"

    for model in (shape, teacher):
        flags = [*student, "--shards", scored, "--model", model, "--trust-remote-code", "--dry-run"]
        train.run.main([str(flag) for flag in flags])
        assert ran.exists() and stdin.tell() == 0
        ran.unlink()
