"""Self-masking: by means of token types, by a forward of its own, and masks that collapse."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import LENGTH
from in_process import SELF, train_here
from torch import Tensor
from torch.distributions import Categorical
from transformers import BertConfig, ModernBertForMaskedLM

from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.masking.type_means import MAX_COUNT, TypeMeans
from entropy_masking.models.masked_positions import MEASURED_EVERY
from entropy_masking.shards.manifests import read_manifest
from train.progress import IF_BETTER, MIN_RISE, REMEDY, CollapseWarnings, collapse_signs, type_concentration
from train.trainer import MaskedLMTrainer

paper = MaskPolicy.paper

V = 9
HARDEST = ["--hard-share", 1, "--mask-temperature", 0]


def means(reduce: Any = lambda sums: sums) -> TypeMeans:
    return TypeMeans(V, torch.device("cpu"), reduce)


def measured(step: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens [B, M], some of them ignored, and scores, some of them no numbers."""
    generator = torch.Generator().manual_seed(step)
    tokens_BM = torch.randint(-1, V - 1, (rows, 5), generator=generator)
    score_BM = 6 * torch.rand(rows, 5, generator=generator)
    score_BM[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    return tokens_BM.where(tokens_BM >= 0, -100), score_BM


def test_the_means_do_what_their_formula_says() -> None:
    found, mean, count, level = means(), [0.0] * V, [0.0] * V, 0.0
    for step in range(12):
        tokens_BM, score_BM = measured(step)
        found.add(step, tokens_BM, score_BM)
        found.update(before=step)  # not of a step that is not over
        pairs = zip(tokens_BM.flatten().tolist(), score_BM.flatten().tolist(), strict=True)
        new = [(token, score) for token, score in pairs if token >= 0 and math.isfinite(score)]
        expected_V = [m if n else level for m, n in zip(mean, count, strict=True)]
        torch.testing.assert_close(found.scores_of(torch.arange(V)).tolist(), expected_V, atol=1e-6, rtol=0)
        for token in range(V):
            if own := [score for t, score in new if t == token]:
                share = len(own) / (count[token] + len(own))
                mean[token] += share * (sum(own) / len(own) - mean[token])
                count[token] = min(MAX_COUNT, count[token] + len(own))
        level = sum(score for _, score in new) / len(new)
        found.update(before=step + 1)
    assert max(count) == MAX_COUNT and count[V - 1] == 0, "a full one, and one that was never measured"
    assert float(found.scores_of(torch.tensor([V - 1]))) == pytest.approx(level, abs=1e-6)


def test_the_means_are_the_same_however_a_batch_is_split_and_come_back() -> None:
    other_rank = torch.zeros(2, V, dtype=torch.int64)
    whole, split, resumed = means(), means(), means()
    first, second = means(lambda sums: sums + other_rank), means()
    for step in range(5):
        tokens_BM, score_BM = measured(step)
        for each in (whole, split, first):
            each.update(before=step)
        whole.add(step, tokens_BM, score_BM)
        for row in torch.randperm(6).tolist():
            split.add(step, tokens_BM[row : row + 1], score_BM[row : row + 1])
        first.add(step, tokens_BM[:2], score_BM[:2])
        second.add(step, tokens_BM[2:], score_BM[2:])
        other_rank.copy_(second._sums_2V)
        second._sums_2V.zero_()
        if step == 3:  # at a checkpoint all is taken in
            resumed.load({name: value.clone() for name, value in whole.state().items()})
        elif step > 3:
            resumed.add(step, tokens_BM, score_BM)
    expected = whole.state()
    for each in (split, first, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in each.state().items())


def test_a_run_masks_the_types_that_it_knew_least(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By means of what was measured at masked positions, one in four; the log has the means' numbers."""
    seen: list[tuple[dict[str, Any], dict[str, Any], Tensor]] = []
    added: list[Tensor] = []
    original, add = MaskedLMTrainer.mask_by_student, TypeMeans.add

    def spy(trainer: MaskedLMTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        raw = dict(batch)
        masked = original(trainer, batch)
        assert trainer.type_means
        seen.append((raw, masked, trainer.type_means.scores_of(torch.arange(trainer.manifest.vocab_size))))
        return dict(masked)

    monkeypatch.setattr(MaskedLMTrainer, "mask_by_student", spy)
    monkeypatch.setattr(TypeMeans, "add", lambda self, step, tokens, score: added.append(tokens) or add(self, step, tokens, score))  # fmt: skip  # noqa: E501
    flags = ["--max-steps", 12, "--logging-steps", 4, "--mask-warmup", 0.25, "--mask-ramp", 0, *HARDEST]
    summary = train_here(scored, tmp_path / "out", *SELF, *flags)
    assert summary["flags"]["self_refresh"] == "means" and summary["flags"]["hard_share"] == 1
    special, agreed = read_manifest(str(scored)).special_token_ids, []
    for raw, masked, mean_V in seen:
        score_BL = mean_V[raw["input_ids"]]
        for row, positions in enumerate(masked["positions_BP"].tolist()):
            chosen = [p for p in positions if p != IGNORED]
            rest = [p for p in range(LENGTH) if p not in chosen and int(raw["input_ids"][row, p]) not in special]
            agreed.append(bool(score_BL[row, chosen].min() >= score_BL[row, rest].max()))
    assert sum(agreed[8:24]) < 8 and all(agreed[24:]) and len(agreed) == 96
    for (_, masked, _), tokens_BM in zip(seen, added, strict=True):
        assert torch.equal(tokens_BM, masked["labels_BP"][:, ::MEASURED_EVERY])
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    first, second, third = (entry for entry in state["log_history"] if "loss" in entry)
    assert "entropy" in first, "one of its four steps is after the warm-up"
    for logged in (second, third):
        assert 0 < logged["entropy"] <= logged["masked_entropy"] < math.log(read_manifest(str(scored)).vocab_size)
        assert 0 < logged["mask_concentration"] < 1


def test_a_run_masks_the_tokens_that_the_student_is_least_sure_of(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(trainer: MaskedLMTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masked = original(trainer, batch)
        attention = (batch["input_ids"] != trainer.masker.pad_id).long()
        model = ModernBertForMaskedLM(trainer.model.config).eval()
        model.load_state_dict(trainer.model.state_dict())
        with torch.no_grad():
            logits_BLV = model(batch["input_ids"], attention_mask=attention).logits
            entropy_BL = Categorical(logits=logits_BLV.double()).entropy()
        candidates_BL = ~torch.isin(batch["input_ids"], torch.tensor(trainer.manifest.special_token_ids))
        seen.append((trainer.state.global_step, entropy_BL, candidates_BL, masked["positions_BP"]))
        return masked

    original = MaskedLMTrainer.mask_by_student
    monkeypatch.setattr(MaskedLMTrainer, "mask_by_student", spy)
    flags = ["--self-refresh", "step", *HARDEST]
    flags += ["--mask-warmup", 0.5, "--mask-ramp", 0, "--max-steps", 6]
    summary = train_here(scored, tmp_path / "self", *SELF, *flags)
    means = train_here(scored, tmp_path / "means", *SELF, "--max-steps", 6)
    assert summary["training_flops"] > means["training_flops"], "a forward of its own"
    assert [step for step, *_ in seen] == 2 * list(range(6))
    for step, entropy_BL, candidates_BL, positions_BK in seen[:6]:
        agreement = []
        for row, positions in enumerate(positions_BK.tolist()):
            chosen = {p for p in positions if p != IGNORED}
            ranked = entropy_BL[row].masked_fill(~candidates_BL[row], -1).argsort(descending=True)
            agreement.append(chosen == set(ranked[: len(chosen)].tolist()))
        assert all(agreement) if step >= 3 else not any(agreement)


# --- masks that collapse ---------------------------------------------------------------------------------------------


def said(policy: MaskPolicy, losses: list[float], concentration: list[float], capsys: Any) -> tuple[list[str], str]:
    """The warnings on a history, and what was printed while it came about."""
    state = SimpleNamespace(log_history=[], max_steps=100, is_world_process_zero=True)
    warner = CollapseWarnings(policy)
    for step, values in enumerate(zip(losses, concentration, strict=True), start=1):
        for name, value in zip(("eval_loss", "mask_concentration"), values, strict=True):
            state.log_history.append({"step": 10 * step, name: value})
            warner.on_log(None, state, None)  # type: ignore[arg-type]
    resumed = CollapseWarnings(policy)
    resumed.on_log(None, state, None)  # type: ignore[arg-type]
    assert resumed.by_sign == warner.by_sign
    return list(warner.by_sign.values()), capsys.readouterr().err


def test_the_second_evaluation_of_the_last_step_does_not_count() -> None:
    losses = [(60, 5.0), (80, 5.2), (90, 5.2), (100, 5.2)]
    history = [{"step": step, "eval_loss": loss} for step, loss in losses]
    assert not list(collapse_signs([*history[:3], history[2]], 0))
    assert [name for name, _ in collapse_signs(history, 0)] == ["rise"]


def test_what_collapses_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    spread, up = [0.01] * 8, 2 * MIN_RISE
    rising, falling = [5.0 + up * n for n in range(8)], [9.0 - n for n in range(8)]
    slow = [5.0 + 0.9 * MIN_RISE * (n % 2) for n in range(8)]
    for policy, losses, concentration, signs in (
        (paper(), rising, spread, ["5.00 nats, at 3 evaluations in a row up to step 40"]),
        (paper(warmup=0.35), rising, spread, ["5.00 nats, at 3 evaluations in a row up to step 60"]),
        (paper(warmup=0.35), [6.8, 5.0, 5.0, 6.8, 6.8, 6.8], spread[:6], ["5.00 nats, at 3 evaluations in a row"]),
        (paper(), [6.0, 5.0, 5 + up, 5.0, 5 + up, 5 + up, 5 + up, 5 + up], spread, ["up to step 70"]),
        (paper(), falling, spread, []),
        (paper(), slow, spread, []),
        (paper(), rising[:3] * 2, spread[:6], []),
        (MaskPolicy.random(), rising, [0.5] * 8, []),
        (MaskPolicy.random(predict_ratio=0.1, predict_by="surprisal"), rising, spread, ["up to step 40"]),
        (paper(), falling[3:], [0.01, 0.2, 0.3, 0.1, 0.1], ["at step 20 two masked tokens had the same type"]),
        (paper(), rising, [0.2] * 8, ["at step 10 two masked tokens", "evaluations in a row up to step 40"]),
    ):
        warnings, printed = said(policy, losses, concentration, capsys)
        assert len(warnings) == len(signs)
        assert all(sign in warning for sign, warning in zip(signs, warnings, strict=True))
        remedies = [REMEDY if "two masked" in warning else IF_BETTER for warning in warnings]
        assert all(warning.endswith(f"; {end}") for warning, end in zip(warnings, remedies, strict=True))
        # by the run, and again by the one that goes on
        assert sorted(printed.splitlines()) == sorted(2 * [f"warning: {warning}" for warning in warnings])


def test_masks_of_a_small_vocabulary_are_as_concentrated_as_its_text() -> None:
    history = [{"step": 10, "mask_concentration": 0.25}, {"step": 20, "mask_concentration": 0.8}]
    assert [sentence[:10] for _, sentence in collapse_signs(history, 0, 0.25)] == ["at step 20"]


def test_hard_masks_from_random_weights_collapse_and_the_defaults_do_not(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertConfig(vocab_size=read_manifest(str(scored)).vocab_size, **size).save_pretrained(tmp_path / "shape")
    flags = [*SELF, "--model", tmp_path / "shape", "--learning-rate", 5e-3, "--max-steps", 100, "--logging-steps", 10]
    flags += ["--save-strategy", "no"]
    hard = [*HARDEST, "--mask-warmup", 0, "--mask-ramp", 0]
    collapsed = train_here(scored, tmp_path / "hard", *flags, *hard)
    assert any("the held-out loss was above its lowest value" in warning for warning in collapsed["warnings"])
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the held-out loss")]
    assert set(printed) <= {f"warning: {warning}" for warning in collapsed["warnings"]} and printed
    kept = train_here(scored, tmp_path / "default", *flags)
    assert kept["warnings"] == [] and "warning: the" not in capsys.readouterr().err
    assert kept["eval_loss"] < collapsed["eval_loss"] - 1


def test_concentration_is_the_chance_of_two_of_one_type() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 200) ** 2
    count_V = torch.from_numpy(np.bincount(tokens, minlength=V * 4))
    pairs = (tokens[:, None] == tokens)[~np.eye(200, dtype=bool)]
    assert type_concentration(count_V) == pytest.approx(float(pairs.mean()))
    assert type_concentration(torch.ones(V, dtype=torch.int64)) == 0.0, "too few to tell"
