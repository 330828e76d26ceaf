"""Words: which tokens go on with the word of the token before, the words of a batch, and taking them while they fit.

Tokenizers mark words in the tokens themselves: WordPiece continues one with ``##``, byte-level BPE begins one with a
space (written ``Ġ``), SentencePiece with ``▁``.
"""

from __future__ import annotations

import json
import math
import string
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_LEVEL_SPACES = ["Ġ", "Ċ", "ĉ", "č"]  # how byte-level BPE writes space, newline, tab, carriage return


def continuing_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Which tokens go on with a word, bool [V]; special and added tokens do not, nor ids without a token.

    Raises:
        ValueError: the tokens do not say.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend else {"model": {}}
    model = settings["model"]
    parts = [part for name in ("normalizer", "pre_tokenizer") for part in _parts(settings.get(name))]
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [part["content"] for part in parts if part["type"] == "Replace" and part["pattern"] == {"String": " "}]
    spaces = [space for space in spaces if space]
    if prefix := model.get("continuing_subword_prefix"):
        marks, begins = [prefix], False
    elif any(part["type"] == "ByteLevel" for part in parts):
        marks, begins = BYTE_LEVEL_SPACES, True
    elif spaces and model["type"] in ("Unigram", "BPE"):
        marks, begins = spaces, True
    else:
        kind = model.get("type", type(tokenizer).__name__)
        raise ValueError(
            f"the tokens of this tokenizer ({kind}) do not say which of them go on with a word; WordPiece, byte-level "
            "BPE and SentencePiece do: use --mask-unit token"
        )
    added = {token["id"] for token in settings["added_tokens"]}
    continues_V = torch.zeros(vocab_size, dtype=torch.bool)
    for token, index in tokenizer.get_vocab().items():
        if index < vocab_size and index not in added:
            continues_V[index] = token.startswith(tuple(marks)) != begins
    return continues_V


def apart_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Which tokens are no part of a word, bool [V]: special ones, whitespace, punctuation.

    Where a mark begins a word, what lacks it need not go on with one: the comma in ``mat,``, a word after a bracket or
    a line break. A mark that continues a word, WordPiece's, leaves nothing open, so there no token is apart.
    """
    apart_V = torch.zeros(vocab_size, dtype=torch.bool)
    if getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None):
        return apart_V
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index < vocab_size:
            text = tokenizer.convert_tokens_to_string([token])
            apart_V[index] = index in special or all(map(_is_space_or_punctuation, text))
    return apart_V


def _is_space_or_punctuation(character: str) -> bool:
    return character.isspace() or character in string.punctuation or unicodedata.category(character).startswith("P")


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that it is a sequence of."""
    if component:
        yield component
        for part in component.get("normalizers", []) + component.get("pretokenizers", []):
            yield from _parts(part)


def word_heads(candidates_BL: Tensor, continues_BL: Tensor) -> Tensor:
    """The position of the first piece of each candidate's word.

    A word is a candidate and the candidates directly after it that go on with it. So what is left of a word, where
    some of its pieces cannot be taken or are taken already, counts as a word.
    """
    after_BL = F.pad(candidates_BL[:, :-1], (1, 0))  # a candidate stands before
    first_BL = candidates_BL & ~(continues_BL & after_BL)
    position_L = torch.arange(candidates_BL.shape[1], device=candidates_BL.device)
    return torch.where(first_BL, position_L, 0).cummax(1).values


def word_sizes_and_means(score_BL: Tensor, candidates_BL: Tensor, head_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces and mean score of each word, at its first piece; size 0 elsewhere."""
    size_BL = torch.zeros_like(score_BL).scatter_add(1, head_BL, candidates_BL.double())
    sum_BL = torch.zeros_like(score_BL).scatter_add(1, head_BL, score_BL.masked_fill(~candidates_BL, 0))
    return size_BL, sum_BL / size_BL.clamp_min(1)


def take_while_it_fits(size_BL: Tensor, room_B1: Tensor) -> Tensor:
    """Which words are taken, in order, each that fits into what those before it left of the room (bool [B, L]).

    In rounds: as many as fit in a row; then those too large for the rest are out. A round ends at a word that is
    smaller than the one that ended the round before, for that one was out. Sizes add up to L, so there are not more
    than √(2L) of them.
    """
    taken_BL = torch.zeros_like(size_BL, dtype=torch.bool)
    open_BL = size_BL > 0
    for _ in range(math.isqrt(2 * size_BL.shape[1]) + 1):
        open_BL = open_BL & (size_BL <= room_B1)
        if open_BL.device.type == "cpu" and not open_BL.any():  # elsewhere it would be to wait
            break
        now_BL = open_BL & ((size_BL * open_BL).cumsum(1) <= room_B1)
        room_B1 = room_B1 - (size_BL * now_BL).sum(1, keepdim=True)
        taken_BL, open_BL = taken_BL | now_BL, open_BL & ~now_BL
    return taken_BL
