"""Words: which tokens continue a word, the words of a batch, and the choice of whole words within a limit.

Tokenizers mark words in the tokens themselves. WordPiece puts ``##`` before a token that continues a word. Byte-level
BPE and SentencePiece mark a token that begins one: ``Ġ`` or ``▁`` stands for the space before it.

Shapes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")  # byte-level BPE's space, newline, tab and carriage return


def continuing_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Which tokens continue a word, bool [V]. Special and added tokens do not, nor do ids without a token.

    Raises ValueError if the tokens do not mark words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    marks, begins = _word_marks(backend) if backend else ((), False)
    if not marks:
        kind = type(backend.model if backend else tokenizer).__name__
        raise ValueError(
            f"the tokens of this tokenizer ({kind}) do not mark which of them continue a word, as those of WordPiece, "
            "byte-level BPE and SentencePiece do; use --mask-unit token"
        )
    added = set(tokenizer.get_added_vocab().values())
    continues_V = torch.zeros(vocab_size, dtype=torch.bool)
    for token, index in tokenizer.get_vocab().items():
        if index < vocab_size and index not in added:
            continues_V[index] = token.startswith(marks) != begins
    return continues_V


def _word_marks(backend: Tokenizer) -> tuple[tuple[str, ...], bool]:
    """The marks of a token, and whether they begin a word; no marks if spaces are removed or unchanged."""
    if prefix := getattr(backend.model, "continuing_subword_prefix", None):
        return (prefix,), False
    text = backend.normalizer.normalize_str("a a") if backend.normalizer else "a a"
    if backend.pre_tokenizer:
        text = "".join(part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    mark = text.rstrip("a").rpartition("a")[2].strip()  # the replacement of the space
    if mark in BYTE_LEVEL_SPACES:
        return BYTE_LEVEL_SPACES, True
    return ((mark,) if mark else ()), True


def word_heads(candidates_BL: Tensor, continues_BL: Tensor) -> Tensor:
    """The position of the first token of each candidate's word.

    A word is a candidate and the candidates directly after it that continue it. So if some tokens of a word are not
    candidates, the remaining parts count as separate words.
    """
    after_candidate_BL = F.pad(candidates_BL[:, :-1], (1, 0))
    first_BL = candidates_BL & ~(continues_BL & after_candidate_BL)
    position_L = torch.arange(candidates_BL.shape[1], device=candidates_BL.device)
    return torch.where(first_BL, position_L, 0).cummax(1).values


def word_sizes_and_means(score_BL: Tensor, candidates_BL: Tensor, head_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The number of tokens and the mean score of each word, at its first token; size 0 elsewhere."""
    size_BL = torch.zeros_like(score_BL).scatter_add(1, head_BL, candidates_BL.double())
    sum_BL = torch.zeros_like(score_BL).scatter_add(1, head_BL, score_BL.masked_fill(~candidates_BL, 0))
    return size_BL, sum_BL / size_BL.clamp_min(1)


def words_that_fit(size_BL: Tensor, room_B1: Tensor) -> Tensor:
    """Choose words in order if they fit into the space that earlier words left; bool [B, L].

    A round chooses words until one does not fit. Then all words that are larger than the remaining space are dropped.
    With sizes 3, 4, 1 and space for 5 tokens, the first round chooses 3 and drops 4, and the second round chooses 1.
    Each round ends at a smaller word than the one before. Sizes add up to L, so there are at most √(2L) rounds.
    """
    chosen_BL = torch.zeros_like(size_BL, dtype=torch.bool)
    open_BL = size_BL > 0
    for _ in range(math.isqrt(2 * size_BL.shape[1]) + 1):
        open_BL = open_BL & (size_BL <= room_B1)
        if open_BL.device.type == "cpu" and not open_BL.any():  # this check would wait for an accelerator
            break
        fits_BL = open_BL & ((size_BL * open_BL).cumsum(1) <= room_B1)
        room_B1 = room_B1 - (size_BL * fits_BL).sum(1, keepdim=True)
        chosen_BL, open_BL = chosen_BL | fits_BL, open_BL & ~fits_BL
    return chosen_BL
