"""Documents to fixed-length sequences: tokenize, join with [SEP], cut into blocks.

Shapes: N sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.corpus.readers import Document, Rejects

BATCH = 256  # documents per call of the tokenizer


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The backend of a tokenizer, set for ``tokenize``: whole texts, in which ``[MASK]`` is plain text."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def tokenize(documents: Iterable[Document], backend: Tokenizer, rejects: Rejects) -> Iterator[np.ndarray]:
    """Token ids (uint32) of each document, without special tokens, by a tokenizer from ``text_tokenizer``.

    A document on which the tokenizer fails is rejected. Several threads may use one tokenizer.
    """
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        try:
            encodings: Sequence[Encoding | None] = backend.encode_batch(
                [document.text for document in batch], add_special_tokens=False
            )
        except Exception:  # the tokenizer's own errors have no common class
            encodings = [_encode(backend, document, rejects) for document in batch]
        for document, encoding in zip(batch, encodings, strict=True):
            if encoding is not None and not encoding.ids:
                rejects.add(document.file_range, document.line, "no tokens")
            elif encoding is not None:
                rejects.longest = max(rejects.longest or 0, len(encoding.ids))
                yield np.array(encoding.ids, np.uint32)


def _encode(backend: Tokenizer, document: Document, rejects: Rejects) -> Encoding | None:
    try:
        return backend.encode(document.text, add_special_tokens=False)
    except Exception as error:
        rejects.add(document.file_range, document.line, f"tokenizer: {type(error).__name__}")
        return None


def pack(documents: Iterable[np.ndarray], length: int, cls_id: int, sep_id: int, pad_id: int) -> np.ndarray:
    """Sequences [N, L] uint32: documents joined by [SEP], cut into blocks of L - 2, each within [CLS] and [SEP].

    A document may span blocks. Only the last block can be short: its [SEP] follows its last token, then padding.
    """
    separator = np.array([sep_id], np.uint32)
    parts = [part for ids in documents for part in (ids, separator)]
    stream = np.concatenate(parts[:-1]) if parts else np.empty(0, np.uint32)
    width = length - 2
    N = -(-len(stream) // width)
    ids_NL = np.full((N, length), pad_id, np.uint32)
    ids_NL[:, 0] = cls_id
    full = len(stream) // width
    ids_NL[:full, 1:-1] = stream[: full * width].reshape(full, width)
    ids_NL[:full, -1] = sep_id
    if rest := len(stream) - full * width:
        ids_NL[-1, 1 : rest + 1] = stream[full * width :]
        ids_NL[-1, rest + 1] = sep_id
    return ids_NL
