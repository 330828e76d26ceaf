"""Fine-tuning many trials: batches by length, paired seeds, shared tokens, several models, failed trials, Ray."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from harness import ROOT, run
from made_glue import make_rows, write_rows
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import glue.finetune
import glue.run
import glue.trials
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards.manifests import read_manifest
from glue.batches import batches_by_length, encode, shuffled_batches
from glue.finetune import load_classifier
from glue.options import parse
from glue.tasks import GLUE, load
from glue.trials import Outcome, Trial, TrialTokens
from train.student import build_student

GLUE_RUN = [sys.executable, str(ROOT / "glue" / "run.py")]
QUICK = ["--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--max-length", 32, "--dtype", "float32"]


def glue_here(output: Path, *flags: object) -> dict[str, dict[str, Any]]:
    glue.run.main([str(flag) for flag in (*flags, "--output", output)])
    return read(output)


def read(output: Path) -> dict[str, dict[str, Any]]:
    """Results by file, without the time they took."""
    found = {str(path.relative_to(output)): json.loads(path.read_text()) for path in sorted(output.rglob("*.json"))}
    return {name: {**result, "seconds": 0} for name, result in found.items()}


@pytest.fixture(scope="module")
def other(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same architecture and tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "other"
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_pretrained(work / "teacher")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(work / "teacher").save_pretrained(directory)
    return directory


def test_an_epoch_has_every_row_once_in_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 1003)
    batches = shuffled_batches(lengths, 16, 32, (1, 0))
    assert sorted(np.concatenate(batches)) == list(range(1003)) and Counter(map(len, batches)) == {16: 62, 11: 1}
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.1 * lengths.sum(), "at random it is 1.7 times as much"
    means = [lengths[batch].mean() for batch in batches]
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.3, "short and long ones take turns"
    again, epoch, seed = (shuffled_batches(lengths, 16, 32, key) for key in ((1, 0), (1, 1), (2, 0)))
    assert all(np.array_equal(*pair) for pair in zip(batches, again, strict=True))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(seed))
    ordered = np.concatenate(batches_by_length(np.arange(1003), lengths, 16))
    assert (np.diff(lengths[ordered]) >= 0).all()


def test_a_batch_is_what_the_tokenizer_pads(work: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
    split = load(GLUE["rte"], str(data)).train
    split[3, "sentence2"] = " ".join(split[3, "sentence2"].split() * 9)  # to be cut
    rows = np.array([3, 0, 7])
    ours = encode(split, tokenizer, 24).batch(rows)
    encoded = [tokenizer(*texts, truncation=True, max_length=24) for *texts, _ in split[rows].rows()]
    theirs = DataCollatorWithPadding(tokenizer)(encoded)
    assert ours.keys() == theirs.keys() and ours["input_ids"].shape[1] == 24
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_seeds_are_paired(work: Path, other: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one architecture start a seed with the same head and see the same batches."""
    heads, batches, train = [], [], glue.finetune.train

    def watch(model: Any, rows: Any, *others: Any) -> None:
        heads.append(torch.cat([model.classifier.weight.flatten(), model.bert.pooler.dense.weight.flatten()]).detach())
        heads[-1] = heads[-1].clone()
        train(model, rows, *others)

    def watch_batches(*args: Any) -> Any:
        batches.append(shuffled_batches(*args))
        return batches[-1]

    monkeypatch.setattr(glue.finetune, "train", watch)
    monkeypatch.setattr(glue.finetune, "shuffled_batches", watch_batches)
    flags = ["--model", work / "teacher", other, "--tasks", "rte", "--data", data, "--seeds", "1,2", *QUICK]
    found = glue_here(tmp_path, *flags)
    assert set(found) == {f"{name}/rte-seed{seed}.json" for name in ("teacher", "other") for seed in (1, 2)}
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3]) and not torch.equal(heads[0], heads[2])
    order = [np.concatenate(each).tolist() for each in batches]
    assert order[0] == order[1] and order[2] == order[3] and order[0] != order[2]


