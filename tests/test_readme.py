"""Every command of the README, run as it stands there, with small sizes appended; and what the demo leaves behind."""

import ast
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from harness import ROOT, shell
from in_process import weights
from made_glue import make_rows, write_rows
from small_models import save_roberta

import pipeline.score
import train.run
from entropy_masking import codes
from entropy_masking.models.checkpoints import load_tokenizer
from entropy_masking.shards.manifests import read_manifest, tokenization_hash
from glue.tasks import GLUE

README = (ROOT / "README.md").read_text()
BLOCKS, IN_ADAPTATION = (
    re.findall(r"```sh\n(.*?)```", text, re.S) for text in (README, (ROOT / "docs" / "adaptation.md").read_text())
)
# appended to a command to make it small
SMALLER = {
    "pipeline/score.py": "--sequence-length 32 --shard-tokens 4000 --passes 2",
    "pipeline/status.py": "",
    "pipeline/verify.py": "",
    "train/explore.py": "",
    "train/run.py": "--max-steps 2 --per-device-train-batch-size 4",
    "glue/run.py": "--epochs 1 --limit-train 8 --max-length 32",
    "glue/compare.py": "",
}
PACKAGES = ("entropy_masking", "pipeline", "train", "glue")


@pytest.fixture(scope="module")
def home(work: Path, data: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's reader has: the project, texts, a teacher, GLUE, a checkpoint and a task."""
    root = tmp_path_factory.mktemp("home")
    for name in PACKAGES:
        (root / name).symlink_to(ROOT / name)
    (root / "texts").mkdir()
    shutil.copy(work / "corpus.jsonl", root / "texts" / "a.jsonl")
    shutil.copytree(work / "teacher", root / "TEACHER")
    (root / "GLUE").symlink_to(data)
    save_roberta(root / "CHECKPOINT", (root / "texts" / "a.jsonl").read_text().splitlines())
    for split, count in (("train", 64), ("dev", 24)):
        rows = make_rows(GLUE["sst2"], words, count, count).rename({"sentence": "text"})
        write_rows(rows, root / "mood" / f"{split}.tsv")
    return root


@pytest.fixture(scope="module")
def demo(home: Path) -> Path:
    """`make demo`, small; the environment that runs the tests takes the place of .venv."""
    sizes = {"OUT": str(home / "runs" / "demo"), "DOCUMENTS": "1200", "STEPS": "4", "PAIRS": "10"}
    output = shell("make -o .venv/installed demo", ROOT, **sizes)
    assert "A run this small shows the machinery. It proves nothing about quality." in output
    return home / "runs" / "demo"


def test_the_commands_are_those_that_are_tested_here() -> None:
    commands = [line for block in BLOCKS for line in block.splitlines()]
    kinds = {" ".join(line.split()[:3]) if line.startswith("ray") else line.split()[1] for line in commands}
    assert kinds == {"demo", "test", *SMALLER, "ray job submit"}
    assert commands[:2] == ["make demo", "make test"]
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


def test_the_code_tour_names_every_directory() -> None:
    """And every module says what it does, which the tour leaves to it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = set(re.findall(rf"^((?:{'|'.join(PACKAGES)})(?:/\w+)*)/  ", text, re.M))
    modules = [path for name in PACKAGES for path in (ROOT / name).rglob("[!_]*.py")]
    assert listed == {str(path.parent.relative_to(ROOT)) for path in modules}
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in modules)


def test_on_your_own_text(home: Path) -> None:
    block = next(block for block in BLOCKS if "TEACHER" in block)
    for line in block.splitlines():
        # a shard directory has sequences of its own length
        shell(line if "--mask-source" in line else f"{line} {SMALLER[line.split()[1]]}", home)
    table = json.loads((home / "runs" / "comparison" / "table.json").read_text())
    assert table["regimes"] == ["random", "parquet"] and len(table["tasks"]) == 9
    assert table["training"]["parquet"]["steps"] == 2


def test_domain_adaptation_and_a_task_of_ones_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 512 tokens. The task fine-tunes the adapted model and the checkpoint, and the two are compared."""
    blocks = [block for block in BLOCKS if "CHECKPOINT" in block]
    small = SMALLER | {"pipeline/score.py": "--shard-tokens 4000 --passes 2"}
    printed = {line: shell(f"{line} {small[line.split()[1]]}", home) for block in blocks for line in block.splitlines()}
    (training,) = (text for line, text in printed.items() if "train/run.py" in line)
    assert "step 0/2: held-out loss" in training and "learning rate 5e-05, warm-up" in training
    table = json.loads((home / "runs" / "mood" / "comparison" / "table.json").read_text())
    assert table["tasks"]["mood"]["scores"]["adapted"]["difference"]["n"] == 1

    monkeypatch.chdir(home)
    mains = {"pipeline/score.py": pipeline.score.main, "train/run.py": train.run.main}
    small |= {"pipeline/score.py": "--shard-tokens 4000 --backend local"}
    for line in (line for block in IN_ADAPTATION for line in block.splitlines()):
        _, script, *flags = shlex.split(line)
        mains[script]([*flags, *shlex.split(small[script])])
    for shards, adapted in (("domain", "adapted"), ("tokens", "adapted-random")):
        manifest, output = read_manifest(f"runs/{shards}"), home / "runs" / adapted
        summary = json.loads((output / "summary.json").read_text())
        assert manifest.sequence_length == 512 and summary["flags"]["learning_rate"] == 5e-5
        assert [entry["step"] for entry in summary["history"] if "eval_loss" in entry] == [0, 1, 2]
        before, after = weights(home / "CHECKPOINT"), weights(output)
        assert all(torch.allclose(after[name], before[name], atol=2e-4) for name in before)  # two steps at 5e-5
        assert any(not torch.equal(after[name], before[name]) for name in before)
        same = {tokenization_hash(load_tokenizer(str(place))) for place in (home / "CHECKPOINT", output)}
        assert len(same) == 1


def test_the_demo_compares_four_students_with_an_untrained_one(demo: Path) -> None:
    table = json.loads((demo / "comparison" / "table.json").read_text())
    assert table["regimes"] == ["untrained", "random", "parquet", "parquet+kd", "self"]
    assert list(table["tasks"]) == ["pairs"] and table["baseline"] == "random"
    untrained, *students = table["training"].items()
    assert untrained[1]["eval_loss"] == pytest.approx(math.log(4096), abs=0.2)
    assert all(row["regime"] == name for name, row in students)
    assert len({(row["steps"], row["tokens"]) for _, row in students}) == 1
    assert "scored" in (demo / "entropy.html").read_text()


def test_the_demos_shards_are_what_the_documents_say(demo: Path) -> None:
    """Columns and types as in docs/shards.md, in polars and datasets; NaN exactly on special tokens and padding."""
    files = str(demo / "scored" / "part-*.parquet")
    manifest = json.loads((demo / "scored" / "manifest.json").read_text())
    length, top_k = manifest["sequence_length"], manifest["top_k"]
    ids = pl.List(pl.UInt16)
    half = pl.List(pl.Float16)
    frame = pl.read_parquet(files)
    assert dict(frame.schema) == {
        **{"sequence_id": pl.UInt64, "input_ids": ids, "entropy": half, "surprisal": half},
        **{"topk_ids": ids, "topk_logprobs": pl.List(pl.UInt8)},
    }
    mean = frame.select(pl.col("entropy").explode().drop_nans().mean()).item()
    assert mean == pytest.approx(manifest["totals"]["entropy_sum"] / manifest["totals"]["scored_tokens"], abs=0.01)
    assert frame.select(pl.col("entropy").cast(pl.List(pl.Float32)).list.mean())["entropy"].is_nan().all()
    schema = pq.read_schema(next((demo / "scored").glob("part-*.parquet")))
    assert not any(field.nullable for field in schema)
    assert not any(field.type.value_field.nullable for field in schema if pa.types.is_list(field.type))

    table = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(demo / "cache")
    ).with_format("numpy")
    assert len(table) == len(frame) == manifest["totals"]["sequences"]
    columns = {name: np.stack([np.asarray(row) for row in table[name]]) for name in table.column_names[1:]}
    assert columns["topk_logprobs"].shape == (len(frame), length * top_k)
    special_NL = np.isin(columns["input_ids"], manifest["special_token_ids"])
    for name in ("entropy", "surprisal"):
        assert np.array_equal(np.isnan(columns[name]), special_NL)
    scored = columns["entropy"][~special_NL].astype(np.float64)
    assert 0 < scored.mean() < math.log(manifest["vocab_size"])
    totals = manifest["totals"]
    assert scored.mean() == pytest.approx(totals["entropy_sum"] / totals["scored_tokens"], abs=0.01)
    assert scored.min() >= 0 and scored.max() <= math.log(manifest["vocab_size"]) + 0.01
    logprobs = codes.decode(columns["topk_logprobs"].reshape(len(frame), length, top_k)[~special_NL])
    assert (np.diff(logprobs) <= 0).all() and (np.exp(logprobs).sum(-1) <= 1.02).all()
