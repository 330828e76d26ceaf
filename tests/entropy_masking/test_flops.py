"""What a run is said to cost, against torch's count of its steps, and against the formula that people know."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from entropy_masking.models.flops import forward_flops, training_flops
from entropy_masking.models.masked_positions import student_scores, with_masked_positions
from train import progress
from train.progress import ProgressReport
from train.results import MAX_POINTS, curve

B, L, K, P, V = 3, 64, 10, 4, 3000
SIZES = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(**SIZES, intermediate_size=256, max_position_embeddings=L)
MODERN = ModernBertConfig(
    **SIZES, intermediate_size=128, max_position_embeddings=L, pad_token_id=0, cls_token_id=1, sep_token_id=2
)


@pytest.fixture(scope="module")
def student() -> BertForMaskedLM:
    return with_masked_positions(BertForMaskedLM(BERT), L)


def count(model: BertForMaskedLM, extra: str | None) -> int:
    """Of one step, its backward included."""
    ids_BL = torch.randint(3, V, (B, L))
    positions_BK = torch.arange(K).expand(B, K)
    chosen = {"predicted_B1": torch.full((B, 1), P), "predictions": P} if extra == "chosen" else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if extra == "fresh":
            student_scores(model, ids_BL, None)
        loss = model(ids_BL, positions_BP=positions_BK, labels_BP=ids_BL[:, :K], **chosen)["loss"]
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("extra", [None, "fresh", "chosen"])
def test_a_step_costs_what_torch_counts(student: BertForMaskedLM, extra: str | None) -> None:
    predicted = {"fresh": {"predicted": K, "fresh": B, "length": L}, "chosen": {"predicted": P, "scored": K}}
    expected = training_flops(*forward_flops(student.masked_lm, L), B, **predicted.get(extra or "", {"predicted": K}))
    assert expected == pytest.approx(count(student, extra), rel=0.02)


def test_of_another_architecture() -> None:
    model = with_masked_positions(ModernBertForMaskedLM(MODERN), L)
    expected = training_flops(*forward_flops(model.masked_lm, L), sequences=B, predicted=K)
    assert expected == pytest.approx(count(model, None), rel=0.02)


def test_a_forward_costs_what_the_formula_says(student: BertForMaskedLM) -> None:
    H, layers = BERT.hidden_size, BERT.num_hidden_layers
    assert forward_flops(student.masked_lm, L) == (L * layers * (24 * H**2 + 4 * L * H), 2 * H**2 + 2 * H * V)


def test_a_curve_is_thinned_evenly_and_keeps_its_end() -> None:
    log = [{"step": 5, "eval_loss": 9.0}]  # of a program that noted no seconds
    for step in range(10, 10_001, 10):
        if step <= 5_000:  # of an older version
            log += [{"step": step, "train_seconds": step / 4}, {"step": step, "eval_loss": 1 / step}]
        else:
            log.append({"step": step, "train_seconds": step / 4, "eval_loss": 1 / step})
        log.append({"step": step, "train_seconds": step / 4 + 1})  # at a checkpoint
    log.append({"step": 10_000, "train_seconds": 2600.0, "eval_loss": 2.0})
    points = curve(log)
    assert points[-1] == {"step": 10_000, "seconds": 2500.0, "eval_loss": 2.0}
    assert points[0] == {"step": 50, "seconds": 12.5, "eval_loss": 1 / 50}
    steps = [point["step"] for point in points]
    assert steps == list(range(50, 10_001, 50)) and len(steps) == MAX_POINTS
    assert curve([]) == []


def test_an_evaluation_is_no_second_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    report, events = ProgressReport(L), (TrainingArguments(), TrainerState(), TrainerControl())
    events[1].log_history.append({"step": 7, "train_seconds": 40.0})  # of the session before
    events[1].is_world_process_zero = False
    report.on_train_begin(*events)
    clock += 10
    report.on_evaluate(*events, metrics={"eval_seconds": 8.0})
    assert report.seconds() == 42.0
