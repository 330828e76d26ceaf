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
from entropy_masking.shards.manifests import Manifest
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Columns, read_rows, to_tensors
from train.explorer.statistics import MEASURES, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS = 64  # row groups that a sample comes from, where they have enough sequences: a group is read whole
SAMPLE_SEED = 0  # the same sequences whenever the same shards are explored
MOST_PREDICTIONS = 10  # that are shown of a token

Label = Callable[[int], tuple[str, str]]  # from a token to its text and its label, as in ``Token``
Pick = tuple[int, int, np.ndarray]  # shard index, row group, rows in it


@dataclass(frozen=True)
class Policy:
    """How the sequences of a directory would be masked."""

    masker: Masker
    mask: MaskPolicy


@dataclass(frozen=True)
class Source:
    """One source of entropies: its shards and the frame of its sampled tokens (``train.explorer.statistics``)."""

    name: str
    manifest: Manifest
    frame: pl.DataFrame


@dataclass(frozen=True)
class Token:
    """A token as the page shows it; lists have one entry for each source.

    Attributes:
        text: as in running text; ``label`` marks by ``##`` that it continues a word.
        entropy: nats, None where not scored; so ``surprisal``.
        seen: what the student's input has in its place, as a label; None where it is not masked.
        top: label and probability of the teacher's most probable tokens; empty if they were not kept.
    """

    text: str
    label: str
    special: bool
    continues: bool
    entropy: list[float | None]
    surprisal: list[float | None]
    seen: list[str | None]
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
    places = np.arange(number) * ends[-1] // max(1, number)
    picks = []
    for group, start, end in zip(chosen, ends[:-1], ends[1:], strict=True):
        if len(within := places[(places >= start) & (places < end)] - start):
            picks.append((groups[group][0], groups[group][1] // ROW_GROUP, within))
    return picks


def frame_of(
    manifest: Manifest, picks: list[Pick], policy: Policy, continues_V: np.ndarray | None, apart_V: np.ndarray | None
) -> pl.DataFrame:
    """The frame of tokens of the picked sequences. Raises RunError: a file cannot be read."""
    frames, first = [], 0
    for pick in picks:
        rows = read(manifest, pick, policy)
        scores = {name: rows[name] for name in MEASURES}
        frames.append(tokens(rows["input_ids"], scores, rows["masked"], continues_V, apart_V, first))
        first += len(rows["input_ids"])
    return pl.concat(frames)


def read(manifest: Manifest, pick: Pick, policy: Policy, top_k: bool = False) -> dict[str, np.ndarray]:
    """Columns of the picked sequences [N, …]; ``masked`` and ``student_ids`` [N, L] as in a run's first epoch."""
    index, group, rows_N = pick
    entry = next(entry for entry in manifest.shards if entry.index == index)
    columns = read_rows(manifest, entry, Columns(entropy=True, surprisal=True, top_k=top_k), [group])
    columns = {name: array[rows_N] for name, array in columns.items()}
    batch = to_tensors({name: array for name, array in columns.items() if not name.startswith("topk")})
    masked = policy.masker(batch | {"epoch": torch.zeros(len(rows_N), dtype=torch.long)}, policy.mask)
    N, L = batch["input_ids"].shape
    positions_NK = masked["positions_BP"]
    places_NK = positions_NK.where(positions_NK != IGNORED, L)  # a column that is cut off
    masked_NL = torch.zeros(N, L + 1, dtype=torch.bool).scatter_(1, places_NK, True)[:, :L]
    return columns | {"masked": masked_NL.numpy(), "student_ids": masked["input_ids"].numpy()}


def texts(sources: list[Source], picks: list[Pick], number: int, policy: Policy, label: Label) -> list[list[Token]]:
    """Some of the sequences that all sources have scored, evenly out of the sample, without padding."""
    scored = [set(source.frame.drop_nulls("entropy")["sequence"].unique()) for source in sources]
    numbers = sorted(set.intersection(*scored))
    where = [(index, group, row) for index, group, rows in picks for row in rows.tolist()]
    number = min(number, len(numbers))
    chosen = [where[numbers[place * len(numbers) // number]] for place in range(number)]
    return [text((index, group, np.array([row])), sources, policy, label) for index, group, row in chosen]


def text(pick: Pick, sources: list[Source], policy: Policy, label: Label) -> list[Token]:
    """One sequence, scored and masked by each source."""
    reads = [read(source.manifest, pick, policy, source.manifest.top_k > 0) for source in sources]
    special, shown = set(sources[0].manifest.special_token_ids), []
    for position, token in enumerate(reads[0]["input_ids"][0].tolist()):
        if token == policy.masker.pad_id:
            continue
        rows = [{name: columns[name][0, position] for name in columns if name != "sequence_id"} for columns in reads]
        words, name = label(token)
        entropy, surprisal = ([known(row[measure]) for row in rows] for measure in MEASURES)
        seen = [label(int(row["student_ids"]))[1] if row["masked"] else None for row in rows]
        top = [top_of(row, label) for row in rows]
        shown.append(Token(words, name, token in special, name != words, entropy, surprisal, seen, top))
    return shown


def top_of(row: dict[str, np.ndarray], label: Label) -> list[tuple[str, float]]:
    if "topk_ids" not in row or np.isnan(row["topk_logprobs"]).any():
        return []
    p_K = np.exp(row["topk_logprobs"].astype(np.float64)).round(4)
    pairs = zip(row["topk_ids"].tolist(), p_K.tolist(), strict=True)
    return [(label(token)[1], p) for token, p in pairs][:MOST_PREDICTIONS]


def known(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def labels(tokenizer: PreTrainedTokenizerBase, continues_V: np.ndarray | None) -> Label:
    """From a token to its text and its label (see ``Token``), in characters that any terminal can print."""
    special, labelled = set(tokenizer.all_special_ids), dict[int, tuple[str, str]]()

    def label(token: int) -> tuple[str, str]:
        if token not in labelled:
            name = str(tokenizer.convert_ids_to_tokens(token) or f"#{token}")
            # behind another token, where decoders leave out the marks of words
            text = name if token in special else tokenizer.convert_tokens_to_string(["a", name])[1:].strip()
            if not text or not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
                text = name if name.isprintable() else name.encode("unicode_escape").decode()
            continues = continues_V is not None and bool(continues_V[token])
            labelled[token] = text, f"##{text}" if continues else text
        return labelled[token]

    return label
