"""Masked batches: the predicted part, the corruption, the teacher's numbers, and devices."""

import numpy as np
import pytest
import torch
from rows import CLS, MASK, PAD, SEP, VOCAB, K, L, as_sets, candidates, entropies, keys
from scipy import stats
from torch import Tensor

from entropy_masking.masking.masker import IGNORED_LABEL, Masker, corrupt
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED, select_positions

paper = MaskPolicy.paper


def masker(continues_V: Tensor | None = None) -> Masker:
    special = [PAD, CLS, SEP, MASK]
    return Masker(vocab_size=VOCAB, special_token_ids=special, mask_id=MASK, pad_id=PAD, continues_V=continues_V)


def raw_batch(rows: int) -> dict[str, Tensor]:
    """Rows of 0 to L - 2 candidates."""
    ids_BL = torch.randint(4, VOCAB, (rows, L), generator=torch.Generator().manual_seed(3))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    for row in range(rows):
        ids_BL[row, max(1, L - 1 - row) :] = PAD
    sequence_B, epoch_B = keys(rows)
    scores = {"entropy": entropies(rows), "surprisal": entropies(rows).flip(1)}
    return scores | {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B}


@pytest.mark.parametrize("predict_by", ["random", "entropy", "surprisal", "excess"])
@pytest.mark.parametrize("predict_ratio", [0.01, 0.12, 0.5])
def test_the_predicted_part_is_of_its_size_and_the_highest_of_the_masked(predict_by: str, predict_ratio: float) -> None:
    rows = L - 1
    raw = raw_batch(rows) | {"reference": entropies(rows)}
    settings = {"ratio": 0.5, "hard_share": 0.5}
    policy = paper(**settings, predict_ratio=predict_ratio, predict_by=predict_by)
    whole, batch = masker()(raw, paper(**settings)), masker()(raw, policy)
    assert torch.equal(whole["input_ids"], batch["input_ids"]), "masked alike"
    candidates_B = (raw["input_ids"] >= 4).sum(1).tolist()
    counts = [min(max(1, round(predict_ratio * count)), count) for count in candidates_B]
    if predict_by == "excess" and predict_ratio < 0.5:  # the student chooses
        assert batch["predicted_B1"].flatten().tolist() == counts
        assert torch.equal(batch["positions_BP"], whole["positions_BP"])
        expected_BK = raw["reference"].gather(1, whole["positions_BP"].clamp_min(0))
        real_BK = whole["positions_BP"] != IGNORED
        assert torch.equal(batch["reference_BP"][real_BK], expected_BK[real_BK])
        return
    assert batch["positions_BP"].shape == (rows, policy.max_predicted(L)) and "predicted_B1" not in batch
    masked, predicted = as_sets(whole["positions_BP"]), as_sets(batch["positions_BP"])
    assert [len(row) for row in masked] == [min(max(1, round(0.5 * count)), count) for count in candidates_B]
    assert [len(row) for row in predicted] == counts
    for row in range(rows):
        assert predicted[row] <= masked[row]
        if predict_by in raw:
            score = raw[predict_by][row].tolist()
            assert predicted[row] == set(sorted(masked[row], key=lambda p: -score[p])[: counts[row]])
        labels = [label for label in batch["labels_BP"][row].tolist() if label != IGNORED_LABEL]
        assert labels == raw["input_ids"][row, sorted(predicted[row])].tolist()


def test_a_random_part_is_uniform_and_of_its_own_each_epoch() -> None:
    rows = 8000
    raw = {name: tensor[:1].repeat_interleave(rows, 0) for name, tensor in raw_batch(1).items()}
    raw["sequence_id"] = keys(rows)[0]
    policy = paper(ratio=0.5, predict_ratio=0.1)  # 15 masked, the same in each row, and 3 predicted
    first, second = (masker()(raw | {"epoch": keys(rows, epoch)[1]}, policy)["positions_BP"] for epoch in (0, 1))
    counts = np.bincount(first.flatten().numpy(), minlength=L)
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4 and (counts > 0).sum() == 15
    assert (first != second).any(1).float().mean() > 0.9


def test_corruption_shares_and_labels() -> None:
    rows = 5000
    ids_BL = torch.randint(4, VOCAB, (rows, L), generator=torch.Generator().manual_seed(3))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    replacements_R = torch.arange(4, VOCAB)
    policy = MaskPolicy.random(ratio=0.15)
    positions_BK = select_positions(entropies(rows), candidates(rows), *keys(rows), policy)
    positions_BK[0, 2:] = IGNORED
    inputs_BL, labels_BK = corrupt(ids_BL, positions_BK, *keys(rows), policy, MASK, replacements_R)

    assert (labels_BK[0, 2:] == IGNORED_LABEL).all()
    real_BK = positions_BK != IGNORED
    assert torch.equal(labels_BK[real_BK], ids_BL.gather(1, positions_BK.clamp_min(0))[real_BK])
    chosen_BL = torch.zeros(rows, L + 1, dtype=torch.bool).scatter(1, positions_BK % (L + 1), True)[:, :L]
    assert torch.equal(inputs_BL[~chosen_BL], ids_BL[~chosen_BL])
    after, before = inputs_BL[chosen_BL], ids_BL[chosen_BL]
    masked, kept = after == MASK, after == before
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.01)
    replaced = after[~masked & ~kept]
    assert replaced.min() >= 4
    assert stats.chisquare(np.bincount(replaced.numpy(), minlength=VOCAB)[4:]).pvalue > 1e-4

    only = MaskPolicy.random(corruption="mask-only")
    inputs_BL, _ = corrupt(ids_BL, positions_BK, *keys(rows), only, MASK, replacements_R)
    assert (inputs_BL[chosen_BL] == MASK).all() and torch.equal(inputs_BL[~chosen_BL], ids_BL[~chosen_BL])