def test_a_task_is_tokenized_once(
    work: Path, other: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, encode_task = [], glue.run.encode_task
    monkeypatch.setattr(glue.run, "encode_task", lambda *args: calls.append(args[0].task.name) or encode_task(*args))
    flags = ["--model", f"a={work / 'teacher'}", "--model", f"b={other}", "--tasks", "rte,cola", "--data", data]
    found = glue_here(tmp_path, *flags, "--seeds", "1,2", *QUICK)
    assert calls == ["rte", "cola"] and len(found) == 8
    alone = glue_here(tmp_path / "alone", "--model", work / "teacher", "--tasks", "rte", "--data", data, *QUICK)
    assert alone["rte-seed1.json"] == found["a/rte-seed1.json"], "no matter what it is worked on beside"


def test_the_grid_is_told_and_every_raw_metric_kept(
    work: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", work / "teacher", "--tasks", "mrpc", "--data", data, "--protocol", "bert-grid"]
    (result,) = glue_here(tmp_path, *flags, "--max-length", 16).values()
    assert "bert-grid: a grid of 8 settings; each trial reports the setting with the best" in capfd.readouterr().err
    assert {(tried["learning_rate"], tried["epochs"]) for tried in result["grid"]} == {
        (rate, epochs) for rate in (5e-5, 4e-5, 3e-5, 2e-5) for epochs in (3, 4)
    }
    assert result["score"] == max(tried["score"] for tried in result["grid"])
    assert len(result["grid"]) == 8 and all(set(tried["metrics"]) == {"accuracy", "f1"} for tried in result["grid"])
    first = next(tried for tried in result["grid"] if tried["score"] == result["score"])
    assert {name: first[name] for name in result["settings"]} == result["settings"]
    assert first["metrics"] == result["metrics"]


def test_runs_that_collapse_are_counted(
    work: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict, calls = glue.finetune.predict, []

    def say_one(model: Any, rows: Any, dtype: str) -> np.ndarray:
        calls.append(1)
        logits_NC = predict(model, rows, dtype)
        logits_NC[:, 1] = logits_NC.min() - 1 if len(calls) < 3 else logits_NC[:, 1]
        logits_NC[0, 1] = logits_NC[0, 1] if len(calls) < 3 else logits_NC.max() + 1
        logits_NC[1, 0] = logits_NC[1, 0] if len(calls) < 3 else logits_NC.max() + 1
        return logits_NC

    monkeypatch.setattr(glue.finetune, "predict", say_one)
    flags = ["--model", work / "teacher", "--tasks", "cola", "--data", data, "--seeds", "1,2,3", *QUICK]
    found = glue_here(tmp_path, *flags)
    assert [result["collapsed"] for result in found.values()] == [True, True, False]
    assert [result["metrics"]["matthews"] for result in found.values()][:2] == [0, 0]
    assert "2 of 3 predict the same for every row" in capsys.readouterr().out


def test_a_trial_that_fails_is_named_and_tried_again(
    work: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = glue.trials.finetune

    def fail(directory: Path, tokens: Any, settings: Any, seed: int, *others: Any) -> Any:
        if tokens.task.name == "cola" and seed == 2:
            raise torch.OutOfMemoryError("out of\nmemory")
        return finetune(directory, tokens, settings, seed, *others)

    monkeypatch.setattr(glue.trials, "finetune", fail)
    flags = ["--model", work / "teacher", "--tasks", "cola,rte", "--data", data, "--seeds", "1,2", *QUICK]
    with pytest.raises(RunError, match=r"1 of 4 failed: cola seed 2 \(OutOfMemoryError: out of memory\); the same"):
        glue_here(tmp_path, *flags)
    assert set(read(tmp_path)) == {"cola-seed1.json", "rte-seed1.json", "rte-seed2.json"}
    monkeypatch.setattr(glue.trials, "finetune", finetune)
    assert len(glue_here(tmp_path, *flags)) == 4


def test_a_run_that_diverges_is_a_trial_that_fails(work: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", work / "teacher", "--tasks", "cola", "--data", data, *QUICK, "--learning-rate", "1e30"]
    reason = "the logits are not finite after fine-tuning at a learning rate of 1e.30; lower --learning-rate"
    with pytest.raises(RunError, match=rf"1 of 1 failed: cola seed 1 .{reason}.; the same command"):
        glue_here(tmp_path, *flags)
    assert not read(tmp_path)


SMALL = {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}
BERT_LIKE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    "model",
    [
        RobertaForMaskedLM(RobertaConfig(**SMALL, **BERT_LIKE, type_vocab_size=1)),
        DistilBertForMaskedLM(DistilBertConfig(**SMALL, dim=32, n_layers=1, n_heads=2, hidden_dim=64)),
        ModernBertForMaskedLM(ModernBertConfig(**SMALL, **BERT_LIKE, cls_token_id=2, sep_token_id=3)),
    ],
    ids=lambda model: model.config.model_type,
)
def test_models_without_segments(work: Path, data: Path, tmp_path: Path, model: Any) -> None:
    """The tokenizer has two, which these models do not know."""
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(work / "teacher").save_pretrained(tmp_path / "model")
    (result,) = glue_here(
        tmp_path / "out", "--model", tmp_path / "model", "--tasks", "rte", "--data", data, *QUICK
    ).values()
    assert result["train_rows"] == 64 and result["device"]


def test_dropout_is_put_back_and_the_encoder_kept(work: Path) -> None:
    trained = AutoModelForMaskedLM.from_pretrained(work / "teacher")
    model = load_classifier(work / "teacher", GLUE["mnli"], 0.1)
    assert model.config.hidden_dropout_prob == 0.1 and model.classifier.out_features == 3
    weight = "embeddings.word_embeddings.weight"
    assert torch.equal(model.bert.get_parameter(weight), trained.bert.get_parameter(weight))


@pytest.mark.parametrize("summary", ['[{"loss": 1.5}]', '{"seed": "42"}', '{"rouge": 3}', "{"])
def test_a_summary_of_another_program_is_ignored(
    work: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], summary: str
) -> None:
    shutil.copytree(work / "teacher", tmp_path / "model")
    (tmp_path / "model" / "summary.json").write_text(summary)
    flags = ["--model", tmp_path / "model", "--tasks", "rte", "--data", data, *QUICK]
    (result,) = glue_here(tmp_path / "out", *flags).values()
    assert result["training"] is None
    assert "summary.json is not a summary of train/run.py; the results will not contain it" in capsys.readouterr().err


def test_code_of_a_model_runs_only_with_the_flag(
    work: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no question is asked on standard input."""
    own, ran = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(work / "teacher", own)
    (own / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'a').write('x')\nfrom transformers import BertConfig\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
    )
    (own / "modeling_own.py").write_text(
        "from transformers import BertForMaskedLM, BertForSequenceClassification\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForMaskedLM(BertForMaskedLM):\n    config_class = OwnConfig\n"
        "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForMaskedLM": "modeling_own.OwnForMaskedLM"}
    names |= {"AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification"}
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own", "auto_map": names}
    (own / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda text: "y")
    flags = ["--model", own, "--tasks", "rte", "--data", data, *QUICK]
    with pytest.raises(UsageError, match="it brings its own code; pass --trust-remote-code if you trust it"):
        glue_here(tmp_path / "out", *flags)
    assert not ran.exists()
    (result,) = glue_here(tmp_path / "out", *flags, "--trust-remote-code").values()
    assert ran.exists() and result["train_rows"] == 64

    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"cannot load the tokenizer in .*own .it brings its own code.; save a fast"):
        glue_here(tmp_path / "out", *flags, "--trust-remote-code")


def test_models_share_tokens_only_if_their_tokenizers_are_equal(
    work: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokenizers of one vocabulary differ if only one of them lower-cases."""
    shutil.copytree(work / "teacher", tmp_path / "cased")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "cased" / name).read_text()
        (tmp_path / "cased" / name).write_text(re.sub(r'("(do_lower_case|lowercase)": )true', r"\1false", text))
    used = []

    def run_trial(trial: Trial, tokens: TrialTokens, advance: object) -> Outcome:
        used.append((trial.key["model_hash"], tokens))
        return "not run"

    monkeypatch.setattr(glue.run, "run_trial", run_trial)
    with pytest.raises(RunError, match="2 of 2 failed"):
        models = ["--model", work / "teacher", tmp_path / "cased"]
        glue_here(tmp_path / "out", *models, "--tasks", "rte", "--data", data, *QUICK)
    (hash_1, tokens_1), (hash_2, tokens_2) = used
    assert hash_1 != hash_2 and tokens_1 is not tokens_2


def test_a_classifier_on_a_preset_reads_the_mean_of_the_hidden_states(tokens: Path, tmp_path: Path) -> None:
    build_student("tiny", read_manifest(str(tokens)), seed=0).save_pretrained(tmp_path)
    model = load_classifier(tmp_path, GLUE["rte"], dropout=0.0).eval()
    ids_BL, real_BL = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    hidden_BLH = model.model(ids_BL, attention_mask=real_BL).last_hidden_state * real_BL[..., None]
    mean_BH = hidden_BLH.sum(1) / real_BL.sum(1, keepdim=True)
    logits_BC = model(ids_BL, attention_mask=real_BL).logits
    torch.testing.assert_close(logits_BC, model.classifier(model.head(mean_BH)))


def test_an_output_that_would_be_lost_with_the_job(work: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match="would be deleted with the working directory of the Ray job"):
        glue_here(Path("relative"), "--model", work / "teacher", "--tasks", "rte", "--data", data)
    for output in ("/shared/glue/", "/shared/./glue", "file:///shared/glue", "s3://bucket/glue"):
        assert parse(["--model=x", "--tasks=rte", f"--output={output}"], None).output == output.removeprefix("file://")


def test_two_workers_give_the_numbers_of_one_process(
    work: Path, other: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", work / "teacher", other, "--tasks", "stsb", "--data", data, "--seeds", "1,2", *QUICK]
    flags += ["--task-file", f"own={data / 'mrpc' / 'train.jsonl'},{data / 'mrpc' / 'dev.jsonl'},accuracy+f1"]
    one = glue_here(tmp_path / "one", *flags)
    done = "other/stsb-seed1.json"
    (tmp_path / "two" / "other").mkdir(parents=True)
    (tmp_path / "two" / done).write_bytes((tmp_path / "one" / done).read_bytes())
    capfd.readouterr()
    two = glue_here(tmp_path / "two", *flags, "--num-workers", 2)
    output = "".join(capfd.readouterr())
    assert "1 of 8 results exist already" in output
    assert "ray" not in output.replace("starting Ray on this machine", "").lower(), output
    assert two == one
    with pytest.raises(UsageError, match="--gpus-per-worker needs a cluster with GPUs; leave it out"):
        glue_here(tmp_path / "three", *flags, "--num-workers", 2, "--gpus-per-worker", 0.5)


@pytest.mark.exhaustive
def test_a_worker_that_is_killed_costs_its_trial(work: Path, data: Path, words: list[str], tmp_path: Path) -> None:
    for split, rows in (("train", 3000), ("dev", 64)):
        write_rows(make_rows(GLUE["rte"], words, rows, 1), tmp_path / "data" / "rte" / f"{split}.parquet")
    flags = ["--model", work / "teacher", "--tasks", "rte", "--data", tmp_path / "data", "--seeds", "1,2,3,4"]
    command = [str(part) for part in (*GLUE_RUN, *flags, *QUICK, "--num-workers", 2, "--output", tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers: list[psutil.Process] = []
    while not workers:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
        with contextlib.suppress(psutil.Error):  # some are at their end already
            below = psutil.Process(process.pid).children(recursive=True)
            workers = [each for each in below if "run_trial" in " ".join(each.cmdline())]
    workers[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "1 of 4 failed: rte seed" in output and "its worker died" in output and "Traceback" not in output
    assert len(read(tmp_path / "out")) == 3
    assert "3 of 4 results exist already" in run(*command)
    assert len(read(tmp_path / "out")) == 4
