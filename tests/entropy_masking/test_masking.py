"""Which positions are masked, against slow references and statistics: hard share, temperature, ramp, and policies."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from rows import K, L, as_sets, candidates, entropies, keys, slow_paper
from scipy import stats

from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import select_positions

paper = MaskPolicy.paper

RANDOM = MaskPolicy.random(ratio=0.15)
SETTINGS = [
    {},
    {"hard_share": 0.0},
    {"hard_share": 0.3},
    {"hard_share": 0.5, "temperature": 0.7},
    {"temperature": 0.1},
]


@pytest.mark.parametrize(
    "length, ratio, k", [(128, 0.15, 19), (512, 0.15, 76), (128, 0.3, 38), (8, 0.01, 1), (12, 1, 10)]
)
def test_k_is_the_rounded_share_of_what_is_not_special(length: int, ratio: float, k: int) -> None:
    for settings in SETTINGS:
        policy = paper(ratio=ratio, **settings)
        positions_BK = select_positions(entropies(50, length), candidates(50, length), *keys(50), policy)
        assert positions_BK.shape == (50, k)
        assert all(len(row) == k and not row & {0, length - 1} for row in as_sets(positions_BK))
        assert (positions_BK.diff(dim=1) > 0).all()


def test_rows_with_fewer_candidates_mask_their_share() -> None:
    candidates_BL = candidates(6)
    for row, left in enumerate((30, 20, 10, 3, 1, 0)):
        candidates_BL[row, left + 1 :] = False
    for settings in SETTINGS:
        positions_BK = select_positions(entropies(6), candidates_BL, *keys(6), paper(**settings))
        assert [len(row) for row in as_sets(positions_BK)] == [4, 3, 2, 1, 1, 0]
        assert all(candidates_BL[row, list(chosen)].all() for row, chosen in enumerate(as_sets(positions_BK)))


@pytest.mark.parametrize("ratio", [0.02, 0.15, 0.4])
def test_hard_share_one_is_the_papers_selection(ratio: float) -> None:
    rows = 300
    score_BL, candidates_BL = (entropies(rows) * 2).round() / 2, candidates(rows)  # ties
    candidates_BL[:, 5:9] = False
    for row in range(0, rows, 7):
        candidates_BL[row, 4 + row % 20 :] = False
    score_BL[:, 5:9], score_BL[:, 20] = 100, torch.nan  # what is not scored comes last
    policy = paper(ratio=ratio, seed=5)
    positions_BK = select_positions(score_BL, candidates_BL, *keys(rows), policy)
    assert as_sets(positions_BK) == slow_paper(score_BL, candidates_BL, *keys(rows), policy)


def test_positions_without_scores_fill_a_row_that_has_no_others() -> None:
    score_BL = torch.full((9, L), torch.nan)
    score_BL[:, [4, 7]] = 1.0
    for row in as_sets(select_positions(score_BL, candidates(9), *keys(9), paper())):
        assert len(row) == K and {4, 7} < row


def test_ties_are_broken_by_noise_not_by_position() -> None:
    flat_BL = torch.ones(4000, L)
    positions_BK = select_positions(flat_BL, candidates(4000), *keys(4000), paper())
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=L)[1:-1]
    assert stats.chisquare(counts).pvalue > 1e-4
    # with what is tied above the cut, the rest of the order does not matter: the highest are in every time
    flat_BL[:, 10] = 2
    assert all(10 in row for row in as_sets(select_positions(flat_BL, candidates(4000), *keys(4000), paper())))


def test_hard_share_zero_is_uniform_and_blind_to_scores() -> None:
    positions_BK = select_positions(entropies(20_000), candidates(20_000), *keys(20_000), RANDOM)
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=L)[1:-1]
    # k of a row are drawn without replacement, which makes the statistic a little smaller than chi-square
    assert stats.chisquare(counts).pvalue > 1e-4
    unknown_BL, keyed = torch.full((20_000, L), torch.nan), (candidates(20_000), *keys(20_000))
    progress_B = torch.zeros(20_000, dtype=torch.float64)
    for policy in (RANDOM, paper(hard_share=0.0, temperature=1.0), paper(hard_share=0.01)):
        assert torch.equal(positions_BK, select_positions(unknown_BL, *keyed, policy)), "0.01 · 4 rounds to none"
    warm = paper(temperature=0.5, warmup=0.1)
    assert torch.equal(positions_BK, select_positions(entropies(20_000), *keyed, warm, progress_B=progress_B))


@pytest.mark.parametrize("hard_share", [0.3, 0.5, 0.75])
def test_the_uniform_part_comes_first_and_reaches_every_candidate(hard_share: float) -> None:
    """It is the mask that a ratio of its size draws, and the hard part the highest of what it leaves."""
    rows, length, ratio = 20_000, 42, 0.25  # k = 10
    entropy_BL = torch.arange(length).flip(0).expand(rows, -1).double()  # always the same order
    policy = paper(ratio=ratio, hard_share=hard_share)
    chosen = as_sets(select_positions(entropy_BL, candidates(rows, length), *keys(rows), policy))
    hard = round(hard_share * 10)
    alone = MaskPolicy.random(ratio=(10 - hard) / 40)
    uniform = as_sets(select_positions(entropy_BL, candidates(rows, length), *keys(rows), alone))
    for ours, drawn in zip(chosen, uniform, strict=True):
        assert drawn <= ours and ours - drawn == set([p for p in range(1, 41) if p not in drawn][:hard])
    shares = np.bincount([p for row in chosen for p in row], minlength=length)[1:-1] / rows
    least = (1 - hard_share) * ratio
    assert shares.min() > (10 - hard) / 40 - 5 * math.sqrt(least / rows), "each by chance, whatever its score"
    assert (10 - hard) / 40 >= least - 0.5 / 40  # as far as a number of positions can be a share


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_the_first_hard_mask_follows_softmax_of_rank_over_temperature(temperature: float) -> None:
    rows, length = 20_000, 10
    entropy_L = torch.tensor([9, 0.1, 1.0, 2.0, 0.5, 1.5, 2.5, 0.0, 2.0, 9])
    rank_L = torch.tensor([2, 4, 6.5, 3, 5, 8, 1, 6.5], dtype=torch.float64) / 8  # ties at their mean
    policy = paper(ratio=1 / 8, temperature=temperature)
    positions_BK = select_positions(entropy_L.expand(rows, -1), candidates(rows, length), *keys(rows), policy)
    assert positions_BK.shape == (rows, 1)
    expected = (rank_L / temperature).softmax(0).numpy() * rows
    counts = np.bincount(positions_BK.flatten().numpy(), minlength=length)[1:-1]
    seen = expected > 5
    counts, expected = (np.append(x[seen], x[~seen].sum()) if (~seen).any() else x for x in (counts, expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("unit", ["token", "word"])
def test_only_the_ranks_of_scores_count(unit: str) -> None:
    entropy_BL, candidates_BL = entropies(200).double(), candidates(200)
    entropy_BL[:, 12] = torch.nan
    alone_BL = torch.zeros_like(candidates_BL)
    for settings in ({}, {"temperature": 0.3}, {"temperature": 2.0, "hard_share": 0.5, "ratio": 0.3}):
        policy = paper(**settings, unit=unit)
        masks = [
            select_positions(score_BL, candidates_BL, *keys(200), policy, alone_BL)
            for score_BL in (entropy_BL, entropy_BL.exp(), 3 * entropy_BL - 40, entropy_BL.float())
        ]
        assert all(torch.equal(mask, masks[0]) for mask in masks[1:])


def test_a_higher_temperature_masks_lower_entropies() -> None:
    entropy_BL = entropies(3000)
    means = []
    for policy in (*(paper(temperature=each) for each in (0.0, 0.1, 0.5, 3.0)), RANDOM):
        positions_BK = select_positions(entropy_BL, candidates(3000), *keys(3000), policy)
        means.append(float(entropy_BL.gather(1, positions_BK).mean()))
    assert means == sorted(means, reverse=True)
    assert means[0] > 7 and means[-1] == pytest.approx(4, abs=0.1)


# --- the progress of a run -------------------------------------------------------------------------------------------


def test_the_hard_share_rises_over_the_ramp_after_the_warm_up() -> None:
    progress = np.linspace(0, 1, 201)
    for warmup, ramp in ((0.0, 0.0), (0.1, 0.2), (0.25, 0.0), (0.0, 1.0), (0.7, 0.3)):
        policy = paper(hard_share=0.6, warmup=warmup, ramp=ramp)
        found = policy.share_at(torch.from_numpy(progress)).tolist()
        for p, share in zip(progress.tolist(), found, strict=True):
            past = p - warmup
            expected = 0.6 * min(max(past / ramp, 0), 1) if ramp else 0.6 * (past >= 0)
            assert share == pytest.approx(expected, abs=1e-12)


def test_each_row_is_masked_by_its_own_progress() -> None:
    policy = paper(ratio=0.4, hard_share=0.5, temperature=0.2, warmup=0.2, ramp=0.5)
    progress_B = torch.linspace(0, 1, 50, dtype=torch.float64)
    found = select_positions(entropies(50), candidates(50), *keys(50), policy, progress_B=progress_B)
    for row, share in enumerate(policy.share_at(progress_B).tolist()):
        still = paper(ratio=0.4, hard_share=share, temperature=0.2)
        assert torch.equal(select_positions(entropies(50), candidates(50), *keys(50), still)[row], found[row])


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0},
        {"ratio": 1.2},
        {"hard_share": -0.1},
        {"hard_share": 1.1},
        {"hard_share": math.nan},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"warmup": 1},
        {"warmup": -0.1},
        {"ramp": 1.5},
        {"ramp": 0.6, "warmup": 0.5},
        {"ramp": math.nan},
        {"predict_ratio": 0},
        {"predict_ratio": 0.2},
        {"predict_by": "length"},
        {"corruption": "none"},
        {"unit": "sentence"},
        {"by": "length"},
    ],
)
def test_impossible_policies_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))} .* is (out of range|unknown); use "):
        paper(**settings)


def test_a_policy_comes_back_from_json() -> None:
    policy = MaskPolicy(0.3, 0.5, 0.7, 0.1, 0.2, "surprisal", 0.1, "excess", "mask-only", 7, "word")
    for each in (policy, paper(), RANDOM):
        text = json.dumps(asdict(each), allow_nan=False)
        assert MaskPolicy(**json.loads(text)) == each
    for broken in ({"band": 1}, asdict(policy) | {"ratio": 2}, asdict(policy) | {"other": 1}):
        with pytest.raises((TypeError, ValueError)):
            MaskPolicy(**broken)


def test_a_policy_repeats_where_two_epochs_hide_the_same() -> None:
    for policy in (paper(), RANDOM, paper(hard_share=0.7), paper(temperature=0.1)):
        first, second = (select_positions(entropies(99), candidates(99), *keys(99, e), policy) for e in (0, 1))
        assert policy.repeats() == torch.equal(first, second)
    assert not paper(warmup=0.1).repeats() and not paper(predict_ratio=0.1).repeats()


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_masked_alike_in_any_batch_and_anew_each_epoch() -> None:
    entropy_BL, candidates_BL, (ids_B, epoch_B) = entropies(64), candidates(64), keys(64)
    for settings in ({"temperature": 0.3}, {"hard_share": 0.5}, {"hard_share": 0.0}):
        policy = paper(ratio=0.3, **settings)
        whole = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B, policy)
        order = torch.randperm(64)
        shuffled = select_positions(entropy_BL[order], candidates_BL[order], ids_B[order], epoch_B[order], policy)
        assert torch.equal(whole[order], shuffled)
        again = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B + 1, policy)
        other = select_positions(entropy_BL, candidates_BL, ids_B, epoch_B, paper(ratio=0.3, **settings, seed=1))
        for changed in (again, other):
            assert (whole != changed).any(1).float().mean() > 0.95
