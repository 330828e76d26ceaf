"""What glue/compare.py refuses to compare: one sentence each, exit code 2, and nothing written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, refused
from made_results import compare_here, summary, write_results

from entropy_masking.errors import UsageError

COMPARE = [sys.executable, str(ROOT / "glue" / "compare.py")]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "sst3"},
        {"metrics": {"accuracy": 0.5}},
        {"metrics": {"accuracy": 0.5, "f1": None}},
        {"score": None},
        {"score": float("nan")},
        {"seconds": float("inf")},
        {"train_rows": ...},
        {"training": ...},
    ],
)
def test_an_incomplete_result(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_results(tmp_path / "a", {"mrpc": {1: 0.5}}, None) / "mrpc-seed1.json"
    result = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in result.items() if value is not ...}))
    with pytest.raises(UsageError, match=r"mrpc-seed1.json is not a result of this glue/run.py"):
        compare_here(tmp_path / "out", f"a={tmp_path / 'a'}")


def test_a_name_of_two_lines(tmp_path: Path) -> None:
    write_results(tmp_path / "a", {"rte": {1: 0.5}}, None)
    with pytest.raises(UsageError, match=r"is not NAME=DIR"):
        compare_here(tmp_path / "out", f"a\nb={tmp_path / 'a'}")


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    """A sentence names the problem and how to fix it."""
    two = {"cola": {1: 0.5, 2: 0.5}, "rte": {1: 0.5, 2: 0.5}}

    def case(name: str, scores: dict[str, dict[int, float]] = two, training: Any = None, **key: Any) -> str:
        return f"{name.split('/')[0]}={write_results(tmp_path / name, scores, training, **key)}"

    one = case("one")
    other = summary("parquet", 2)
    other["flags"]["learning_rate"] = 2e-3
    mixed = case("mixed")
    path = tmp_path / "mixed" / "cola-seed2.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"key": {**result["key"], "model_hash": "x"}}))
    epochs = {"settings": {"1": {"learning_rate": 4e-5, "epochs": 6}}}
    seeded = case("seeded/1", training=summary("parquet", 1))
    taught = case("taught/1", training=summary("parquet+kd", 1))
    fewer = summary("parquet+kd", 2)["targets"] | {"variants": 1}
    cases: list[tuple[list[str], str]] = [
        ([one, "--average", "local6"], "the average local6 needs sst2, mrpc, stsb, qnli; run what is missing"),
        ([one, case("tasks", {"cola": two["cola"]})], "one has the task rte, but tasks does not"),
        ([one, case("seeds", {task: {3: 0.5} for task in two})], "cola has seeds 1, 2 in one but 3 in seeds"),
        (
            [one, case("epochs", **epochs)],
            r"cola was fine-tuned differently in one and epochs \(settings.1.epochs: 5 → 6\)",
        ),
        ([one, case("data", data_hash="x")], "fine-tuned differently in one and data"),
        ([mixed], "results of 2 models"),
        ([f"none={tmp_path / 'nothing'}"], "holds no results"),
        ([str(tmp_path)], "is not NAME=DIR"),
        (["a=b,"], "is not NAME=DIR"),
        ([one, "--baseline", "two"], "--baseline two is not one of the regimes one"),
        ([one, case("one/again")], "are both of pretraining seed 0, or do not say how their models were pretrained"),
        ([seeded, case("seeded/2", training=summary("parquet", 1))], "are both of pretraining seed 1"),
        ([seeded, case("seeded/3", training=other)], r"pretrained differently \(learning_rate: 0.001 → 0.002\)"),
        (
            [seeded, case("seeded/5", training=summary("parquet", 2, training_flops=10**15))],
            r"pretrained differently \(training_flops: 30000000000 → 1000000000000000\)",
        ),
        (
            [taught, case("taught/2", training=summary("parquet+kd", 2) | {"targets": fewer})],
            r"pretrained differently \(targets.variants: 4 → 1\)",
        ),
        (
            [seeded, case("seeded/4", {"cola": two["cola"], "rte": {1: 0.5}}, summary("parquet", 3))],
            "rte has seeds 1, 2 in .*seeded/1 but 1 in .*seeded/4; run the same seeds in both",
        ),
    ]
    for arguments, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            compare_here(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    assert "fine-tuned differently" in refused(*COMPARE, one, f"epochs={tmp_path / 'epochs'}", "--output", tmp_path)
