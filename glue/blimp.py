"""BLiMP (Warstadt et al. 2020): pairs of sentences that differ in one point of grammar, scored without fine-tuning.

A sentence is scored by its pseudo-log-likelihood (Salazar et al. 2020): the sum over its tokens of the log-probability
of the token where it is masked. ``original`` masks that token alone. ``within-word`` (Kauf and Ivanova 2023) also masks
the later pieces of its word, because they would reveal the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.models.checkpoints import load_config, load_masked_lm
from entropy_masking.models.masked_lm import MaskedLM
from glue.batches import Tokens
from glue.tasks import find_file, read_file

FORMS = ("within-word", "original")
PROTOCOL = "zero-shot"  # in the place of a protocol of fine-tuning
SEED = 0  # in the place of a seed, for nothing here depends on one
TEXTS = ["sentence_good", "sentence_bad"]
COLUMNS = ["UID", "field", "pairID", *TEXTS]
BATCH_TOKENS = 2048
CHANCE = 50.0  # percent: what a model scores that prefers either sentence at random


@dataclass(frozen=True)
class Pairs:
    """Minimal pairs, sorted by phenomenon and number.

    Attributes:
        frame: the columns ``COLUMNS``; a UID is a phenomenon.
        limit: so many pairs of each phenomenon were kept; None for all.
        hash: of all pairs of the file, whatever the limit.
    """

    frame: pl.DataFrame
    limit: int | None
    hash: str

    @property
    def sentences(self) -> list[str]:
        """All good ones, then all bad ones."""
        return [text for name in TEXTS for text in self.frame[name].to_list()]


@dataclass(frozen=True)
class Sentences:
    """Encoded sentences, each different one once.

    Attributes:
        tokens: of U sentences, end to end.
        scored: [T] whether a token counts: those that the tokenizer has added do not.
        ends: [T] the place in ``tokens.ids`` of the last token that is masked when this one is scored.
        numbers: [2N] which of the U is a pair's good sentence, then its bad one.
        mask_id: the mask token.
    """

    tokens: Tokens
    scored: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    mask_id: int

    @cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """(sentences [I], places of the scored token in ``tokens.ids`` [I]), shortest sentence first."""
        row_T = np.repeat(np.arange(len(self.tokens)), self.tokens.lengths)
        places_I = np.flatnonzero(self.scored)
        places_I = places_I[np.argsort(self.tokens.lengths[row_T[places_I]], kind="stable")]
        return row_T[places_I], places_I


def load(data: str | None, limit: int | None) -> Pairs:
    """The pairs of ``DATA/blimp/blimp.parquet`` (or .tsv, .jsonl), the first ``limit`` of each phenomenon by pairID.

    Raises:
        UsageError: the file, a column or a text is missing or wrong; names it.
    """
    if data is None or data == "hub":
        raise UsageError("the task blimp needs --data: a directory with blimp/blimp.parquet; it is not read from hub")
    directory = Path(data) / "blimp"
    if not directory.is_dir():
        raise UsageError(f"--data {data} has no directory blimp; put blimp.parquet in {directory}")
    path = find_file(directory, "blimp")
    frame = read_file(path)
    if missing := [name for name in COLUMNS if name not in frame.columns]:
        raise UsageError(f"{path} has no column {missing[0]!r}, only {', '.join(frame.columns)}")
    if not len(frame):
        raise UsageError(f"{path} has no rows")
    try:
        frame = frame.select(pl.col("pairID").cast(pl.Int64), pl.col("UID", "field", *TEXTS).cast(pl.String))
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{path} has values of a wrong kind: {' '.join(str(error).split())[:200]}") from None
    if empty := [name for name in frame.columns if frame[name].null_count()]:
        raise UsageError(f"{path} has no {empty[0]} in row {frame[empty[0]].is_null().arg_max()}; mend or drop the row")
    # a few files of BLiMP write the field syntax_semantics with a slash
    frame = frame.with_columns(pl.col("field").str.replace_all("/", "_")).sort("UID", "pairID", *TEXTS)
    found = storage.sha256_json(frame.rows())
    largest = frame["UID"].value_counts()["count"].max()
    if limit is None or limit >= largest:  # type: ignore[operator]
        return Pairs(frame, None, found)
    return Pairs(frame.group_by("UID", maintain_order=True).head(limit), limit, found)


def check_model(directory: Path, tokenizer: PreTrainedTokenizerBase, form: str) -> None:
    """Refuse what cannot score sentences, before anything is scored.

    Raises:
        UsageError: no masked LM with a trained head, another model's tokenizer, no mask token, or tokens that do not
            say which of them continue a word.
    """
    config = load_config(directory)
    if tokenizer.mask_token_id is None:
        raise UsageError(f"the tokenizer in {directory} has no mask token; BLiMP needs a masked LM")
    if tokenizer.pad_token_id is None or len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens (padding: {tokenizer.pad_token}), the model "
            f"{config.vocab_size}; put the model's own tokenizer there"
        )
    if form == "within-word":
        try:
            continuing_tokens(tokenizer, len(tokenizer))
        except ValueError:
            raise UsageError(
                f"the tokens of the tokenizer in {directory} do not say which of them continue a word; "
                "pass --pll original"
            ) from None
    load_masked_lm(directory)


def encode(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, form: str) -> Sentences:
    """The sentences of the pairs as one tokenizer sees them, and what is masked to score each token.

    A token continues a word if it is marked so and the tokenizer has not split it from the token before: RoBERTa does
    not mark ``,`` in ``mat,`` as a new word, but it is no piece of ``mat``.
    """
    encoded = tokenizer(pairs.sentences, return_special_tokens_mask=True, return_attention_mask=False)
    first: dict[tuple[Any, ...], int] = {}  # equal inputs have equal scores, to the last bit, if they are scored once
    keys = [
        (tuple(ids), tuple(words.word_ids), tuple(special))
        for ids, words, special in zip(
            encoded["input_ids"], encoded.encodings or [], encoded["special_tokens_mask"], strict=True
        )
    ]
    numbers = np.array([first.setdefault(key, len(first)) for key in keys])
    lengths = [len(ids) for ids, _, _ in first]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids_T = np.array([token for ids, _, _ in first for token in ids], np.int32)
    word_T = np.array([-1 if word is None else word for _, words, _ in first for word in words])
    special_T = np.array([flag for _, _, flags in first for flag in flags], bool)
    ends_T = np.arange(len(ids_T))
    if form == "within-word":
        continues_T = continuing_tokens(tokenizer, len(tokenizer)).numpy()[ids_T] & ~special_T
        continues_T[1:] &= (word_T[1:] == word_T[:-1]) & ~special_T[:-1]
        continues_T[starts[:-1]] = False
        last_T = np.append(~continues_T[1:], True)  # of its word
        ends_T = np.minimum.accumulate(np.where(last_T, ends_T, len(ids_T))[::-1])[::-1]
    tokens = Tokens(ids_T, None, starts, np.zeros(len(lengths)), tokenizer.pad_token_id)
    return Sentences(tokens, ~special_T, ends_T, numbers, tokenizer.mask_token_id)


@torch.inference_mode()
def score(
    directory: Path,
    sentences: Sentences,
    advance: Callable[[int], None] = lambda rows: None,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Pseudo-log-likelihoods [2N] in nats of the good sentences, then of the bad ones. In float32, for in bfloat16 they
    are too coarse for the small differences of a pair.

    Args:
        directory: checkpoint of a masked LM.
        sentences: of its own tokenizer.
        advance: told how many of the 2N are done, as they are.

    Raises:
        UsageError: the model gives no logits for each token.
        RunError: a sentence is too long for the model, or a score is not finite.
    """
    tokens, (rows_I, places_I) = sentences.tokens, sentences.inputs
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model = MaskedLM(load_masked_lm(directory).eval(), int(tokens.lengths.max()), str(directory))
    except UsageError as error:
        raise RunError(f"the longest sentence of BLiMP cannot be scored: {error}") from None
    model.model.to(device)
    scores_I = np.empty(len(places_I), np.float64)
    done = 0
    for batch_B in batches(tokens.lengths[rows_I], batch_tokens):
        inputs, position_B, target_B = masked_batch(sentences, batch_B)
        scores_I[batch_B] = log_probabilities(model, inputs, position_B, target_B).cpu().numpy()
        # in sentences, of which the first batches hold the shortest
        before, done = done, (int(batch_B[-1]) + 1) * len(sentences.numbers) // len(places_I)
        advance(done - before)
    if not np.isfinite(scores_I).all():
        raise RunError("the pseudo-log-likelihoods are not finite; the model has diverged")
    return np.bincount(rows_I, scores_I, len(tokens))[sentences.numbers]


