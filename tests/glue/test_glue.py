"""glue/run.py as its users run it: all tasks and file forms, skip, kill, misuse."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from harness import ROOT, refused, run, save_bert
from made_glue import make_rows, write_rows
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import glue.run
import glue.tasks
from entropy_masking.errors import RunError, UsageError
from glue.options import parse
from glue.protocols import grid_of
from glue.tasks import GLUE

GLUE_RUN = [sys.executable, str(ROOT / "glue" / "run.py")]
QUICK = ["--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--max-length", 32, "--dtype", "float32"]


@pytest.fixture(scope="module")
def results(work: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks; not to be changed."""
    output = tmp_path_factory.mktemp("results") / "teacher"
    flags = ["--model", work / "teacher", "--tasks", "glue", "--data", data, "--seeds", "1,2", "--output", output]
    run(*GLUE_RUN, *flags, *QUICK)
    return output


def glue_here(model: Path, output: Path, *flags: object) -> dict[str, dict[str, Any]]:
    """run.py's main in this process; returns the results by file."""
    glue.run.main([str(flag) for flag in ("--model", model, "--output", output, *flags)])
    return read(output)


def read(output: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(output.glob("*.json"))}


def test_all_nine_tasks(results: Path, data: Path) -> None:
    found = read(results)
    assert set(found) == {f"{task}-seed{seed}" for task in GLUE for seed in (1, 2)}
    metrics = {
        **{"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]},
        **{"stsb": ["pearson", "spearman"], "mnli": ["accuracy_matched", "accuracy_mismatched"]},
    }
    for result in found.values():
        task = result["task"]
        assert list(result["metrics"]) == metrics.get(task, ["accuracy"])
        assert result["score"] == pytest.approx(100 * np.mean(list(result["metrics"].values())))
        assert result["train_rows"] == 64 and result["eval_rows"] == (48 if task == "mnli" else 24)
        assert result["train_split"] == ("train_subset" if task == "qnli" else "train")
        assert result["settings"]["epochs"] == 1 and result["settings"]["dropout"] == 0.1
        assert result["training"] is None, "the teacher was not trained by run.py"
    assert found["cola-seed1"]["metrics"] != found["cola-seed2"]["metrics"] or (
        found["stsb-seed1"]["metrics"] != found["stsb-seed2"]["metrics"]
    )


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_a_task_that_can_be_learned_is_learned(work: Path, words: list[str], tmp_path: Path, task: str) -> None:
    write_rows(make_rows(GLUE[task], words, 512, 1), tmp_path / "data" / task / "train.jsonl")
    for suffix in GLUE[task].evaluations:
        write_rows(make_rows(GLUE[task], words, 64, 2), tmp_path / "data" / task / f"dev{suffix}.jsonl")
    flags = ["--tasks", task, "--data", tmp_path / "data", *QUICK, "--epochs", 12]
    (result,) = glue_here(work / "teacher", tmp_path / "out", *flags).values()
    assert result["score"] > 80 > result["constant_score"] and not result["collapsed"]


def test_done_is_skipped_and_what_is_missing_comes_out_the_same(
    work: Path, data: Path, results: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in results.glob("*.json"):
        if path.name != "rte-seed2.json":
            (copy / path.name).write_bytes(path.read_bytes())
    flags = ["--model", work / "teacher", "--tasks", "glue", "--data", data, "--seeds", "1,2", "--output", copy]
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert "17 of 18 results exist already" in run(*GLUE_RUN, *flags, *QUICK)
    assert {name: (copy / name).stat().st_mtime_ns for name in before} == before
    old, new = (read(path)["rte-seed2"] for path in (results, copy))
    assert {**old, "seconds": 0} == {**new, "seconds": 0}

    again = [str(flag) for flag in (*flags, *QUICK)]
    with pytest.raises(UsageError, match=r"has other settings .settings.1.epochs: 1 → 2.*; .*--overwrite"):
        glue.run.main([*again, "--epochs", "2"])
    result = json.loads((copy / "cola-seed1.json").read_text())
    for damaged in ("{", "[]", json.dumps({"key": result["key"]}), json.dumps({**result, "seconds": None})):
        (copy / "cola-seed1.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"cola-seed1.json is not a result of glue/run.py; .* --overwrite"):
            glue.run.main(again)
    glue_here(work / "teacher", copy, "--tasks", "cola", "--data", data, *QUICK, "--epochs", 2, "--overwrite")
    assert read(copy)["cola-seed1"]["settings"]["epochs"] == 2


def test_results_that_are_deleted_in_mid_run(
    work: Path, data: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    flags = ["--tasks", "rte", "--data", data, "--seeds", "1,2", *QUICK]
    monkeypatch.setattr(glue.run, "summary_line", lambda result: result["seed"] == 1 and shutil.rmtree(output))
    with pytest.raises(RunError, match=r"flags.yaml was deleted during the run; run the command again"):
        glue_here(work / "teacher", output, *flags)
    monkeypatch.undo()
    found = glue_here(work / "teacher", output, *flags)
    expected = read(results)
    assert {name: result["metrics"] for name, result in found.items()} == {
        name: expected[name]["metrics"] for name in ("rte-seed1", "rte-seed2")
    }


def test_a_killed_run_goes_on(work: Path, data: Path, results: Path, tmp_path: Path) -> None:
    flags = ["--model", work / "teacher", "--tasks", "cola,rte,wnli", "--data", data, "--seeds", "1,2"]
    command = [str(part) for part in [*GLUE_RUN, *flags, *QUICK, "--output", tmp_path]]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("*.json"))) < 6
    assert "results exist already" in run(*command)
    whole = read(results)
    for name, result in read(tmp_path).items():
        assert {**result, "seconds": 0} == {**whole[name], "seconds": 0}


def test_limits_of_a_protocol_and_of_the_user(work: Path, words: list[str], tmp_path: Path) -> None:
    for name in ("qqp", "rte"):
        write_rows(make_rows(GLUE[name], words, 64, 1), tmp_path / "data" / name / "train.parquet")
        write_rows(make_rows(GLUE[name], words, 8, 2), tmp_path / "data" / name / "dev.parquet")
    model = work / "teacher"
    limits = {name: grid_of("babylm", name, {})[0].limit_train for name in ("qqp", "rte")}
    assert limits == {"qqp": 10_000, "rte": None}
    flags = ["--tasks", "qqp,rte", "--data", tmp_path / "data", *QUICK]
    found = glue_here(model, tmp_path / "all", *flags, "--limit-train", 16)
    assert [result["train_rows"] for result in found.values()] == [16, 16]


def test_rows_that_are_trained_and_evaluated_on(
    work: Path, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are counted and said, by their texts, whatever their labels; and not trained on if so asked."""
    train, dev = make_rows(GLUE["stsb"], words, 64, 1), make_rows(GLUE["stsb"], words, 24, 2)
    leaked = pl.concat([train[:6].with_columns(label=pl.lit(0.5)), dev[6:]])
    flags = ["--tasks", "stsb", "--data", tmp_path / "data", *QUICK]
    write_rows(train, tmp_path / "data" / "stsb" / "train.parquet")
    write_rows(leaked, tmp_path / "data" / "stsb" / "dev.parquet")
    found = glue_here(work / "teacher", tmp_path / "as-it-is", *flags)["stsb-seed1"]
    assert (found["train_rows"], found["eval_rows"], found["overlap"]) == (64, 24, 6)
    assert "stsb: 6 of 24 evaluation rows are also training rows; see --drop-overlap" in capfd.readouterr().err
    found = glue_here(work / "teacher", tmp_path / "dropped", *flags, "--drop-overlap")["stsb-seed1"]
    assert (found["train_rows"], found["eval_rows"], found["overlap"]) == (58, 24, 0)
    assert "also training rows" not in capfd.readouterr().err
    write_rows(train, tmp_path / "data" / "stsb" / "dev.parquet")
    with pytest.raises(UsageError, match="all training rows of stsb are also evaluation rows"):
        glue_here(work / "teacher", tmp_path / "none", *flags, "--drop-overlap")


@pytest.mark.parametrize("label", [77.0, -0.5, float("inf")])
def test_a_likeness_out_of_range(words: list[str], tmp_path: Path, label: float) -> None:
    rows = make_rows(GLUE["stsb"], words, 4, 1)
    for split in ("train", "dev"):
        write_rows(rows.with_columns(label=pl.lit(label)), tmp_path / "stsb" / f"{split}.parquet")
    with pytest.raises(UsageError, match=rf"has the label {label} in row 1; the labels are numbers from 0 to 5"):
        glue.tasks.load(GLUE["stsb"], str(tmp_path))


def test_from_the_hub(
    work: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """The same code as for the Hub on a local dataset with a configuration a task; labels are named there."""
    configurations = []
    for name in ("rte", "mnli"):
        splits = {"train": 64} | {f"validation{suffix}": 24 for suffix in GLUE[name].evaluations}
        for number, (split, count) in enumerate(splits.items()):
            write_rows(make_rows(GLUE[name], words, count, 1 + number), tmp_path / "hub" / name / f"{split}.jsonl")
        files = "".join(f"      - split: {split}\n        path: {name}/{split}.jsonl\n" for split in splits)
        configurations.append(f"  - config_name: {name}\n    data_files:\n{files}")
    (tmp_path / "hub" / "README.md").write_text("---\nconfigs:\n" + "".join(configurations) + "---\n")
    monkeypatch.setattr(glue.tasks, "HUB_NAME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = glue_here(work / "teacher", tmp_path / "out", "--tasks", "rte,mnli", "--data", "hub", *QUICK)
    assert found["rte-seed1"]["train_rows"] == 64 and found["mnli-seed1"]["eval_rows"] == 48
    with pytest.raises(UsageError, match=r"cannot load .* cola .train. from the Hub"):
        glue_here(work / "teacher", tmp_path / "out", "--tasks", "cola", "--data", "hub", *QUICK)


def test_label_order_is_set_not_inferred(words: list[str], tmp_path: Path) -> None:
    """Names and numbers of the labels mean the same, whichever comes first in a file."""
    frame = pl.DataFrame({"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"]})
    for labels in (["not_entailment", "entailment", "not_entailment"], [1, 0, 1], ["1", "0", "1"]):
        write_rows(frame.with_columns(label=pl.Series(labels)), tmp_path / "rte" / "train.jsonl")
        write_rows(frame.with_columns(label=pl.Series(labels)), tmp_path / "rte" / "dev.jsonl")
        assert glue.tasks.load(GLUE["rte"], str(tmp_path)).train["label"].to_list() == [1, 0, 1]


def test_quotation_marks_in_tsv_are_characters(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "sst2" / f"{split}.tsv").write_text('sentence\tlabel\n"half a quote\t1\nit\'s "fine"\t0\n')
    loaded = glue.tasks.load(GLUE["sst2"], str(tmp_path))
    assert loaded.train.rows() == [('"half a quote', 1), ('it\'s "fine"', 0)]


def test_an_empty_field_of_a_tsv_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "rte" / f"{split}.tsv").write_text("sentence1\tsentence2\tlabel\na\t\t1\n\tb\t0\n")
    assert glue.tasks.load(GLUE["rte"], str(tmp_path)).train.rows() == [("a", "", 1), ("", "b", 0)]


def test_mnli_without_its_mismatched_evaluation(work: Path, words: list[str], tmp_path: Path) -> None:
    """``mnli`` names the file that is missing; ``mnli_matched`` reads the same directory and does without it."""
    for split in ("train", "dev_matched"):
        write_rows(make_rows(GLUE["mnli"], words, 24, 1), tmp_path / "data" / "mnli" / f"{split}.parquet")
    flags = ["--data", tmp_path / "data", *QUICK]
    with pytest.raises(UsageError, match="dev_mismatched"):
        glue_here(work / "teacher", tmp_path / "out", "--tasks", "mnli", *flags)
    found = glue_here(work / "teacher", tmp_path / "out", "--tasks", "mnli_matched", *flags)
    assert list(found["mnli_matched-seed1"]["metrics"]) == ["accuracy_matched"]


def test_other_data_of_the_same_size_is_other_data(work: Path, words: list[str], tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_rows(make_rows(GLUE["rte"], words, 16, 1), tmp_path / "data" / "rte" / f"{split}.parquet")
    flags = ["--tasks", "rte", "--data", tmp_path / "data", *QUICK]
    glue_here(work / "teacher", tmp_path / "out", *flags)
    glue_here(work / "teacher", tmp_path / "out", *flags)
    write_rows(make_rows(GLUE["rte"], words, 16, 2), tmp_path / "data" / "rte" / "dev.parquet")
    with pytest.raises(UsageError, match=r"rte-seed1.json has other settings .data_hash: "):
        glue_here(work / "teacher", tmp_path / "out", *flags)


def test_mistakes(work: Path, data: Path, tmp_path: Path) -> None:
    """Each is one sentence with the thing and the mend, exit code 2."""
    model, out = ["--model", work / "teacher"], ["--output", tmp_path / "out"]

    def table(name: str, frame: pl.DataFrame) -> list[object]:
        for split in ("train", "dev"):
            write_rows(frame, tmp_path / name / "cola" / f"{split}.jsonl")
        return ["--tasks", "cola", "--data", tmp_path / name]

    good = pl.DataFrame({"sentence": ["a", "b"], "label": [0, 1]})
    cases: list[tuple[list[object], str]] = [
        ([*model, "--tasks", "cola"], "needs --data"),
        ([*model, "--tasks", "cola", "--data", tmp_path / "nothing"], "there is no directory"),
        ([*model, "--tasks", "sst3", "--data", data], "there is no task 'sst3'"),
        ([*model, "--tasks", "pairs", "--data", data], "no task of this run reads --data"),
        ([*model, "--tasks", "cola", "--data", data, "--seeds", "one"], "not a list of whole numbers"),
        ([*model, "--tasks", "cola", "--data", data, "--seeds=-1"], "--seeds -1 is not between 0 and"),
        ([*model, "--tasks", "cola", "--data", data, "--seeds=1,5000000000"], "--seeds 5000000000 is not between 0"),
        ([*model, "--tasks", "cola", "--data", data, "--seeds=1,2,1"], "has a seed twice"),
        (
            [*model, "--tasks", "cola", "--data", data, "--max-length=65"],
            "--max-length 65 is out of range; use 8 to 64",
        ),
        ([*model, "--tasks", "cola", "--data", data, "--max-length=7"], "--max-length 7 is out of range; use 8 to 64"),
        ([*model, *table("column", good.rename({"sentence": "text"}))], "has no column 'sentence'"),
        ([*model, *table("hidden", good.with_columns(label=pl.Series([-1, -1])))], "label -1 in row 1"),
        ([*model, *table("label", good.with_columns(label=pl.Series([0, 2])))], "has the label 2 in row 2"),
        ([*model, *table("null", good.with_columns(sentence=pl.Series(["a", None])))], "no sentence in row 2"),
        (
            [*model, *table("list", good.with_columns(sentence=pl.Series([["a"], ["b"]])))],
            r"the column sentence of .* is List.*, not text; convert it to text",
        ),
        ([*model, *table("empty", good.clear())], "cannot read|has no"),
        (["--model", tmp_path / "nothing", "--tasks", "cola", "--data", data], "nothing"),
    ]
    (tmp_path / "half" / "cola").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "half" / "cola" / f"{split}.parquet").write_bytes(b"PAR1")
    cases.append(([*model, "--tasks", "cola", "--data", tmp_path / "half"], "cannot read"))

    headless, tuned, pickled = tmp_path / "headless", tmp_path / "tuned", tmp_path / "pickled"
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    save_bert(pickled, tokenizer)
    masked = AutoModelForMaskedLM.from_pretrained(pickled)
    BertForSequenceClassification(masked.config).save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    (pickled / "model.safetensors").unlink()
    torch.save(masked.state_dict(), pickled / "pytorch_model.bin")
    headless.mkdir()
    generator, swapped = tmp_path / "generator", tmp_path / "swapped"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1)).save_pretrained(generator)
    tokenizer.save_pretrained(generator)
    BertForMaskedLM(BertConfig(**{**masked.config.to_dict(), "vocab_size": 200})).save_pretrained(swapped)
    tokenizer.save_pretrained(swapped)
    cola = ["--tasks", "cola", "--data", data]
    diverged = tmp_path / "diverged"
    masked.bert.embeddings.LayerNorm.bias.data[0] = torch.nan
    masked.save_pretrained(diverged)
    tokenizer.save_pretrained(diverged)
    cases += [
        (["--model", diverged, *cola], "diverged has weights that are not finite .bert.embeddings.LayerNorm.bias."),
        (["--model", generator, *cola], "is a gpt2 model, which has no masked-LM head"),
        (["--model", swapped, *cola], "has 300 tokens .padding: .PAD.., but the model has 200"),
        ([*model, *cola, "--limit-train", "rte=10"], "argument --limit-train: 'rte=10' is not a whole number above 0"),
        (["--model", work / "teacher", work / "teacher", *cola], "two models have the name teacher"),
        (["--model", "=x", *cola], "not NAME=MODEL"),
        (["--model", tuned, "--tasks", "cola", "--data", data], "is already fine-tuned"),
        (["--model", pickled, "--tasks", "cola", "--data", data], "pickle"),
        (["--model", headless, "--tasks", "cola", "--data", data], "headless"),
    ]
    for flags, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            glue.run.main([str(flag) for flag in ["--max-length", 32, *flags, *out]])
    for wrong, sentence in (
        ("--learning-rate=-1", "argument --learning-rate: '-1' is not a finite number above 0"),
        ("--gpus-per-worker=2", "argument --gpus-per-worker: 2 is out of range; use more than 0 and at most 1"),
        ("--batchsize=8", "--batchsize is not a flag of glue/run.py; the nearest is --batch-size"),
    ):
        with pytest.raises(UsageError, match=sentence):
            parse(["--model=x", "--tasks=cola", "--output=x", wrong], "")
    assert "there is no task 'x'" in refused(*GLUE_RUN, *model, *out, "--tasks", "x")
    assert not (tmp_path / "out").exists()