def test_a_masker_gathers_the_teachers_numbers_of_the_masked_positions() -> None:
    rows, top = 12, 3
    ids_BL = torch.randint(4, VOCAB, (rows, L))
    ids_BL[:, 0], ids_BL[:, -1], ids_BL[-1, 20:] = CLS, SEP, PAD
    sequence_B, epoch_B = keys(rows)
    topk_BLT = torch.randint(0, VOCAB, (rows, L, top))
    raw = {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B, "entropy": entropies(rows)}
    lse_BL = torch.rand(rows, L)
    batch = masker()(
        raw | {"topk_ids": topk_BLT, "topk_logprobs": -topk_BLT.float(), "temperature_lse": lse_BL}, paper()
    )
    assert torch.equal(batch["attention_mask"], (ids_BL != PAD).long())
    for row, position in ((r, p) for r in range(rows) for p in range(K)):
        where = int(batch["positions_BP"][row, position])
        if where != IGNORED:
            assert 0 < where < L - 1 and ids_BL[row, where] >= 4
            assert torch.equal(batch["teacher_ids_BPT"][row, position], topk_BLT[row, where])
            assert torch.equal(batch["teacher_logprobs_BPT"][row, position], -topk_BLT[row, where].float())
            assert batch["temperature_lse_BP"][row, position] == lse_BL[row, where]
    without = masker()({name: raw[name][:-1] for name in raw}, paper())
    assert without.keys() == {"input_ids", "positions_BP", "labels_BP"}
    assert torch.equal(without["input_ids"], batch["input_ids"][:-1])


def test_a_masker_masks_words_by_their_surprisal() -> None:
    rows = 40
    ids_BL = torch.randint(5, VOCAB, (rows, L), generator=torch.Generator().manual_seed(4))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    continues_V = torch.arange(VOCAB) >= 120
    sequence_B, epoch_B = keys(rows)
    raw = {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B, "surprisal": entropies(rows)}
    policy = paper(unit="word", by="surprisal")
    expected = select_positions(entropies(rows), candidates(rows), *keys(rows), policy, continues_V[ids_BL])
    assert torch.equal(masker(continues_V)(raw, policy)["positions_BP"], expected)
    with pytest.raises(ValueError, match="has no entropy to mask by"):
        masker(continues_V)(raw, paper())


@pytest.mark.parametrize("unit", ["token", "word"])
def test_on_an_accelerator_a_masker_waits_for_no_value(unit: str) -> None:
    """Tensors of torch's `meta` device have no values: whatever reads one fails."""
    here = masker(torch.arange(VOCAB) >= 120)
    moved = here.to("meta")
    assert here.special_V.device.type == "cpu" and moved.special_V.device.type == "meta"
    sequence_B, epoch_B = keys(6)
    raw = {"input_ids": torch.full((6, L), 9), "sequence_id": sequence_B, "epoch": epoch_B, "entropy": entropies(6)}
    raw |= {"reference": entropies(6), "progress": torch.linspace(0, 1, 6, dtype=torch.float64)}
    raw |= {"topk_ids": torch.ones(6, L, 4, dtype=torch.long), "topk_logprobs": torch.zeros(6, L, 4)}
    batch = {name: tensor.to("meta") for name, tensor in raw.items()}
    for settings in (
        {},
        {"temperature": 0.5, "hard_share": 0.7, "warmup": 0.1, "ramp": 0.5},
        {"hard_share": 0.0, "predict_ratio": 0.1},
        {"predict_ratio": 0.1, "predict_by": "entropy"},
        {"predict_ratio": 0.1, "predict_by": "excess"},
    ):
        policy = paper(**settings, unit=unit)
        masked = moved(batch, policy)
        predicted = 3 if "predict_ratio" in settings and settings.get("predict_by") != "excess" else K
        assert masked["positions_BP"].shape == (6, predicted) and masked["attention_mask"].shape == (6, L)
        assert "attention_mask" not in moved(batch | {"padded": False}, policy)
        on_cpu = here(raw, policy)
        assert torch.equal(on_cpu["positions_BP"], here(raw | {"padded": True}, policy)["positions_BP"])
        assert {n: (tensor.shape, tensor.dtype) for n, tensor in masked.items() if n != "attention_mask"} == {
            n: (tensor.shape, tensor.dtype) for n, tensor in on_cpu.items()
        }
