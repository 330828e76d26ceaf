"""Masking against slow references and statistics: selection, temperature, band, floor, corruption."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from rows import CLS, MASK, PAD, SEP, VOCAB, K, L, as_sets, candidates, entropies, keys
from scipy import stats

from train.masking import IGNORED, IGNORED_LABEL, Masker, MaskPolicy, corrupt, select_positions


@pytest.mark.parametrize(
    "length, ratio, k", [(128, 0.15, 19), (512, 0.15, 76), (128, 0.3, 38), (8, 0.01, 1), (12, 1, 10)]
)
def test_k_is_the_rounded_share_of_what_is_not_special(length: int, ratio: float, k: int) -> None:
    for temperature in (0.0, 0.7, math.inf):
        policy = MaskPolicy(ratio=ratio, temperature=temperature)
        positions_BK = select_positions(entropies(50, length), candidates(50, length), *keys(50), policy)
        assert positions_BK.shape == (50, k)
        assert all(len(row) == k and not row & {0, length - 1} for row in as_sets(positions_BK))
        assert (positions_BK.diff(dim=1) > 0).all()


def test_rows_with_fewer_candidates_mask_their_share() -> None:
    candidates_BL = candidates(6)
    for row, left in enumerate((30, 20, 10, 3, 1, 0)):
        candidates_BL[row, left + 1 :] = False
    for temperature in (0.0, 1.0, math.inf):
        policy = MaskPolicy(temperature=temperature)
        positions_BK = select_positions(entropies(6), candidates_BL, *keys(6), policy)
        assert [len(row) for row in as_sets(positions_BK)] == [4, 3, 2, 1, 1, 0]
        assert all(candidates_BL[row, list(chosen)].all() for row, chosen in enumerate(as_sets(positions_BK)))


def test_temperature_zero_takes_the_highest_entropies() -> None:
    entropy_BL, candidates_BL = entropies(200), candidates(200)
    candidates_BL[:, 5:9] = False
    entropy_BL[:, 20] = torch.nan  # not scored: no candidate
    entropy_BL[:, 5:9] = 100
    positions_BK = select_positions(entropy_BL, candidates_BL, *keys(200), MaskPolicy())
    for row, chosen in enumerate(as_sets(positions_BK)):
        allowed = [p for p in range(1, L - 1) if p != 20 and not 5 <= p < 9]
        best = sorted(allowed, key=lambda p: -float(entropy_BL[row, p]))[: round(0.15 * len(allowed))]
        assert chosen == set(best)


def test_ties_are_broken_by_noise_not_by_position() -> None:
    flat_BL = torch.ones(4000, L)
    positions_BK = select_positions(flat_BL, candidates(4000), *keys(4000), MaskPolicy())
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=L)[1:-1]
    assert stats.chisquare(counts).pvalue > 1e-4
    # with what is tied above the cut, the rest of the order does not matter: the highest are in every time
    flat_BL[:, 10] = 2
    assert all(10 in row for row in as_sets(select_positions(flat_BL, candidates(4000), *keys(4000), MaskPolicy())))


def test_infinite_temperature_is_uniform_and_blind_to_entropy() -> None:
    policy = MaskPolicy(temperature=math.inf)
    positions_BK = select_positions(entropies(20_000), candidates(20_000), *keys(20_000), policy)
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=L)[1:-1]
    # k of a row are drawn without replacement, which makes the statistic a little smaller than chi-square
    assert stats.chisquare(counts).pvalue > 1e-4
    unknown_BL = torch.full((20_000, L), torch.nan)
    assert torch.equal(positions_BK, select_positions(unknown_BL, candidates(20_000), *keys(20_000), policy))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_first_mask_follows_softmax_of_entropy_over_temperature(temperature: float) -> None:
    rows, length = 20_000, 10
    entropy_L = torch.tensor([9, 0.1, 1.0, 2.0, 0.5, 1.5, 2.5, 0.0, 3.0, 9])
    policy = MaskPolicy(ratio=1 / 8, temperature=temperature)
    positions_BK = select_positions(entropy_L.expand(rows, -1), candidates(rows, length), *keys(rows), policy)
    assert positions_BK.shape == (rows, 1)
    expected = (entropy_L[1:-1].double() / temperature).softmax(0).numpy() * rows
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=length)[1:-1]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


def test_a_higher_temperature_masks_lower_entropies() -> None:
    entropy_BL = entropies(3000)
    means = []
    for temperature in (0.0, 0.5, 2.0, 8.0, math.inf):
        policy = MaskPolicy(temperature=temperature)
        positions_BK = select_positions(entropy_BL, candidates(3000), *keys(3000), policy)
        means.append(float(entropy_BL.gather(1, positions_BK).mean()))
    assert means == sorted(means, reverse=True)
    assert means[0] > 7 and means[-1] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("band, low, high", [((0.0, 0.5), 0, 15), ((0.5, 1.0), 15, 30), ((0.4, 0.6), 12, 18)])
def test_a_band_limits_the_candidates_to_its_quantiles(band: tuple[float, float], low: int, high: int) -> None:
    entropy_BL = entropies(300)
    ranks_BL = entropy_BL[:, 1:-1].argsort(1).argsort(1)
    for temperature in (0.0, 1.0):
        policy = MaskPolicy(temperature=temperature, band=band)
        for row, chosen in enumerate(as_sets(select_positions(entropy_BL, candidates(300), *keys(300), policy))):
            assert len(chosen) == K
            assert all(low <= ranks_BL[row, p - 1] < high for p in chosen)


def test_a_band_as_narrow_as_the_ratio_still_fills_every_row() -> None:
    candidates_BL = candidates(29)
    for row in range(29):
        candidates_BL[row, row + 2 :] = False
    policy = MaskPolicy(ratio=0.15, band=(0.425, 0.575))
    chosen = as_sets(select_positions(entropies(29), candidates_BL, *keys(29), policy))
    assert [len(row) for row in chosen] == [max(1, round(0.15 * count)) for count in range(1, 30)]


def test_a_floor_draws_its_share_uniformly_from_the_rest() -> None:
    rows, length = 4000, 42
    entropy_BL = torch.arange(length).flip(0).expand(rows, -1).double()  # always the same order
    policy = MaskPolicy(ratio=0.25, floor=0.4)  # k = 10, of which 4 by chance
    positions_BK = select_positions(entropy_BL, candidates(rows, length), *keys(rows), policy)
    assert (positions_BK != IGNORED).all()
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=length)[1:-1]
    assert (counts[:6] == rows).all()
    assert counts[6:].sum() == 4 * rows
    assert stats.chisquare(counts[6:]).pvalue > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0},
        {"ratio": 1.2},
        {"temperature": -1},
        {"temperature": math.nan},
        {"band": (0.5, 0.6)},
        {"band": (0.6, 0.5)},
        {"band": (0, 1.5)},
        {"floor": 1.5},
        {"corruption": "none"},
        {"unit": "sentence"},
        {"by": "length"},
    ],
)
def test_impossible_policies_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"mask|corruption"):
        MaskPolicy(**settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7, math.inf])
def test_a_policy_comes_back_from_json(temperature: float) -> None:
    policy = MaskPolicy(0.3, temperature, (0.25, 1.0), 0.1, "mask-only", 7, "word", "surprisal")
    text = json.dumps(policy.to_json(), allow_nan=False)
    assert MaskPolicy.from_json(json.loads(text)) == policy
    for broken in ({}, {"band": 1}, policy.to_json() | {"ratio": 2}, policy.to_json() | {"other": 1}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            MaskPolicy.from_json(broken)


def test_a_policy_of_before_there_were_words_hides_tokens_by_entropy() -> None:
    fields = MaskPolicy(0.3, 1.0, seed=7).to_json()
    del fields["unit"], fields["by"]
    assert MaskPolicy.from_json(fields) == MaskPolicy(0.3, 1.0, seed=7)


def test_a_policy_repeats_where_two_epochs_hide_the_same() -> None:
    for policy in (MaskPolicy(), MaskPolicy(band=(0.2, 0.8)), MaskPolicy(floor=0.3), MaskPolicy(temperature=0.1)):
        first, second = (select_positions(entropies(99), candidates(99), *keys(99, e), policy) for e in (0, 1))
        assert policy.repeats() == torch.equal(first, second)


# --- rows, corruption, noise -----------------------------------------------------------------------------------------


def test_a_row_is_masked_alike_in_any_batch_and_anew_each_epoch() -> None:
    entropy_BL, candidates_BL, (ids_B, epoch_B) = entropies(64), candidates(64), keys(64)
    for temperature in (1.0, math.inf):
        policy = MaskPolicy(temperature=temperature)
        whole = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B, policy)
        order = torch.randperm(64)
        shuffled = select_positions(entropy_BL[order], candidates_BL[order], ids_B[order], epoch_B[order], policy)
        assert torch.equal(whole[order], shuffled)
        again = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B + 1, policy)
        other = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B, MaskPolicy(temperature=temperature, seed=1))
        for changed in (again, other):
            assert (whole != changed).any(1).float().mean() > 0.95


def test_corruption_shares_and_labels() -> None:
    rows = 5000
    ids_BL = torch.randint(4, VOCAB, (rows, L), generator=torch.Generator().manual_seed(3))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    replacements_R = torch.arange(4, VOCAB)
    policy = MaskPolicy(temperature=math.inf)
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

    only = MaskPolicy(temperature=math.inf, corruption="mask-only")
    inputs_BL, _ = corrupt(ids_BL, positions_BK, *keys(rows), only, MASK, replacements_R)
    assert (inputs_BL[chosen_BL] == MASK).all() and torch.equal(inputs_BL[~chosen_BL], ids_BL[~chosen_BL])


def test_masker_gathers_what_the_teacher_said_of_the_masked_positions() -> None:
    rows, top = 12, 3
    ids_BL = torch.randint(4, VOCAB, (rows, L))
    ids_BL[:, 0], ids_BL[:, -1], ids_BL[-1, 20:] = CLS, SEP, PAD
    sequence_B, epoch_B = keys(rows)
    topk_BLT = torch.randint(0, VOCAB, (rows, L, top))
    raw = {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B, "entropy": entropies(rows)}
    lse_BL = torch.rand(rows, L)
    masker = Masker(vocab_size=VOCAB, special_token_ids=[PAD, CLS, SEP, MASK], mask_id=MASK, pad_id=PAD)
    batch = masker(
        raw | {"topk_ids": topk_BLT, "topk_logprobs": -topk_BLT.float(), "temperature_lse": lse_BL}, MaskPolicy()
    )
    assert torch.equal(batch["attention_mask"], (ids_BL != PAD).long())
    for row, position in ((r, p) for r in range(rows) for p in range(K)):
        where = int(batch["positions_BK"][row, position])
        if where != IGNORED:
            assert 0 < where < L - 1 and ids_BL[row, where] >= 4
            assert torch.equal(batch["teacher_ids_BKT"][row, position], topk_BLT[row, where])
            assert torch.equal(batch["teacher_logprobs_BKT"][row, position], -topk_BLT[row, where].float())
            assert batch["temperature_lse_BK"][row, position] == lse_BL[row, where]
    without = masker({name: raw[name][:-1] for name in raw}, MaskPolicy())
    assert without.keys() == {"input_ids", "positions_BK", "labels_BK"}
    assert torch.equal(without["input_ids"], batch["input_ids"][:-1])
