"""Masks of whole words: against a slow reference, and which tokens continue a word in every kind of tokenizer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rows import as_sets, candidates, keys, slow_words, words_of
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
from transformers import PreTrainedTokenizerFast

from entropy_masking.masking import noise, words
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED, select_positions

paper = MaskPolicy.paper


# --- the selection ---------------------------------------------------------------------------------------------------


def word_batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, candidates, continues) with ties, tokens without scores, padding, and words of one to many tokens."""
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
    {"temperature": 0.2},
    {"hard_share": 0.0},
    {"hard_share": 0.0, "ratio": 1},
    {"ratio": 0.4, "hard_share": 0.35},
    {"ratio": 0.3, "temperature": 0.5, "hard_share": 0.5},
    {"ratio": 0.02},
    {"ratio": 0.9, "hard_share": 0.8},
]


@pytest.mark.parametrize("length", [8, 41, 128])
@pytest.mark.parametrize("settings", WORDS)
def test_words_are_chosen_by_the_documented_rule(settings: dict, length: int) -> None:
    rows = 60
    policy = paper(**settings, seed=length, unit="word")
    score_BL, candidates_BL, continues_BL = word_batch(rows, length, seed=length)
    sequence_B, epoch_B = keys(rows, epoch=2)
    positions_BK = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, policy, continues_BL)
    draw_BL, hard_draw_BL = (
        noise.noise(policy.seed, stream, epoch_B, sequence_B, torch.arange(length))
        for stream in (noise.SELECTION, noise.HARD)
    )
    as_tokens = select_positions(score_BL, candidates_BL, sequence_B, epoch_B, replace(policy, unit="token"))
    assert torch.equal((positions_BK != IGNORED).sum(1), (as_tokens != IGNORED).sum(1)), "exactly k, as by tokens"
    columns = (score_BL, candidates_BL, continues_BL, draw_BL, hard_draw_BL)
    for row, chosen in enumerate(as_sets(positions_BK)):
        assert chosen == slow_words(*(column_BL[row].tolist() for column_BL in columns), policy), row


def test_words_of_one_token_are_masked_as_tokens() -> None:
    score_BL, candidates_BL, _ = word_batch(200, 64, seed=3)
    alone_BL = torch.zeros_like(candidates_BL)
    for settings in WORDS:
        by_word = select_positions(score_BL, candidates_BL, *keys(200), paper(**settings, unit="word"), alone_BL)
        assert torch.equal(by_word, select_positions(score_BL, candidates_BL, *keys(200), paper(**settings)))


def test_words_that_are_too_long_are_passed_over() -> None:
    """Sizes 1, 16, 1, 15 …: after each short word comes one that is too long."""
    sizes = [size for large in range(16, 1, -1) for size in (1, large)]
    size_BL = torch.zeros(1, sum(sizes), dtype=torch.float64)
    size_BL[0, : len(sizes)] = torch.tensor(sizes)
    for room in range(sum(sizes) + 1):
        expected, left = [], room
        for size in sizes:
            expected.append(size <= left)
            left -= size if size <= left else 0
        assert words.words_that_fit(size_BL, torch.tensor([[room]]))[0, : len(sizes)].tolist() == expected


def test_most_words_are_masked_whole_and_the_word_unit_needs_words() -> None:
    score_BL, candidates_BL, continues_BL = word_batch(500, 128, seed=8)
    policy = paper(unit="word", temperature=0.3)
    chosen = as_sets(select_positions(score_BL, candidates_BL, *keys(500), policy, continues_BL))
    whole = broken = 0
    for row in range(500):
        for word in words_of(candidates_BL[row].tolist(), continues_BL[row].tolist()):
            masked = len(chosen[row] & set(word))
            whole, broken = whole + (masked == len(word)), broken + (0 < masked < len(word))
    assert broken < 0.1 * whole
    with pytest.raises(ValueError, match="word unit needs"):
        select_positions(score_BL, candidates_BL, *keys(500), policy)


# --- tokenizers ------------------------------------------------------------------------------------------------------

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
def test_which_tokens_continue_a_word(kind: str) -> None:
    tokenizer = trained(kind)
    tokenizer.add_tokens(["##dogs"])
    continues_V = words.continuing_tokens(tokenizer, len(tokenizer) + 3)
    assert continues_V.dtype == torch.bool and continues_V.shape == (len(tokenizer) + 3,)
    assert not continues_V[tokenizer.all_special_ids].any() and not continues_V[-4:].any(), "added tokens and no tokens"
    ids = tokenizer("the unbelievable cats like the naïve mats", add_special_tokens=False).input_ids
    assert len(ids) > 12
    groups = words_of([True] * len(ids), continues_V[ids].tolist())
    spelled = [tokenizer.decode([ids[p] for p in group]).strip().replace(" ", "") for group in groups]
    expected = ["the", "unbelievable", "cats", "like", "the", "naïve", "mats"]
    assert spelled == ([word.replace("ï", "i") for word in expected] if kind == "wordpiece" else expected)


def test_tokenizers_that_do_not_mark_words_are_refused() -> None:
    """Tokenizers with another mark (</w> at the end of a word), without any, and one that is not fast."""
    end = CharBPETokenizer()
    end.train_from_iterator(TEXTS, vocab_size=60, show_progress=False)
    plain = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    for backend in (end._tokenizer, plain):
        with pytest.raises(ValueError, match="do not mark which of them continue a word") as caught:
            words.continuing_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), 60)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="object"):
        words.continuing_tokens(object(), 60)  # type: ignore[arg-type]
