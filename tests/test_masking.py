"""Masking against slow references and statistics: selection, words, temperature, band, floor, corruption, noise."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    CharBPETokenizer,
    SentencePieceBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train.plan
import train.run
from pipeline.cli import UsageError
from pipeline.manifests import read_manifest
from train import masking, words
from train.masking import IGNORED, IGNORED_LABEL, Masker, MaskPolicy, corrupt, select_positions

L, K = 32, 4  # round(0.15 · 30), half to even
PAD, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 200


def keys(rows: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) + (7 << 32), torch.full((rows,), epoch)


def candidates(rows: int, length: int = L) -> Tensor:
    inner = torch.ones(rows, length, dtype=torch.bool)
    inner[:, 0] = inner[:, -1] = False
    return inner


def entropies(rows: int, length: int = L) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) * 8


def as_sets(positions_BK: Tensor) -> list[set[int]]:
    return [{p for p in row if p != IGNORED} for row in positions_BK.tolist()]


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


# --- words -----------------------------------------------------------------------------------------------------------


def words_of(candidate: list[bool], continues: list[bool], without: set[int] = frozenset()) -> list[list[int]]:
    """Pieces word by word: a candidate that is still there, and those directly after it that go on with it."""
    words: list[list[int]] = []
    for position, is_candidate in enumerate(candidate):
        if is_candidate and position not in without:
            if continues[position] and words and words[-1][-1] == position - 1:
                words[-1].append(position)
            else:
                words.append([position])
    return words


def slow_words(
    score: list[float],
    candidate: list[bool],
    continues: list[bool],
    gumbel: list[float],
    uniform: list[float],
    policy: MaskPolicy,
) -> set[int]:
    """The documented rule, word after word, in Python."""
    infinite = math.isinf(policy.temperature)
    score = [0.0] * len(score) if infinite else score
    candidate = [is_candidate and not math.isnan(h) for is_candidate, h in zip(candidate, score, strict=True)]
    count = sum(candidate)
    left = min(count, max(1, round(policy.ratio * count)), policy.positions(len(score)))
    words = words_of(candidate, continues)

    def mean(word: list[int]) -> float:
        return sum(score[p] for p in word) / len(word)

    low, high = math.floor(policy.band[0] * count), math.ceil(policy.band[1] * count)
    ascending = [p for word in sorted(words, key=mean) for p in word]
    inside = set(ascending[low:high])
    candidate = [any(p in inside for word in words if position in word for p in word) for position in range(len(score))]

    taken: set[int] = set()
    chance = round(policy.floor * left)
    for room, noise, scores, tau in (
        (left - chance, gumbel, score, 1.0 if infinite else policy.temperature),
        (chance, uniform, [0.0] * len(score), 1.0),
    ):
        words = words_of(candidate, continues, taken)
        means = {word[0]: sum(scores[p] for p in word) / len(word) for word in words}
        room += len(taken)
        for word in sorted(words, key=lambda w: (-(means[w[0]] + tau * noise[w[0]]), -noise[w[0]], w[0])):
            if len(taken) + len(word) <= room:
                taken |= set(word)
        pieces = [p for p, is_candidate in enumerate(candidate) if is_candidate and p not in taken]
        pieces.sort(key=lambda p: (-(scores[p] + tau * noise[p]), -noise[p], p))
        taken |= set(pieces[: room - len(taken)])
    return taken


def word_batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, candidates, continues) with ties, unscored pieces, padding, and words of 1 to many pieces."""
    random = np.random.default_rng(seed)
    score_BL = torch.from_numpy(random.integers(0, 12, (rows, length)) / 4.0)
    candidates_BL = candidates(rows, length)
    candidates_BL &= torch.from_numpy(random.random((rows, length)) > 0.05)
    for row in range(0, rows, 5):
        candidates_BL[row, random.integers(0, length) :] = False
    score_BL[torch.from_numpy(random.random((rows, length)) < 0.03)] = torch.nan
    continues_BL = torch.from_numpy(random.random((rows, length)) < random.choice([0.2, 0.6, 0.9], (rows, 1)))
    return score_BL, candidates_BL, continues_BL


WORDS = [
    {},
    {"temperature": 0.7},
    {"temperature": math.inf},
    {"temperature": math.inf, "ratio": 1},
    {"ratio": 0.4, "floor": 0.35},
    {"ratio": 0.3, "temperature": 1.5, "band": (0.3, 0.8), "floor": 0.5},
    {"ratio": 0.5, "band": (0.5, 1.0)},
    {"ratio": 0.02, "band": (0.4, 0.42)},
    {"ratio": 0.9, "floor": 1},
]


