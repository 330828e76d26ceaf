"""run.py as its users run it: the regimes, what comes out, kill and resume, and misuse."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LENGTH, TRAIN, command, refused, run
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

import train.run
from pipeline.cli import UsageError
from pipeline.entropy import entropy
from train.masking import IGNORED
from train.trainer import MaskedLMTrainer

SMALL = ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false", "--seed", 3]
REGIMES = {
    "random": ["--entropy-source", "random"],
    "parquet": ["--entropy-source", "parquet"],
    "parquet+kd": ["--entropy-source", "parquet", "--distill-weight", 0.5],
    "self": ["--entropy-source", "self"],
    "self+kd": ["--entropy-source", "self", "--distill-weight", 1, "--mask-temperature", 0.5, "--mask-floor", 0.2],
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
        train_here(scored, root / name, *flags, "--max-steps", 12, "--logging-steps", 4, "--save-steps", 6)
    return {name: root / name for name in REGIMES}


def test_every_regime_learns_and_sums_up(students: dict[str, Path]) -> None:
    for name, directory in students.items():
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["regime"] == name
        assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * LENGTH
        assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.05)
        assert summary["seconds"] > 0
        assert summary["seed"] == 3 and summary["flags"]["mask_ratio"] == 0.15
        assert (summary["scoring_seconds"] > 0) == (name not in ("random", "self")), "charged to who reads scores"
        assert summary["shards"]["context"] == "masked"
        deciles = summary["eval_loss_by_entropy_decile"]
        assert len(deciles) == 10
        assert sum(deciles) / 10 == pytest.approx(summary["eval_loss"], abs=0.05)
        history = json.loads((directory / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses[-1] < losses[0]


def test_the_result_is_a_plain_masked_lm(students: dict[str, Path], scored: Path) -> None:
    directory = students["parquet+kd"]
    model, loading = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert type(model) is BertForMaskedLM
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
    flags += ["--self-warmup-steps", 7, "--dataloader-num-workers", 2]
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
    ours, theirs = weights(killed), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (killed, tmp_path / "whole")]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[0]["train_loss"] == pytest.approx(summaries[1]["train_loss"], abs=1e-6)
    assert "finished already" in run(*TRAIN, *flags, "--output-dir", killed)


def test_flags_that_decide_nothing_may_change_others_not(students: dict[str, Path], scored: Path) -> None:
    directory = students["random"]
    same = ["--shards", scored, *SMALL, *REGIMES["random"], "--max-steps", 12, "--output-dir", directory]
    changed = ["--logging-steps", 2, "--dataloader-num-workers", 1, "--save-steps", 3]
    assert "finished already" in run(*TRAIN, *same, *changed)
    message = refused(*TRAIN, *same, "--mask-ratio", 0.3, "--learning-rate", 0.5)
    assert "mask_ratio: 0.15 → 0.3" in message and "learning_rate" in message and "--overwrite" in message
    # half the batch and twice the accumulation is the same batch
    assert "finished already" in run(
        *TRAIN, *same, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2
    )


def test_overwrite_starts_afresh(scored: Path, tmp_path: Path) -> None:
    train_here(scored, tmp_path / "out", *REGIMES["random"], "--max-steps", 2)
    summary = train_here(scored, tmp_path / "out", *REGIMES["parquet"], "--max-steps", 1, "--overwrite")
    assert summary["regime"] == "parquet" and summary["steps"] == 1
    assert not (tmp_path / "out" / "checkpoint-2").exists()


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
        model = BertForMaskedLM(trainer.model.config).eval()
        model.load_state_dict(trainer.model.state_dict())
        with torch.no_grad():
            entropy_BL = entropy(model(batch["input_ids"], attention_mask=attention).logits)
        candidates_BL = ~torch.isin(batch["input_ids"], torch.tensor(trainer.manifest.special_token_ids))
        seen.append((trainer.state.global_step, entropy_BL, candidates_BL, masked["positions_BK"]))
        return masked

    original = MaskedLMTrainer.mask_by_student
    monkeypatch.setattr(MaskedLMTrainer, "mask_by_student", spy)
    train_here(scored, tmp_path / "self", *REGIMES["self"], "--max-steps", 6, "--self-warmup-steps", 3)
    assert [step for step, *_ in seen] == list(range(6))
    for step, entropy_BL, candidates_BL, positions_BK in seen:
        agreement = []
        for row, positions in enumerate(positions_BK.tolist()):
            chosen = {p for p in positions if p != IGNORED}
            ranked = entropy_BL[row].masked_fill(~candidates_BL[row], -1).argsort(descending=True)
            agreement.append(chosen == set(ranked[: len(chosen)].tolist()))
        assert all(agreement) if step >= 3 else not any(agreement)


def test_other_models_by_configuration(scored: Path, tmp_path: Path) -> None:
    vocabulary = train.run.read_manifest(str(scored)).vocab_size
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
        (["--entropy-source", "parquet"], "has no entropies"),
        (["--entropy-source", "random", "--distill-weight", 0.5], "no top-k"),
        (["--entropy-source", "random", "--mask-temperature", 1], "--mask-temperature ranks by entropy"),
        (["--entropy-source", "random", "--mask-band", 0.5, 1], "--mask-band ranks by entropy"),
        (["--entropy-source", "random", "--self-warmup-steps", 5], "only applies to --entropy-source self"),
        (["--entropy-source", "self", "--mask-band", 0.5, 0.6], "narrower than the mask ratio"),
        (["--entropy-source", "self", "--mask-band", 0.5], "two quantiles"),
        (["--entropy-source", "self", "--mask-ratio", 0], "mask ratio"),
        (["--entropy-source", "self", "--distill-weight", 2], "not between 0 and 1"),
        (["--entropy-source", "self", "--eval-fraction", 1], "--eval-fraction"),
        (["--entropy-source", "self", "--eval-fraction", 0, "--eval-strategy", "steps"], "needs held-out shards"),
        (["--entropy-source", "self", "--label-smoothing-factor", 0.1], "--label-smoothing-factor has no use here"),
        (["--entropy-source", "self", "--model", "huge"], "no preset"),
        (["--entropy-source", "self", "--model", "./nowhere"], "nowhere"),
        (["--entropy-source", "self", "--output-dir", ""], "--output-dir is needed"),
    ],
)
def test_mistakes_are_one_sentence(tokens: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        train_here(tokens, tmp_path / "out", *flags, "--max-steps", 1)
    assert "\n" not in str(caught.value)


def test_mistakes_end_with_exit_code_2(tokens: Path, work: Path, tmp_path: Path) -> None:
    flags = ["--output-dir", tmp_path / "out", "--max-steps", 1]
    assert "no shard directory" in refused(*TRAIN, "--shards", work, *REGIMES["random"], *flags)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("…")
    message = refused(*TRAIN, "--shards", tokens, *REGIMES["random"], "--output-dir", tmp_path / "other")
    assert "holds files but no training run" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_learned_nothing_yet_gives_way(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"mask_ratio": 0.9}))
    assert train_here(tokens, tmp_path / "out", *REGIMES["random"], "--max-steps", 1)["steps"] == 1
