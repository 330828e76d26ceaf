"""A sample of scored sequences: a frame of their tokens, with the masks of a policy, and some of them as text.

Shapes: N sequences, L tokens, K masked positions (or tokens that a teacher names), V vocabulary.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

from entropy_masking import codes
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.noise import hash_order
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.shards.parquet import ROW_GROUP, SCORE_COLUMNS, TOP_K_COLUMNS
from entropy_masking.shards.read import read_rows, to_tensors
from entropy_masking.shards.schema import Manifest
from train.explorer import statistics
from train.explorer.statistics import MEASURES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS = 64  # row groups of a sample, if they have enough sequences: a row group is read as a whole
SAMPLE_SEED = 0  # the same shards always give the same sample
MAX_PREDICTIONS = 10  # that the page shows for a token

Pick = tuple[int, int, np.ndarray]  # shard index, row group, rows in it


class View:
    """How sequences are masked, and how their tokens are shown.

    Attributes:
        label: token → its text and its label, in printable characters. A label begins with ``##`` if the token
            continues a word.
    """

    def __init__(self, masker: Masker, mask: MaskPolicy, tokenizer: PreTrainedTokenizerBase) -> None:
        self.masker, self.mask, self.tokenizer = masker, mask, tokenizer
        self.label = cache(self._label)
        self.continues_V = torch.zeros_like(masker.special_V)
        with suppress(ValueError):  # the tokenizer does not mark words
            self.continues_V = continuing_tokens(tokenizer, len(masker.special_V))

    def _label(self, token: int) -> tuple[str, str]:
        name = text = str(self.tokenizer.convert_ids_to_tokens(token) or f"#{token}")
        if token not in self.tokenizer.all_special_ids:
            # after another token, where decoders replace the marks of words
            text = self.tokenizer.convert_tokens_to_string(["a", name])[1:].strip()
        if not text or not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
            text = name if name.isprintable() else name.encode("unicode_escape").decode()
        return text, f"##{text}" if self.continues_V[token] else text


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
        text, label: see ``View``.
        entropy, surprisal: in nats, None where not scored.
        seen: the label of the token in the student's input; None if the token is not masked.
        top: label and probability of the teacher's most probable tokens; empty if the shards have no top k.
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
    """Up to ``limit`` sequences that all directories have, spread evenly over row groups that a hash picks."""
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


def frame_of(manifest: Manifest, picks: list[Pick], view: View) -> pl.DataFrame:
    """The frame of tokens of the picked sequences. Raises RunError: a file cannot be read."""
    reads = [read(manifest, pick, view) for pick in picks]
    rows = {name: np.concatenate([columns[name] for columns in reads]) for name in reads[0]}
    scores = {name: rows[name] for name in MEASURES}
    return statistics.tokens(rows["input_ids"], scores, rows["masked"])


def read(manifest: Manifest, pick: Pick, view: View, top_k: bool = False) -> dict[str, np.ndarray]:
    """Columns of the picked sequences [N, …], with ``masked`` and ``student_ids`` [N, L] of the first epoch."""
    index, group, rows_N = pick
    wanted = [*SCORE_COLUMNS, *(TOP_K_COLUMNS if top_k else ())]
    columns = read_rows(manifest, manifest.entry(index), wanted, [group])
    columns = {name: array[rows_N] for name, array in columns.items()}
    batch = to_tensors({name: array for name, array in columns.items() if not name.startswith("topk")})
    masked = view.masker(batch | {"epoch": torch.zeros(len(rows_N), dtype=torch.long)}, view.mask)
    N, L = batch["input_ids"].shape
    positions_NK = masked["positions_BP"]
    places_NK = positions_NK.where(positions_NK != IGNORED, L)  # a column that is cut off
    masked_NL = torch.zeros(N, L + 1, dtype=torch.bool).scatter_(1, places_NK, True)[:, :L]
    return columns | {"masked": masked_NL.numpy(), "student_ids": masked["input_ids"].numpy()}


def texts(sources: list[Source], picks: list[Pick], number: int, view: View) -> list[list[Token]]:
    """Some sequences that all sources have scored, spread evenly over the sample, without padding."""
    scored = [set(source.frame.drop_nulls("entropy")["sequence"].unique()) for source in sources]
    numbers = sorted(set.intersection(*scored))
    where = [(index, group, row) for index, group, rows in picks for row in rows.tolist()]
    number = min(number, len(numbers))
    chosen = [where[numbers[place * len(numbers) // number]] for place in range(number)]
    return [text((index, group, np.array([row])), sources, view) for index, group, row in chosen]


def text(pick: Pick, sources: list[Source], view: View) -> list[Token]:
    """One sequence, scored and masked by each source."""
    reads = [read(source.manifest, pick, view, source.manifest.top_k > 0) for source in sources]
    special, label, shown = set(sources[0].manifest.special_token_ids), view.label, []
    for position, token in enumerate(reads[0]["input_ids"][0].tolist()):
        if token == view.masker.pad_id:
            continue
        rows = [{name: columns[name][0, position] for name in columns if name != "sequence_id"} for columns in reads]
        words, name = label(token)
        entropy, surprisal = (
            [None if np.isnan(row[measure]) else float(row[measure]) for row in rows] for measure in MEASURES
        )
        seen = [label(int(row["student_ids"]))[1] if row["masked"] else None for row in rows]
        top = [top_of(row, view) for row in rows]
        shown.append(Token(words, name, token in special, name != words, entropy, surprisal, seen, top))
    return shown


def top_of(row: dict[str, np.ndarray], view: View) -> list[tuple[str, float]]:
    if "topk_ids" not in row or np.isnan(logprobs_K := codes.decode(row["topk_logprobs"])).any():
        return []
    p_K = np.exp(logprobs_K.astype(np.float64)).round(4)
    pairs = zip(row["topk_ids"].tolist(), p_K.tolist(), strict=True)
    return [(view.label(token)[1], p) for token, p in pairs][:MAX_PREDICTIONS]