def batches(lengths_I: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Numbers of the inputs, cut so that rows × the longest of them are at most ``batch_tokens``; at least one row.

    Args:
        lengths_I: of the inputs, ascending.
    """
    start = 0
    while start < len(lengths_I):
        stop = start + max(1, batch_tokens // int(lengths_I[start]))
        stop = start + max(1, batch_tokens // int(lengths_I[start:stop][-1]))
        yield np.arange(start, min(stop, len(lengths_I)))
        start = stop


def masked_batch(sentences: Sentences, batch_B: np.ndarray) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs [B, L] in which the scored token, and what is hidden with it, are masked; its position [B]; itself [B]."""
    rows_B, places_B = (column_I[batch_B] for column_I in sentences.inputs)
    inputs = sentences.tokens.batch(rows_B)
    start_B = sentences.tokens.starts[rows_B]
    position_B, end_B = (torch.from_numpy(each - start_B) for each in (places_B, sentences.ends[places_B]))
    at_L = torch.arange(inputs["input_ids"].shape[1])
    hidden_BL = (at_L >= position_B[:, None]) & (at_L <= end_B[:, None])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden_BL, sentences.mask_id)
    return inputs, position_B, torch.from_numpy(sentences.tokens.ids[places_B].astype(np.int64))


def log_probabilities(model: MaskedLM, inputs: dict[str, Tensor], position_B: Tensor, target_B: Tensor) -> Tensor:
    """Of the targets at their positions [B], float32."""
    device = model.model.device
    ids_BL, attention_BL = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
    position_B, target_B = position_B.to(device), target_B.to(device)
    logits_BV = model.logits(ids_BL, attention_BL, (torch.arange(len(position_B), device=device), position_B)).float()
    target_B1, highest_B1 = logits_BV.gather(1, target_B[:, None]), logits_BV.amax(1, keepdim=True)
    # in place: logsumexp would fill another tensor of this size, and takes as long as the small models' encoder
    return (target_B1 - highest_B1)[:, 0] - logits_BV.sub_(highest_B1).exp_().sum(1).log()


def result(pairs: Pairs, scores: np.ndarray) -> dict[str, Any]:
    """What a result file says of the scores [2N]: the share of the pairs whose good sentence has the higher score, of
    all pairs, by field and by phenomenon. Equal scores (the tokenizer sees no difference) count as wrong.
    """
    good_N, bad_N = np.split(scores, 2)
    frame = pairs.frame.with_columns(right=pl.Series(good_N > bad_N))
    accuracy = float(np.mean(good_N > bad_N))
    return {
        "metrics": {"accuracy": accuracy},
        "score": 100 * accuracy,
        "fields": accuracies(frame, "field"),
        "phenomena": accuracies(frame, "UID"),
        "ties": int((good_N == bad_N).sum()),
        "collapsed": bool((good_N == bad_N).all()),
        "constant_score": CHANCE,
        "train_split": "",  # nothing is trained on
        "train_rows": 0,
        "eval_rows": len(frame),
        "overlap": 0,
    }


def accuracies(frame: pl.DataFrame, by: str) -> dict[str, float]:
    return dict(frame.group_by(by).agg(pl.col("right").mean()).sort(by).rows())