@pytest.mark.parametrize("length", [8, 41, 128])
@pytest.mark.parametrize("settings", WORDS)
def test_words_are_taken_by_the_documented_rule(settings: dict, length: int) -> None:
    rows = 60
    policy = MaskPolicy(**settings, seed=length, unit="word")
    score_BL, candidates_BL, continues_BL = word_batch(rows, length, seed=length)
    sequence_B, epoch_B = keys(rows, epoch=2)
    positions_BK = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, policy, continues_BL)
    gumbel_BL = -(-masking.noise(policy.seed, masking.SELECTION, epoch_B, sequence_B, torch.arange(length)).log()).log()
    uniform_BL = masking.noise(policy.seed, masking.FLOOR, epoch_B, sequence_B, torch.arange(length))
    as_tokens = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, replace(policy, unit="token"))
    assert torch.equal((positions_BK != IGNORED).sum(1), (as_tokens != IGNORED).sum(1)), "exactly k, as by tokens"
    columns = (score_BL, candidates_BL, continues_BL, gumbel_BL, uniform_BL)
    for row, chosen in enumerate(as_sets(positions_BK)):
        assert chosen == slow_words(*(column_BL[row].tolist() for column_BL in columns), policy), row


def test_words_of_one_piece_are_tokens() -> None:
    score_BL, candidates_BL, _ = word_batch(200, 64, seed=3)
    alone_BL = torch.zeros_like(candidates_BL)
    for settings in WORDS:
        by_word = select_positions(score_BL, candidates_BL, *keys(200), MaskPolicy(**settings, unit="word"), alone_BL)
        assert torch.equal(by_word, select_positions(score_BL, candidates_BL, *keys(200), MaskPolicy(**settings)))


def test_a_round_of_taking_words_that_never_fit_ends() -> None:
    """Sizes 1, 16, 1, 15 …: each round takes one word and meets one that is too large."""
    sizes = [size for large in range(16, 1, -1) for size in (1, large)]
    size_BL = torch.zeros(1, sum(sizes), dtype=torch.float64)
    size_BL[0, : len(sizes)] = torch.tensor(sizes)
    for room in range(sum(sizes) + 1):
        expected, left = [], room
        for size in sizes:
            expected.append(size <= left)
            left -= size if size <= left else 0
        assert words.take_while_it_fits(size_BL, torch.tensor([[room]]))[0, : len(sizes)].tolist() == expected


def test_most_words_are_masked_whole_and_the_word_unit_needs_words() -> None:
    score_BL, candidates_BL, continues_BL = word_batch(500, 128, seed=8)
    policy = MaskPolicy(unit="word", temperature=1.0)
    chosen = as_sets(select_positions(score_BL, candidates_BL, *keys(500), policy, continues_BL))
    whole = broken = 0
    for row in range(500):
        scored = candidates_BL[row] & ~score_BL[row].isnan()
        for word in words_of(scored.tolist(), continues_BL[row].tolist()):
            hidden = len(chosen[row] & set(word))
            whole, broken = whole + (hidden == len(word)), broken + (0 < hidden < len(word))
    assert broken < 0.1 * whole
    with pytest.raises(ValueError, match="word unit needs"):
        select_positions(score_BL, candidates_BL, *keys(500), policy)


