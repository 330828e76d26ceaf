"""Documents to fixed-length sequences: tokenize, join with [SEP], cut into blocks.

Shapes: N sequences, L tokens.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from entropy_masking.errors import UsageError
from pipeline.corpus.readers import Document, Rejects

BATCH = 256  # documents per call of the tokenizer
PIECE = 1 << 20  # characters per call of the tokenizer, which needs up to 600 bytes for each
UNCUT = 8  # a text without a place to cut may have this fraction of --max-document-bytes
MAX_SHARD_TOKENS = 1 << 28
PLACE = re.compile(r"(?<=\w) (?=\w)")


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
    cuts = splits_at_spaces(backend)
    for batch in _batches(documents):
        found: list[np.ndarray | None] = []
        if len(batch) > 1:
            with contextlib.suppress(Exception):  # the tokenizer's own errors have no common class
                encodings = backend.encode_batch([document.text for document in batch], add_special_tokens=False)
                found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        found = found or [_encode(backend, document, cuts, rejects) for document in batch]
        for document, ids in zip(batch, found, strict=True):
            if ids is not None and not ids.size:
                rejects.add(document.file_range, document.line, "no tokens")
            elif ids is not None:
                rejects.longest = max(rejects.longest or 0, ids.size)
                yield ids


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of ``PIECE`` characters together; a longer one is alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == BATCH or size + len(document.text) > PIECE):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def _encode(backend: Tokenizer, document: Document, cuts: bool, rejects: Rejects) -> np.ndarray | None:
    texts = pieces(document, cuts, rejects)
    try:
        parts = [np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32) for text in texts]
    except Exception as error:
        rejects.add(document.file_range, document.line, f"tokenizer: {type(error).__name__}")
        return None
    return np.concatenate(parts) if parts else None


def pieces(document: Document, cuts: bool, rejects: Rejects) -> list[str]:
    """The text, cut before a space between two word characters after each ``PIECE`` characters.

    Args:
        cuts: whether the tokenizer ``splits_at_spaces``; else there is only one piece.

    Returns:
        No pieces if one is longer than ``max_bytes / UNCUT`` (and than ``PIECE``): then the document is rejected.
    """
    text, edges, most = document.text, [0], max(document.file_range.max_bytes // UNCUT, 4 * PIECE)
    while cuts and len(text) - edges[-1] > PIECE and (place := PLACE.search(text, edges[-1] + PIECE)):
        edges.append(place.start())
    found = [text[start:stop] for start, stop in zip(edges, [*edges[1:], len(text)], strict=True)]
    if any(len(piece.encode()) > most for piece in found):
        rejects.add(document.file_range, document.line, f"longer than {most:,} bytes without a place to cut")
        return []
    return found


def splits_at_spaces(backend: Tokenizer) -> bool:
    """Whether a text has the same tokens if it is cut before any single space between two word characters.

    BERT's pre-tokenizer removes spaces, and the byte-level one starts a new word at such a space. Their words are
    tokenized one by one. The normalizers listed here change nothing at this place. An added token must not contain
    such a space. Of other tokenizers we do not know it.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    spaces = [token.content for token in added if " " in token.content]
    if any(token.lstrip or token.rstrip for token in added) or not all(re.fullmatch(" {2,}", run) for run in spaces):
        return False
    words = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {"type": None}
    byte_level = words["type"] == "ByteLevel" and words["use_regex"]
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {"normalizers": []}
    parts = normalizer.get("normalizers", [normalizer])
    if (byte_level or spaces) and any(part.get("clean_text") or part.get("handle_chinese_chars") for part in parts):
        return False  # spaces are counted, and the normalizer adds or joins some
    known = {"NFC", "NFD", "Lowercase", "StripAccents", "BertNormalizer"}
    return (byte_level or words["type"] == "BertPreTokenizer") and {part["type"] for part in parts} <= known


def pack(documents: Iterable[np.ndarray], length: int, cls_id: int, sep_id: int, pad_id: int) -> np.ndarray:
    """Sequences [N, L] uint32: documents joined by [SEP], cut into blocks of L - 2, each within [CLS] and [SEP].

    A document may span blocks. Only the last block can be short: its [SEP] follows its last token, then padding.

    Raises:
        UsageError: there are more than ``MAX_SHARD_TOKENS`` tokens.
    """
    separator, packed = np.uint32(sep_id).tobytes(), bytearray()
    for ids in documents:
        packed += ids.astype(np.uint32).tobytes() + separator
        if len(packed) > MAX_SHARD_TOKENS * len(separator):
            problem = f"a shard has more than {MAX_SHARD_TOKENS:,} tokens"
            raise UsageError(f"{problem}; lower --shard-tokens, or --max-document-bytes if it has one document")
    stream, width = np.frombuffer(packed, np.uint32)[:-1], length - 2
    starts_N = np.arange(0, len(stream), width)
    ids_NL = np.full((len(starts_N), length), pad_id, np.uint32)
    ids_NL[:, 0] = cls_id
    ids_NL[:, 1:-1].flat[: len(stream)] = stream
    ids_NL[np.arange(len(starts_N)), 1 + np.minimum(width, len(stream) - starts_N)] = sep_id
    return ids_NL
