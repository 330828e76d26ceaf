"""run.py as its users run it: the regimes, what comes out, kill and resume, and misuse."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LENGTH, SCORE, TRAIN, command, refused, run
from safetensors.torch import load_file
from test_masking import slow_paper
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    FunnelConfig,
    FunnelForMaskedLM,
    ModernBertForMaskedLM,
    pipeline,
)

import train.run
from entropy_masking.entropy import entropy
from entropy_masking.errors import UsageError
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.read import Columns, masker_of, read_rows, to_tensors
from train import resume
from train.data import split_shards
from train.evaluation import EVALUATION
from train.optimizer import hidden_matrices
from train.options import LEARNING_RATES, MUON, parse
from train.trainer import MaskedLMTrainer

SMALL = ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false", "--seed", 3]
REGIMES = {
    "random": ["--entropy-source", "random"],
    "parquet": ["--entropy-source", "parquet"],
    "parquet+kd": ["--entropy-source", "parquet", "--distill-weight", 0.5],
    "self": ["--entropy-source", "self"],
    "self+kd": ["--entropy-source", "self", "--distill-weight", 1, "--mask-temperature", 0.5, "--hard-share", 0.8],
}


def train_here(shards: Path, output: Path, *flags: object) -> dict[str, Any]:
    """run.py's main in this process; returns the summary."""
    train.run.main([str(flag) for flag in ("--shards", shards, "--output-dir", output, *SMALL, *flags)])
    return json.loads((output / "summary.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def students(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    for name, flags in REGIMES.items():
        train_here(scored, root / name, *flags, "--max-steps", 12, "--logging-steps", 1, "--save-steps", 6)
    return {name: root / name for name in REGIMES}


def test_entropy_masks_and_targets_each_change_what_is_learned(students: dict[str, Path]) -> None:
    learned = {name: weights(directory)["model.layers.0.mlp.Wo.weight"] for name, directory in students.items()}
    for first, second in itertools.combinations(learned, 2):
        assert not torch.allclose(learned[first], learned[second], atol=1e-5), f"{first} is {second}"


def test_what_is_trained_on_and_hidden_and_what_is_held_out(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's recipe hides the highest entropies of the shards, evaluation anything, and on other documents."""
    seen: dict[MaskPolicy, list[Any]] = {}

    def spy(masker: Masker, batch: dict[str, torch.Tensor], policy: MaskPolicy) -> dict[str, torch.Tensor]:
        masked = original(masker, batch, policy)
        seen.setdefault(policy, []).extend(
            zip(*(t.tolist() for t in (batch["sequence_id"], batch["epoch"], masked["positions_BP"])), strict=True)
        )
        return masked

    original = Masker.__call__
    monkeypatch.setattr(Masker, "__call__", spy)
    train_here(scored, tmp_path / "out", *REGIMES["parquet"], "--recipe", "paper", "--num-train-epochs", 1)
    manifest = read_manifest(str(scored))
    held_out = [sequence for sequence, *_ in seen.pop(EVALUATION)]
    ((policy, trained),) = seen.items()
    assert policy == MaskPolicy.paper(seed=3)
    everything = {(entry.index << 32) + row for entry in manifest.shards for row in range(entry.rows)}
    assert set(held_out) == everything - {sequence for sequence, *_ in trained}
    assert len({sequence >> 32 for sequence in held_out}) == math.ceil(0.2 * len(manifest.shards))
    entropy_of = {}
    for entry in manifest.shards:
        rows = read_rows(manifest, entry, Columns(entropy=True))
        columns = rows["entropy"].astype(float), ~np.isin(rows["input_ids"], manifest.special_token_ids)
        entropy_of |= dict(zip(rows["sequence_id"].tolist(), zip(*columns, strict=True), strict=True))
    for sequence, epoch, positions in trained:
        row = (torch.from_numpy(column)[None] for column in entropy_of[sequence])
        (expected,) = slow_paper(*row, torch.tensor([sequence]), torch.tensor([epoch]), policy)
        assert {position for position in positions if position != IGNORED} == expected


def test_evaluation_on_text_of_its_own(work: Path, scored: Path, tmp_path: Path) -> None:
    """All shards are trained on; loss, positions and deciles are of the other directory."""
    (tmp_path / "other.jsonl").write_text("".join((work / "corpus.jsonl").read_text().splitlines(True)[:90]))
    other, tokens = tmp_path / "other", tmp_path / "tokens"
    run(*command(work, other, "--corpus", str(tmp_path / "other.jsonl"), "--backend", "local"))
    flags = ["--entropy-source", "parquet", "--num-train-epochs", 1, "--eval-fraction", 0]
    summary = train_here(scored, tmp_path / "out", *flags, "--eval-shards", other)
    sequences = json.loads((scored / "manifest.json").read_text())["totals"]["sequences"]
    assert summary["steps"] == math.ceil(sequences / 8)
    manifest = read_manifest(str(other))
    masks = MaskPolicy.paper().positions(LENGTH)
    padded = sum(entry.tokens < entry.rows * LENGTH for entry in manifest.shards)
    whole = sum(entry.rows for entry in manifest.shards) - padded
    assert masks * whole < summary["eval_positions"] <= masks * (whole + padded)
    deciles = summary["eval_loss_by_entropy_decile"]
    assert len(deciles) == 10 and min(deciles) < summary["eval_loss"] < max(deciles)
    assert summary["eval_shards"]["fingerprint_hash"] == manifest.fingerprint_hash

    score = [*SCORE, "--corpus", tmp_path / "other.jsonl", "--teacher", "none", "--tokenizer", work / "tokenizer"]
    run(*score, "--sequence-length", LENGTH, "--output", tokens, "--backend", "local")
    train_here(scored, tmp_path / "out", *flags, "--eval-shards", tokens)  # the same run, finished already
    summary = train_here(scored, tmp_path / "plain", *flags, "--eval-shards", tokens)
    assert summary["eval_loss"] and summary["eval_loss_by_entropy_decile"] is None

    run(*score, "--sequence-length", 2 * LENGTH, "--output", tmp_path / "long", "--backend", "local")
    again = [*score, "--corpus", work / "corpus.jsonl", "--shard-tokens", 3000]
    run(*again, "--sequence-length", LENGTH, "--output", tmp_path / "cut", "--backend", "local")
    for mistake, sentence in (
        (["--eval-shards", scored], "holds text of --shards"),
        (["--eval-shards", tmp_path / "cut"], "holds text of --shards"),
        (["--eval-shards", tmp_path / "long"], "sequences of 64 tokens"),
        (["--eval-shards", tmp_path / "nowhere"], "nowhere"),
        (["--eval-shards", other, "--eval-fraction", 0.2], "use one"),
    ):
        given = ["--shards", scored, "--entropy-source", "random", "--output-dir", tmp_path / "wrong", *mistake]
        with pytest.raises(UsageError, match=sentence):
            train.run.main([str(flag) for flag in given])


def test_deciles_are_of_the_shards_entropy(scored: Path, students: dict[str, Path]) -> None:
    """By hand: one sequence at a time, everything sorted in Python."""
    manifest = read_manifest(str(scored))
    model = AutoModelForMaskedLM.from_pretrained(students["random"]).eval()
    found = []
    for entry in split_shards(manifest, 0.2)[1]:
        rows = read_rows(manifest, entry, Columns(entropy=True))
        batch = masker_of(manifest)(to_tensors(rows) | {"epoch": torch.zeros(entry.rows, dtype=torch.long)}, EVALUATION)
        for row, sequence in enumerate(rows["sequence_id"].tolist()):
            attended = torch.from_numpy(rows["input_ids"][row].astype("int64"))[None] != manifest.special_ids["pad"]
            with torch.no_grad():
                log_q_LV = (
                    model(batch["input_ids"][row : row + 1], attention_mask=attended.long()).logits[0].log_softmax(-1)
                )
            for position, label in zip(
                batch["positions_BP"][row].tolist(), batch["labels_BP"][row].tolist(), strict=True
            ):
                if position != IGNORED:
                    entropy_here = float(rows["entropy"][row, position])
                    found.append((entropy_here, sequence, position, -float(log_q_LV[position, label])))
    found.sort()
    share, more = divmod(len(found), 10)
    sizes = [share + (decile < more) for decile in range(10)]
    expected = []
    for size in sizes:
        part, found = found[:size], found[size:]
        expected.append(sum(loss for *_, loss in part) / size)
    summary = json.loads((students["random"] / "summary.json").read_text())
    assert summary["eval_loss_by_entropy_decile"] == pytest.approx(expected, abs=1e-4)


def test_every_regime_learns_and_sums_up(students: dict[str, Path], scored: Path) -> None:
    vocabulary = read_manifest(str(scored)).vocab_size
    for name, directory in students.items():
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["regime"] == name
        assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * LENGTH
        assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.05)
        assert summary["seconds"] > 0
        assert summary["seed"] == 3 and summary["flags"]["mask_ratio"] == 0.3
        assert (summary["scoring_seconds"] > 0) == (name not in ("random", "self")), "charged to who reads scores"
        assert summary["shards"]["context"] == "masked" and summary["shards"]["bytes"] > 0
        cheapest = json.loads((students["random"] / "summary.json").read_text())["training_flops"]
        assert summary["training_flops"] == cheapest > 0, "self-masking has its scores from the training forward"
        assert [point["step"] for point in summary["history"] if "eval_loss" in point] == [0, 3, 6, 9, 12]
        assert summary["history"][-1]["seconds"] == pytest.approx(summary["seconds"], abs=1)
        deciles = summary["eval_loss_by_entropy_decile"]
        assert len(deciles) == 10
        assert sum(deciles) / 10 == pytest.approx(summary["eval_loss"], abs=0.05)
        history = json.loads((directory / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert summary["train_loss"] == losses[-1]
        if name == "self+kd":  # it learns from the teacher alone, which knows nothing of the text
            assert losses[-1] < losses[0] / 2
        else:
            assert summary["eval_loss"] < math.log(vocabulary)


def test_the_result_is_a_plain_masked_lm(students: dict[str, Path], scored: Path) -> None:
    directory = students["parquet+kd"]
    model, loading = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert type(model) is ModernBertForMaskedLM
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (directory / "tokenizer.json").read_bytes() == (scored / "tokenizer" / "tokenizer.json").read_bytes()
    text = tokenizer.decode(tokenizer("abcde fghab", add_special_tokens=False).input_ids) + " [MASK]"
    guesses = pipeline("fill-mask", model=str(directory))(text)
    assert len(guesses) == 5 and all(0 < guess["score"] < 1 for guess in guesses)
    assert not [path for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth"}], "no pickle beside it"


def test_a_student_is_the_next_teacher_and_the_next_initial_model(
    students: dict[str, Path], work: Path, tmp_path: Path
) -> None:
    flags = ["--corpus", work / "corpus.jsonl", "--limit-documents", 20, "--sequence-length", LENGTH]
    score = [*command(work, tmp_path)[:2], *flags, "--shard-tokens", 400, "--backend", "local"]
    run(*score, "--teacher", students["random"], "--output", tmp_path / "shards")
    summary = train_here(
        tmp_path / "shards", tmp_path / "more", *REGIMES["parquet"], "--model", students["random"], "--max-steps", 1
    )
    before, after = weights(students["random"]), weights(tmp_path / "more")
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01
    assert summary["model"] == str(students["random"])


def test_regimes_start_from_the_same_weights_and_are_judged_on_the_same_masks(scored: Path, tmp_path: Path) -> None:
    summaries = [
        train_here(scored, tmp_path / name, *flags, "--max-steps", 1, "--learning-rate", 0, "--weight-decay", 0)
        for name, flags in REGIMES.items()
    ]
    assert len({summary["eval_loss"] for summary in summaries}) == 1
    assert len({tuple(summary["eval_loss_by_entropy_decile"]) for summary in summaries}) == 1
    other = train_here(scored, tmp_path / "ratio", *REGIMES["random"], "--max-steps", 1, "--learning-rate", 0,
                       "--weight-decay", 0, "--mask-ratio", 0.4)  # fmt: skip
    assert other["eval_loss"] == summaries[0]["eval_loss"]


def test_a_killed_run_resumes_to_the_same_weights(scored: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints; self-masking, which depends on all that has to be restored."""
    flags = ["--shards", scored, *SMALL, *REGIMES["self+kd"], "--max-steps", 40, "--save-steps", 5]
    flags += ["--mask-warmup", 0.2, "--mask-ramp", 0.4, "--dataloader-num-workers", 2]
    train_here(scored, tmp_path / "whole", *flags[2:])
    killed = tmp_path / "killed"
    process = subprocess.Popen([*TRAIN, *map(str, flags), "--output-dir", str(killed)], stderr=subprocess.DEVNULL)
    while not list(killed.glob("checkpoint-1?/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    half = killed / "checkpoint-99"  # a checkpoint that was cut short
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    output = run(*TRAIN, *flags, "--output-dir", killed)
    assert "resuming from" in output and "checkpoint-99" not in output
    assert "missing keys" not in output
    ours, theirs = weights(killed), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (killed, tmp_path / "whole")]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[0]["train_loss"] == pytest.approx(summaries[1]["train_loss"], abs=1e-6) != None  # noqa: E711
    assert "finished already" in run(*TRAIN, *flags, "--output-dir", killed)


def test_flags_that_decide_nothing_may_change_others_not(students: dict[str, Path], scored: Path) -> None:
    directory = students["random"]
    same = ["--shards", scored, *SMALL, *REGIMES["random"], "--max-steps", 12, "--output-dir", directory]
    changed = ["--logging-steps", 2, "--dataloader-num-workers", 1, "--save-steps", 3]
    assert "finished already" in run(*TRAIN, *same, *changed)
    message = refused(*TRAIN, *same, "--mask-ratio", 0.2, "--learning-rate", 0.5)
    assert "mask_ratio: 0.3 → 0.2" in message and "learning_rate" in message and "--overwrite" in message
    # half the batch and twice the accumulation is the same batch
    assert "finished already" in run(
        *TRAIN, *same, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2
    )


def test_only_what_was_trained_is_overwritten(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "thesis.txt").write_text("…")
    with pytest.raises(UsageError, match="holds files but no training run"):
        train_here(scored, tmp_path / "out", *REGIMES["random"], "--max-steps", 1, "--overwrite")
    assert (tmp_path / "out" / "checkpoint-1" / "thesis.txt").exists()


def test_overwrite_starts_afresh(scored: Path, tmp_path: Path) -> None:
    train_here(scored, tmp_path / "out", *REGIMES["random"], "--max-steps", 2)
    (tmp_path / "out" / "checkpoint-best").mkdir()
    summary = train_here(scored, tmp_path / "out", *REGIMES["parquet"], "--max-steps", 1, "--overwrite")
    assert summary["regime"] == "parquet" and summary["steps"] == 1
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    assert (tmp_path / "out" / "checkpoint-best").exists(), "no checkpoint of ours"


def test_accumulated_gradients_are_those_of_the_whole_batch(scored: Path, tmp_path: Path) -> None:
    flags = [*REGIMES["parquet"], "--max-steps", 4, "--logging-steps", 1, "--optim", "sgd", "--learning-rate", 0.5]
    train_here(scored, tmp_path / "whole", *flags)
    split = ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4]
    train_here(scored, tmp_path / "split", *flags, *split)
    ours, theirs = weights(tmp_path / "split"), weights(tmp_path / "whole")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4)


def test_self_masking_hides_what_the_student_is_least_sure_of(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(trainer: MaskedLMTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masked = original(trainer, batch)
        attention = (batch["input_ids"] != trainer.masker.pad_id).long()
        model = ModernBertForMaskedLM(trainer.model.config).eval()
        model.load_state_dict(trainer.model.state_dict())
        with torch.no_grad():
            entropy_BL = entropy(model(batch["input_ids"], attention_mask=attention).logits)
        candidates_BL = ~torch.isin(batch["input_ids"], torch.tensor(trainer.manifest.special_token_ids))
        seen.append((trainer.state.global_step, entropy_BL, candidates_BL, masked["positions_BP"]))
        return masked

    original = MaskedLMTrainer.mask_by_student
    monkeypatch.setattr(MaskedLMTrainer, "mask_by_student", spy)
    flags = ["--self-refresh", "step", "--hard-share", 1, "--mask-temperature", 0]
    flags += ["--mask-warmup", 0.5, "--mask-ramp", 0, "--max-steps", 6]
    summary = train_here(scored, tmp_path / "self", *REGIMES["self"], *flags)
    means = train_here(scored, tmp_path / "means", *REGIMES["self"], "--max-steps", 6)
    assert summary["training_flops"] > means["training_flops"], "a forward of its own"
    assert [step for step, *_ in seen] == 2 * list(range(6))
    for step, entropy_BL, candidates_BL, positions_BK in seen[:6]:
        agreement = []
        for row, positions in enumerate(positions_BK.tolist()):
            chosen = {p for p in positions if p != IGNORED}
            ranked = entropy_BL[row].masked_fill(~candidates_BL[row], -1).argsort(descending=True)
            agreement.append(chosen == set(ranked[: len(chosen)].tolist()))
        assert all(agreement) if step >= 3 else not any(agreement)


def test_other_models_by_configuration(scored: Path, tmp_path: Path) -> None:
    vocabulary = read_manifest(str(scored)).vocab_size
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=vocabulary, **sizes).save_pretrained(tmp_path / "shape")
    train_here(scored, tmp_path / "one", *REGIMES["random"], "--max-steps", 1, "--model", tmp_path / "shape")
    config = tmp_path / "shape" / "config.json"
    train_here(scored, tmp_path / "two", *REGIMES["random"], "--max-steps", 1, "--model", config)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    BertConfig(vocab_size=100, **sizes).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UsageError, match="has 100 tokens"):
        train_here(scored, tmp_path / "three", *REGIMES["random"], "--max-steps", 1, "--model", tmp_path / "narrow")


def test_presets_bring_defaults_the_last_model_counts() -> None:
    needed = ["--shards", "S", "--entropy-source", "random", "--output-dir", "O"]
    adamw = LEARNING_RATES["adamw"]
    for more, rate, batch, muon in (
        (["--model", "tiny", "--model=base"], LEARNING_RATES[MUON]["base"], 256, 0.02),
        (["--model=base", "--model", "bert-tiny"], LEARNING_RATES[MUON]["tiny"], 32, 0.02),
        (["--model", "some/checkpoint"], adamw["base"], 256, None),
        (["--model", "some/checkpoint", "--optim", "muon"], LEARNING_RATES[MUON]["base"], 256, 0.02),
        (["--model", "mini", "--learning-rate", "0.5", "--muon-learning-rate", "0.1"], 0.5, 64, 0.1),
        (["--model", "mini", "--optim", "adamw_torch"], adamw["mini"], 64, None),
    ):
        options, args = parse([*needed, *more], None)
        assert (args.learning_rate, args.per_device_train_batch_size) == (rate, batch)
        assert (options.muon, options.muon_learning_rate) == (muon is not None, muon)


def test_evaluations_by_default_and_as_asked() -> None:
    needed = ["--shards", "S", "--entropy-source", "random", "--output-dir", "O"]
    for more, expected in (
        ([], ("steps", 0.2, True)),
        (["--eval-shards", "E"], ("steps", 0.2, True)),
        (["--eval-fraction", "0"], ("no", None, False)),
        (["--eval-on-start", "false"], ("steps", 0.2, False)),
        (["--eval-steps", "7"], ("steps", 7, True)),
        (["--eval-strategy", "no"], ("no", None, False)),
        (["--eval-strategy", "steps", "--eval-steps", "7"], ("steps", 7, False)),
    ):
        _, args = parse([*needed, *more], None)
        assert (args.eval_strategy, args.eval_steps, args.eval_on_start) == expected, more


def test_schedulers_and_matrices_of_muon(scored: Path, tmp_path: Path) -> None:
    """Schedulers that ask the optimizer for its rate; biases and tables that are matrices belong to AdamW."""
    for schedule in (["polynomial"], ["cosine_with_min_lr", "--lr-scheduler-kwargs", '{"min_lr": 1e-5}']):
        flags = [*REGIMES["random"], "--max-steps", 2, "--lr-scheduler-type", *schedule]
        assert train_here(scored, tmp_path / schedule[0], *flags)["flags"]["muon"]
    config = FunnelConfig(vocab_size=50, block_sizes=[1], d_model=8, n_head=2, d_head=4, d_inner=16)
    model = FunnelForMaskedLM(config)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in hidden_matrices(model)} == {"weight"}


def test_a_model_is_known_by_its_weights(scored: Path, students: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(students["random"], tmp_path / "start")
    flags = [*REGIMES["random"], "--max-steps", 1, "--model", tmp_path / "start"]
    train_here(scored, tmp_path / "out", *flags)
    (tmp_path / "start").rename(tmp_path / "moved")
    moved = ["--shards", scored, *SMALL, *flags[:-1], tmp_path / "moved", "--output-dir", tmp_path / "out"]
    train.run.main([str(flag) for flag in [*moved, "--trust-remote-code"]])  # the same run, finished already
    shutil.copy(students["parquet"] / "model.safetensors", tmp_path / "moved" / "model.safetensors")
    with pytest.raises(UsageError, match=r"model: [0-9a-f]+… → [0-9a-f]+…"):
        train.run.main([str(flag) for flag in moved])


def test_a_damaged_checkpoint_is_passed_over(scored: Path, students: dict[str, Path], tmp_path: Path) -> None:
    flags = [*REGIMES["random"], "--max-steps", 12, "--logging-steps", 4, "--save-steps", 6]
    for damage in ("model.safetensors", "optimizer.pt"):
        directory = tmp_path / damage
        shutil.copytree(students["random"], directory)
        (directory / "summary.json").unlink()
        (directory / "checkpoint-best").mkdir()
        file = directory / "checkpoint-12" / damage
        file.write_bytes(file.read_bytes()[:-100])
        assert resume.last_checkpoint(directory) == directory / "checkpoint-6"
    train_here(scored, directory, *flags)
    ours, theirs = weights(directory), weights(students["random"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "odd", [{"hidden_size": 33}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_act": "x"}]
)
def test_a_configuration_that_makes_no_model_is_refused(scored: Path, tmp_path: Path, odd: dict[str, Any]) -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 5000} | odd
    (tmp_path / "odd.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"odd\.json is not a usable configuration") as caught:
        train_here(scored, tmp_path / "out", *REGIMES["random"], "--model", tmp_path / "odd.json", "--max-steps", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"special_ids": {}},
        {"special_ids": {"pad": "0", "cls": 1, "sep": 2, "mask": 3}},
        {"special_token_ids": None},
        {"vocab_size": "many"},
        {"shards": [{"index": 0}]},
        {"totals": []},
        {"schema_version": 1},
        {"unknown": 0},
    ],
)
def test_a_broken_manifest_is_refused(scored: Path, tmp_path: Path, broken: dict[str, Any]) -> None:
    shutil.copytree(scored, tmp_path / "shards")
    manifest = json.loads((scored / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest | broken))
    with pytest.raises(UsageError, match="is not a shard manifest"):
        train_here(tmp_path / "shards", tmp_path / "out", *REGIMES["random"], "--max-steps", 1)


@pytest.fixture(scope="module")
def tokens(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokens") / "shards"
    flags = ["--corpus", work / "corpus.jsonl", "--shard-tokens", 5000, "--sequence-length", LENGTH]
    more = ["--teacher", "none", "--tokenizer", work / "tokenizer", "--backend", "local", "--output", directory]
    run(*command(work, directory)[:2], *flags, *more)
    return directory


def test_tokens_alone_train_a_reference(tokens: Path, tmp_path: Path) -> None:
    summary = train_here(tokens, tmp_path / "reference", *REGIMES["random"], "--num-train-epochs", 0.1)
    assert summary["eval_loss"] > 0 and summary["eval_loss_by_entropy_decile"] is None
    assert summary["scoring_seconds"] == 0
    assert train_here(tokens, tmp_path / "self", *REGIMES["self"], "--max-steps", 2)["regime"] == "self"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--entropy-source", "parquet"], "has no scores"),
        (["--entropy-source", "random", "--distill-weight", 0.5], "no top-k"),
        (["--entropy-source", "random", "--mask-temperature", 1], "--mask-temperature needs scores, and"),
        (["--entropy-source", "random", "--hard-share", 0], "--hard-share needs scores, and --entropy-source random"),
        (["--entropy-source", "random", "--mask-warmup", 0.1], "--mask-warmup needs scores"),
        (["--entropy-source", "random", "--mask-ramp", 0], "--mask-ramp needs scores"),
        (["--entropy-source", "random", "--recipe", "default"], "--recipe needs scores, and"),
        (
            ["--entropy-source", "random", "--predict-ratio", 0.1, "--predict-by", "entropy"],
            "--predict-by needs scores, .*use --entropy-source parquet --hard-share 0",
        ),
        (["--entropy-source", "random", "--predict-by", "random"], "set --predict-ratio below the mask ratio"),
        (["--entropy-source", "self", "--mask-ratio", 0], "mask ratio"),
        (["--entropy-source", "self", "--hard-share", 1.1], "hard share 1.1 is not between 0 and 1"),
        (["--entropy-source", "self", "--hard-share=-0.1"], "hard share -0.1 is not between 0 and 1"),
        (["--entropy-source", "self", "--mask-warmup", 1], "mask warm-up 1 is not at least 0 and below 1"),
        (["--entropy-source", "self", "--mask-ramp", 5], "mask ramp 5 is not between 0 and 1"),
        (["--entropy-source", "self", "--mask-temperature", "inf"], "use hard share 0 for random masks"),
        (["--entropy-source", "self", "--hard-share", 0, "--mask-ramp", 0.1], "--mask-ramp has no effect with"),
        (["--entropy-source", "self", "--predict-ratio", 0.4], "predict ratio 0.4 is not above 0 and at most the mask"),
        (["--entropy-source", "self", "--predict-by", "entropy"], "--predict-by chooses among the masked tokens"),
        (
            ["--entropy-source", "self", "--mask-by", "excess"],
            "--mask-by excess subtracts the surprisal of a reference",
        ),
        (
            ["--entropy-source", "self", "--predict-ratio", 0.1, "--predict-by", "excess"],
            "--predict-by excess subtracts the surprisal of a reference",
        ),
        (
            ["--entropy-source", "self", "--recipe", "paper", "--hard-share", 0.3],
            "--hard-share 0.3 contradicts --recipe paper, which sets 1",
        ),
        (
            ["--entropy-source", "self", "--recipe", "paper", "--predict-ratio", 0.05],
            "--predict-ratio contradicts --recipe paper",
        ),
        (
            ["--entropy-source", "self", "--recipe", "paper", "--self-refresh", "means"],
            "--self-refresh means contradicts --recipe paper",
        ),
        (
            ["--entropy-source", "self", "--predict-ratio", 0.3, "--predict-by", "entropy"],
            "set --predict-ratio below the mask ratio",
        ),
        (["--entropy-source", "random", "--self-refresh", "step"], "--self-refresh only applies to --entropy-source"),
        (["--entropy-source", "self", "--optim", "adamw_torch", "--muon-weight-decay", 0], "only applies to --optim"),
        (["--entropy-source", "self", "--distill-positions", 0.5], "--distill-positions needs distillation"),
        (["--entropy-source", "self", "--distill-weight", 2], "--distill-weight 2 is out of range"),
        (["--entropy-source", "self", "--seed=-1"], "--seed -1 is out of range; use at least 0 and at most 4294967295"),
        (["--entropy-source", "self", "--seed", 5_000_000_000], "--seed 5000000000"),
        (["--entropy-source", "self", "--learning-rate=-1"], "--learning-rate -1 is out of range; use at least 0"),
        (["--entropy-source", "self", "--learning-rate", "nan"], "--learning-rate nan is out of range"),
        (["--entropy-source", "self", "--weight-decay=-1"], "--weight-decay -1 is out of range"),
        (["--entropy-source", "self", "--adam-beta2", 1], "--adam-beta2 1 is out of range; use at least 0 and less"),
        (["--entropy-source", "self", "--per-device-train-batch-size", 0], "--per-device-train-batch-size 0"),
        (["--entropy-source", "self", "--num-train-epochs", 0], "--num-train-epochs 0 is out of range; use more"),
        (["--entropy-source", "self", "--max-steps", 0], "--max-steps 0 is out of range; use at least 1"),
        (
            ["--entropy-source", "self", "--do-eval"],
            "--do-eval of transformers.TrainingArguments is not supported",
        ),
        (
            ["--entropy-source", "self", "--disable-tqdm", "false"],
            "--disable-tqdm of transformers.* is not supported",
        ),
        (
            ["--entropy-source", "self", "--save-only-model"],
            "--save-only-model of transformers.* is not supported",
        ),
        (["--entropy-source", "self", "--eval-fraction", 1], "--eval-fraction"),
        (["--entropy-source", "self", "--eval-fraction", 0, "--eval-strategy", "steps"], "needs held-out shards"),
        (
            ["--entropy-source", "self", "--label-smoothing-factor", 0.1],
            "--label-smoothing-factor of .* is not supported",
        ),
        (["--entropy-source", "self", "--model", "huge"], "not a preset"),
        (["--entropy-source", "self", "--model", "./nowhere"], "nowhere"),
        (["--entropy-source", "self", "--output-dir", ""], "--output-dir is empty; give it a value"),
    ],
)
def test_mistakes_are_one_sentence(tokens: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        train_here(tokens, tmp_path / "out", "--max-steps", 1, *flags)
    assert "\n" not in str(caught.value)


def test_mistakes_end_with_exit_code_2(tokens: Path, work: Path, tmp_path: Path) -> None:
    flags = ["--output-dir", tmp_path / "out", "--max-steps", 1]
    assert "not a shard directory" in refused(*TRAIN, "--shards", work, *REGIMES["random"], *flags)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("…")
    message = refused(*TRAIN, "--shards", tokens, *REGIMES["random"], "--output-dir", tmp_path / "other")
    assert "holds files but no training run" in message
    assert not (tmp_path / "out").exists()


def test_an_output_directory_with_other_flags_than_flags(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for text in ("[1]", "{", "null"):
        (tmp_path / "out" / "run.json").write_text(text)
        with pytest.raises(UsageError, match="does not hold the flags of a run"):
            train_here(tokens, tmp_path / "out", *REGIMES["random"], "--max-steps", 1)


def test_a_run_that_has_learned_nothing_yet_gives_way(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"mask_ratio": 0.9}))
    assert train_here(tokens, tmp_path / "out", *REGIMES["random"], "--max-steps", 1)["steps"] == 1