TEXTS = ["the unbelievable cat sat on the mat, naïvely\n", "unbelievers like cats' mats\tand dogs"] * 20


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of each kind, in which few words are one token."""
    tokenizer = {
        "wordpiece": BertWordPieceTokenizer,
        "byte-level": ByteLevelBPETokenizer,
        "sentencepiece-bpe": SentencePieceBPETokenizer,
        "sentencepiece-unigram": SentencePieceUnigramTokenizer,
    }[kind]()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    size = {"byte-level": 275, "wordpiece": 56}.get(kind, 45)
    tokenizer.train_from_iterator(TEXTS, vocab_size=size, special_tokens=special, show_progress=False)
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **roles)


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "sentencepiece-bpe", "sentencepiece-unigram"])
def test_which_tokens_go_on_with_a_word(kind: str) -> None:
    tokenizer = trained(kind)
    tokenizer.add_tokens(["##dogs"])
    continues_V = words.continuing_tokens(tokenizer, len(tokenizer) + 3)
    assert continues_V.dtype == torch.bool and continues_V.shape == (len(tokenizer) + 3,)
    assert not continues_V[tokenizer.all_special_ids].any() and not continues_V[-4:].any(), "added tokens and no tokens"
    ids = tokenizer("the unbelievable cats like the naïve mats", add_special_tokens=False).input_ids
    assert len(ids) > 12
    groups = words_of([True] * len(ids), continues_V[ids].tolist())
    found = [tokenizer.decode([ids[p] for p in group]).strip().replace(" ", "") for group in groups]
    expected = ["the", "unbelievable", "cats", "like", "the", "naïve", "mats"]
    assert found == ([word.replace("ï", "i") for word in expected] if kind == "wordpiece" else expected)


def test_tokens_that_do_not_say_are_refused() -> None:
    """Whole words by another mark (</w> at their end), none at all, or no fast tokenizer."""
    end = CharBPETokenizer()
    end.train_from_iterator(TEXTS, vocab_size=60, show_progress=False)
    plain = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    for backend in (end._tokenizer, plain):
        with pytest.raises(ValueError, match="do not say which of them go on with a word") as caught:
            words.continuing_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), 60)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="object"):
        words.continuing_tokens(object(), 60)  # type: ignore[arg-type]


def test_a_masker_hides_words_by_their_surprisal() -> None:
    rows = 40
    ids_BL = torch.randint(5, VOCAB, (rows, L), generator=torch.Generator().manual_seed(4))
    ids_BL[:, 0], ids_BL[:, -1] = CLS, SEP
    continues_V = torch.arange(VOCAB) >= 120
    masker = Masker(
        vocab_size=VOCAB, special_token_ids=[PAD, CLS, SEP, MASK], mask_id=MASK, pad_id=PAD, continues_V=continues_V
    )
    sequence_B, epoch_B = keys(rows)
    raw = {"input_ids": ids_BL, "sequence_id": sequence_B, "epoch": epoch_B, "surprisal": entropies(rows)}
    policy = MaskPolicy(unit="word", by="surprisal")
    expected = select_positions(entropies(rows), candidates(rows), *keys(rows), policy, continues_V[ids_BL])
    assert torch.equal(masker(raw, policy)["positions_BK"], expected)
    with pytest.raises(KeyError, match="entropy"):
        masker(raw, MaskPolicy())


@pytest.mark.parametrize("unit", ["token", "word"])
def test_on_an_accelerator_nothing_is_waited_for(unit: str) -> None:
    """Tensors of torch's `meta` device have no values: whatever wants to look at one fails."""
    masker = Masker(
        vocab_size=VOCAB,
        special_token_ids=[PAD, CLS, SEP, MASK],
        mask_id=MASK,
        pad_id=PAD,
        continues_V=torch.arange(VOCAB) >= 120,
    )
    moved = masker.to("meta")
    assert masker.special_V.device.type == "cpu" and moved.special_V.device.type == "meta"
    sequence_B, epoch_B = keys(6)
    raw = {"input_ids": torch.full((6, L), 9), "sequence_id": sequence_B, "epoch": epoch_B, "entropy": entropies(6)}
    raw |= {"topk_ids": torch.ones(6, L, 4, dtype=torch.long), "topk_logprobs": torch.zeros(6, L, 4)}
    batch = {name: tensor.to("meta") for name, tensor in raw.items()}
    for settings in ({}, {"temperature": 1.0, "band": (0.2, 0.9), "floor": 0.3}, {"temperature": math.inf}):
        policy = MaskPolicy(**settings, unit=unit)
        masked = moved(batch, policy)
        assert masked["positions_BK"].shape == (6, K) and masked["attention_mask"].shape == (6, L)
        assert "attention_mask" not in moved(batch | {"padded": False}, policy)
        on_cpu = masker(raw, policy)
        assert torch.equal(on_cpu["positions_BK"], masker(raw | {"padded": True}, policy)["positions_BK"])
        assert {name: tensor.dtype for name, tensor in masked.items() if name != "attention_mask"} == {
            name: tensor.dtype for name, tensor in on_cpu.items()
        }


