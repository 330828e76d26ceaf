"""A sample of scored sequences: which ones, their frame of tokens with what a policy would mask, and some as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import hash_order
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards.manifests import Manifest, ShardEntry
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Columns, read_rows, to_tensors
from train.uncertainty import MEASURES, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS = 64  # row groups that a sample comes from, where they have enough sequences: each is read whole
SAMPLE_SEED = 0  # the same sequences for every look at the same shards

Label = Callable[[int], tuple[str, str]]  # from a token to its text and its label, as in ``Token``
Pick = tuple[int, int, np.ndarray]  # shard index, row group, rows in it


@dataclass(frozen=True)
class Policy:
    """How the sequences of a directory would be masked."""

    masker: Masker
    mask: MaskPolicy


@dataclass(frozen=True)
class Source:
    """One source of entropies: its shards and the frame of its sampled tokens (``train.uncertainty``)."""

    name: str
    manifest: Manifest
    frame: pl.DataFrame


@dataclass(frozen=True)
class Token:
    """A token as it is shown. What has a value a source: scores (nats, None where not scored), and the rest.

    Attributes:
        text: as in running text; ``label`` marks by ``##`` that it goes on with a word.
        hidden: what stands there in the student's input; None where it is not hidden.
        top: label and probability of the teacher's most probable tokens.
    """

    text: str
    label: str
    special: bool
    continues: bool
    scores: dict[str, list[float | None]]
    hidden: list[str | None]
    top: list[list[tuple[str, float]]]


def pick(manifests: list[Manifest], limit: int) -> list[Pick]:
    """Up to ``limit`` sequences that all directories have: evenly out of row groups that a hash picks."""
    rows = [{entry.index: entry.rows for entry in manifest.shards} for manifest in manifests]
    common = [index for index, size in sorted(rows[0].items()) if all(other.get(index) == size for other in rows)]
    groups = [(index, start) for index in common for start in range(0, rows[0][index], ROW_GROUP)]
    sizes = [min(ROW_GROUP, rows[0][index] - start) for index, start in groups]
    order = hash_order(SAMPLE_SEED, size=len(groups)).tolist()
    enough = int(np.searchsorted(np.cumsum([sizes[group] for group in order]), limit)) + 1
    chosen = sorted(order[: max(GROUPS, enough)])
    ends = np.cumsum([0, *(sizes[group] for group in chosen)])
    number = min(limit, int(ends[-1]))
    taken = np.arange(number) * ends[-1] // max(1, number)
    picks = []
    for group, start, end in zip(chosen, ends[:-1], ends[1:], strict=True):
        if len(within := taken[(taken >= start) & (taken < end)] - start):
            picks.append((groups[group][0], groups[group][1] // ROW_GROUP, within))
    return picks


def frame_of(
    manifest: Manifest,
    picks: list[Pick],
    policy: Policy,
    continues_V: np.ndarray | None,
    apart_V: np.ndarray | None,
) -> pl.DataFrame:
    """The frame of tokens of the picked sequences. Raises RunError: a file cannot be read."""
    frames, first = [], 0
    for index, block, rows_N in picks:
        read = read_rows(manifest, _entry(manifest, index), Columns(entropy=True, surprisal=True), [block])
        read = {name: array[rows_N] for name, array in read.items()}
        masked_NL = _masks(read, policy)[0]
        scores = {name: read[name] for name in MEASURES}
        frames.append(tokens(read["input_ids"], scores, masked_NL, continues_V, apart_V, first))
        first += len(rows_N)
    return pl.concat(frames)


def texts(sources: list[Source], picks: list[Pick], number: int, policy: Policy, label: Label) -> list[list[Token]]:
    """Some of the sequences that all sources have scored, evenly out of the sample, without padding.

    Args:
        label: from a token to its text and its label, as in ``Token``.
    """
    scored = [set(source.frame.drop_nulls("entropy")["sequence"].unique()) for source in sources]
    numbers = sorted(set.intersection(*scored))
    where = [(index, block, row) for index, block, rows in picks for row in rows.tolist()]
    number = min(number, len(numbers))
    chosen = [where[numbers[place * len(numbers) // number]] for place in range(number)]
    return [_text(sources, each, policy, label) for each in chosen]


def _text(sources: list[Source], where: tuple[int, int, int], policy: Policy, label: Label) -> list[Token]:
    index, block, row = where
    reads, masks = [], []
    for source in sources:
        manifest = source.manifest
        columns = Columns(entropy=True, surprisal=True, top_k=manifest.top_k > 0)
        read = read_rows(manifest, _entry(manifest, index), columns, [block])
        reads.append({name: array[row : row + 1] for name, array in read.items()})
        masks.append(_masks(reads[-1], policy))
    pad, special = policy.masker.pad_id, set(sources[0].manifest.special_token_ids)
    shown = []
    for position, token in enumerate(reads[0]["input_ids"][0].tolist()):
        if token == pad:
            continue
        text, name = label(token)
        scores = {n: [_number(read[n][0, position]) for read in reads] for n in MEASURES}
        hidden = [label(int(seen[0, position]))[1] if at[0, position] else None for at, seen in masks]
        top = [_top(read, position, label) for read in reads]
        shown.append(Token(text, name, token in special, name != text, scores, hidden, top))
    return shown


def _top(read: dict[str, np.ndarray], position: int, label: Label) -> list[tuple[str, float]]:
    if "topk_ids" not in read or np.isnan(read["topk_logprobs"][0, position]).any():
        return []
    probabilities = np.exp(read["topk_logprobs"][0, position].astype(np.float64))
    ids = read["topk_ids"][0, position].tolist()
    return [(label(token)[1], p) for token, p in zip(ids, probabilities.tolist(), strict=True)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _masks(rows: dict[str, np.ndarray], policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """What is masked in the first epoch, bool [N, L], and the student's inputs [N, L]: as train/run.py has them."""
    batch = to_tensors({name: array for name, array in rows.items() if not name.startswith("topk")})
    masked = policy.masker(batch | {"epoch": torch.zeros(len(batch["sequence_id"]), dtype=torch.long)}, policy.mask)
    positions_NK = masked["positions_BP"]
    at_NL = torch.zeros(batch["input_ids"].shape[0], batch["input_ids"].shape[1] + 1, dtype=torch.bool)
    at_NL.scatter_(1, positions_NK.where(positions_NK != IGNORED, at_NL.shape[1] - 1), True)
    return at_NL[:, :-1].numpy(), masked["input_ids"].numpy()


def _entry(manifest: Manifest, index: int) -> ShardEntry:
    return next(entry for entry in manifest.shards if entry.index == index)


def labels(tokenizer: PreTrainedTokenizerBase, continues_V: np.ndarray | None) -> Label:
    """From a token to its text and its label (see ``Token``), in characters that any terminal can print."""
    special, known = set(tokenizer.all_special_ids), {}

    def label(token: int) -> tuple[str, str]:
        if token not in known:
            name = str(tokenizer.convert_ids_to_tokens(token) or f"#{token}")
            # behind another token, where decoders leave out the marks of words
            text = name if token in special else tokenizer.convert_tokens_to_string(["a", name])[1:].strip()
            if not text or not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
                text = name if name.isprintable() else name.encode("unicode_escape").decode()
            continues = continues_V is not None and bool(continues_V[token])
            known[token] = text, f"##{text}" if continues else text
        return known[token]

    return label