def test_rows_without_an_id_are_known_by_their_tokens() -> None:
    ids_BL = torch.randint(5, VOCAB, (300, L), generator=torch.Generator().manual_seed(4))
    ids_BL[1], ids_BL[2, :2], ids_BL[3, :2] = ids_BL[0], torch.tensor([5, 6]), torch.tensor([6, 5])
    ids_BL[3, 2:] = ids_BL[2, 2:]
    attended_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    hash_B = masking.sequence_hash(ids_BL, attended_BL)
    assert hash_B[0] == hash_B[1] and len(set(hash_B.tolist())) == 299
    padded_BL = torch.cat([ids_BL, torch.zeros_like(ids_BL)], dim=1)
    attended_BL = torch.cat([attended_BL, torch.zeros_like(attended_BL)], dim=1)
    assert torch.equal(masking.sequence_hash(padded_BL, attended_BL), hash_B)


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


def splitmix64(x: int) -> int:
    """In Python's whole numbers, from the published constants."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_noise_is_the_documented_hash() -> None:
    seed, stream, length = 11, 2, 5
    ids, epochs = [3, (5 << 32) + 17], [0, 4]
    found = masking.noise(seed, stream, torch.tensor(epochs), torch.tensor(ids), torch.arange(length))
    for row, (sequence, epoch) in enumerate(zip(ids, epochs, strict=True)):
        key = splitmix64(splitmix64(splitmix64(splitmix64(seed) + stream) + epoch) + sequence)
        for position in range(length):
            bits = splitmix64(splitmix64(position) + key) >> 11
            assert float(found[row, position]) == (bits + 0.5) * 2**-53


def test_noise_is_uniform_and_independent_across_everything() -> None:
    rows, length = 2000, 64
    sequence_B, epoch_B = keys(rows)
    base = masking.noise(0, 0, epoch_B, sequence_B, torch.arange(length))
    assert stats.kstest(base.flatten().numpy(), "uniform").pvalue > 1e-4
    others = {
        "seed": masking.noise(1, 0, epoch_B, sequence_B, torch.arange(length)),
        "stream": masking.noise(0, 1, epoch_B, sequence_B, torch.arange(length)),
        "epoch": masking.noise(0, 0, epoch_B + 1, sequence_B, torch.arange(length)),
        "sequence": masking.noise(0, 0, epoch_B, sequence_B + 1, torch.arange(length)),
        "position": base.roll(1, dims=1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(rows * length), name


def test_hashes_are_of_each_number_alone() -> None:
    whole = masking.hashes(5, 1, of_N=torch.arange(100))
    assert torch.equal(masking.hashes(5, 1, of_N=torch.arange(40, 60)), whole[40:60])
    assert len(set(whole.tolist())) == 100
    assert not (masking.hashes(5, 2, of_N=torch.arange(100)) == whole).any()


def test_hash_order_is_a_permutation_of_its_key() -> None:
    first = masking.hash_order(0, 1, 2, size=1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert torch.equal(first, masking.hash_order(0, 1, 2, size=1000))
    for key in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert not torch.equal(first, masking.hash_order(*key, size=1000))
    assert abs(np.corrcoef(first.numpy(), np.arange(1000))[0, 1]) < 0.15


# --- through the command line ----------------------------------------------------------------------------------------

WORDS_BY_SURPRISAL = ["--mask-unit", "word", "--mask-by", "surprisal", "--mask-ratio", 0.3, "--seed", 3]


def train_here(shards: Path, output: Path, *flags: object) -> dict[str, Any]:
    sizes = ["--max-steps", 3, "--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false"]
    train.run.main([str(flag) for flag in ("--shards", shards, "--output-dir", output, *sizes, *flags)])
    return json.loads((output / "summary.json").read_text())


@pytest.fixture
def masked_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor], MaskPolicy]]:
    """What every masker is given, and what it gives."""
    seen = []
    original = Masker.__call__

    def spy(masker: Masker, batch: dict[str, Tensor], policy: MaskPolicy) -> dict[str, Tensor]:
        seen.append((batch, original(masker, batch, policy), policy))
        return seen[-1][1]

    monkeypatch.setattr(Masker, "__call__", spy)
    return seen


def test_a_run_and_its_plan_hide_the_words_of_the_shards_surprisals(
    scored: Path, tmp_path: Path, masked_batches: list
) -> None:
    parquet = ["--entropy-source", "parquet", *WORDS_BY_SURPRISAL]
    summary = train_here(scored, tmp_path / "out", *parquet)
    assert (summary["flags"]["mask_unit"], summary["flags"]["mask_by"]) == ("word", "surprisal")
    policy = MaskPolicy(0.3, unit="word", by="surprisal", seed=3)
    trained = [(batch, masked) for batch, masked, used in masked_batches if used == policy]
    assert len(trained) == 3
    tokenizer = AutoTokenizer.from_pretrained(scored / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    table = pa.concat_tables(pq.read_table(file) for file in sorted(scored.glob("part-*.parquet")))
    rows = {row["sequence_id"]: row for row in table.select(["sequence_id", "input_ids", "surprisal"]).to_pylist()}
    hidden = {
        sequence: positions
        for batch, masked in trained
        for sequence, positions in zip(batch["sequence_id"].tolist(), as_sets(masked["positions_BK"]), strict=True)
    }
    for sequence, positions in hidden.items():
        ids, score = rows[sequence]["input_ids"], [float(x) for x in rows[sequence]["surprisal"]]
        keyed = (torch.tensor([0]), torch.tensor([sequence]))
        gumbel_L = -(-masking.noise(3, masking.SELECTION, *keyed, torch.arange(len(ids))).log()).log()
        continues = [tokens[token].startswith("##") for token in ids]
        assert positions == slow_words(
            score, [token >= 5 for token in ids], continues, gumbel_L[0].tolist(), score, policy
        )

    train.plan.main([str(flag) for flag in ("--shards", scored, "--output", tmp_path / "plan", *parquet)])
    manifest = read_manifest(str(tmp_path / "plan"), kind="plan")
    assert manifest.masks and MaskPolicy.from_json(manifest.masks["policy"]) == policy
    planned = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "plan").glob("part-*.parquet")))
    for row in planned.to_pylist():
        assert hidden.get(row["sequence_id"], set(row["positions"])) == set(row["positions"])


def test_a_student_masks_by_its_own_surprisal(scored: Path, tmp_path: Path, masked_batches: list) -> None:
    train_here(scored, tmp_path / "out", "--entropy-source", "self", "--mask-by", "surprisal", "--self-warmup-steps", 1)
    warm_up, *by_surprisal = (seen for seen in masked_batches if seen[2].by == "surprisal")
    assert warm_up[2].temperature == math.inf and len(by_surprisal) == 2
    for batch, masked, policy in by_surprisal:
        assert policy == MaskPolicy(by="surprisal", seed=42) and "padded" in batch
        special_BL = batch["input_ids"] < 5
        for row, chosen in enumerate(as_sets(masked["positions_BK"])):
            rest = {p for p in range(special_BL.shape[1]) if not special_BL[row, p]} - chosen
            score_L = batch["surprisal"][row]
            assert min(score_L[list(chosen)]) >= max(score_L[list(rest)])


def test_mistakes_are_one_sentence(scored: Path, tmp_path: Path) -> None:
    blind, unscored = tmp_path / "blind", tmp_path / "unscored"
    for directory in (blind, unscored):
        shutil.copytree(scored, directory)
    manifest = json.loads((scored / "manifest.json").read_text())
    (unscored / "manifest.json").write_text(json.dumps(manifest | {"scored": False}))
    # the same tokens with the same ids, but a tokenizer that takes each for a whole word
    backend = json.loads((blind / "tokenizer" / "tokenizer.json").read_text())
    backend["model"] = {"type": "WordLevel", "vocab": backend["model"]["vocab"], "unk_token": "[UNK]"}
    (blind / "tokenizer" / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((blind / "tokenizer" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (blind / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    parquet, random = ["--entropy-source", "parquet"], ["--entropy-source", "random"]
    for shards, flags, sentence in (
        (scored, [*parquet, "--mask-ratio", 0], "mask ratio 0 is not above 0"),
        (scored, [*parquet, "--mask-ratio", 1.2], "mask ratio 1.2 is not above 0"),
        (scored, [*parquet, "--mask-band", 0.5, 0.5], "no range within 0 and 1"),
        (scored, [*random, "--mask-by", "surprisal"], "--mask-by ranks by surprisal, which --entropy-source random"),
        (scored, [*parquet, "--mask-by", "entropy", "--mask-temperature", "inf"], "--mask-by has no use with"),
        (unscored, [*parquet, "--mask-by", "surprisal"], "has no surprisals"),
        (blind, [*random, "--mask-unit", "word"], "do not say which of them go on with a word"),
    ):
        for program, output in ((train.run, "--output-dir"), (train.plan, "--output")):
            with pytest.raises(UsageError, match=sentence) as caught:
                program.main([str(flag) for flag in ("--shards", shards, output, tmp_path / "out", *flags)])
            assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exited:
        train.run.main(["--shards", str(scored), *random, "--output-dir", "o", "--mask-unit", "letter"])
    assert exited.value.code == 2
