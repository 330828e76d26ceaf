"""BLiMP (Warstadt et al. 2020): pairs of sentences that differ in one point of grammar, scored without fine-tuning.

The score of a sentence is its pseudo-log-likelihood (Salazar et al. 2020): each of its tokens is masked in turn, and
the log-probabilities of the masked tokens are added up. ``original`` masks only the scored token. ``within-word`` (Kauf
and Ivanova 2023) also masks the later tokens of its word, because they would reveal it.

Shapes: N pairs, U different sentences, T tokens of all of them, I inputs with one scored token each, B inputs of a
batch, L tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.models.checkpoints import load_masked_lm
from entropy_masking.models.masked_lm import MaskedLM
from entropy_masking.shards.manifests import vocabulary_size
from glue.batches import Tokens
from glue.files import check_table, find_file, read_file

PROTOCOL = "zero-shot"  # instead of a fine-tuning protocol
SEED = 0  # instead of a seed: the score does not depend on one
TEXTS = ["sentence_good", "sentence_bad"]
COLUMNS = ["UID", "field", "pairID", *TEXTS]
BATCH_TOKENS = 2048
CHANCE = 50.0  # percent: the score of a model that prefers either sentence at random


@dataclass(frozen=True)
class Pairs:
    """Minimal pairs, sorted by phenomenon and number.

    Attributes:
        frame: the columns ``COLUMNS``; a UID is a phenomenon.
        limit: number of pairs of each phenomenon that are kept; None for all.
        hash: of all pairs of the file, independent of the limit.
    """

    frame: pl.DataFrame
    limit: int | None
    hash: str

    @property
    def sentences(self) -> list[str]:
        """All good sentences, then all bad ones."""
        return [text for name in TEXTS for text in self.frame[name].to_list()]


@dataclass(frozen=True)
class Sentences:
    """The encoded sentences of pairs, and the inputs that score them: a sentence and the token to score.

    Equal sentences are encoded once, so their scores are equal to the last bit.

    Attributes:
        pairs: the N pairs.
        tokens: of U different sentences, end to end.
        numbers: [2N] the number (below U) of each pair's good sentence, then of each pair's bad one.
        rows: [I] the number (below U) of an input's sentence. Inputs are sorted by the length of their sentence.
        positions: [I] the scored token in its sentence; tokens that the tokenizer has added are not scored.
        ends: [I] the last token that is masked with it.
        mask_id: the mask token.
    """

    pairs: Pairs
    tokens: Tokens
    numbers: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    mask_id: int


def load(data: str | None, limit: int | None) -> Pairs:
    """The pairs of ``DATA/blimp/blimp.parquet`` (or .tsv, .jsonl), the first ``limit`` of each phenomenon by pairID.

    Raises UsageError for a file, a column or a text that is missing or wrong, and names it.
    """
    if data is None or data == "hub":
        raise UsageError("the task blimp needs --data: a directory with blimp/blimp.parquet; hub does not have it")
    directory = Path(data) / "blimp"
    if not directory.is_dir():
        raise UsageError(f"--data {data} has no directory blimp; put blimp.parquet in {directory}")
    path = find_file(directory, "blimp")
    frame = read_file(path)
    check_table(frame, COLUMNS, path)
    try:
        frame = frame.select(pl.col("pairID").cast(pl.Int64), pl.col("UID", "field", *TEXTS).cast(pl.String))
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{path} has values of a wrong type: {one_line(error)}") from None
    for name in TEXTS:
        if (blank := frame[name].str.strip_chars() == "").any():
            raise UsageError(f"{path} has an empty {name} in row {1 + (blank.arg_max() or 0)}; fix or drop the row")
    # some files of BLiMP write the field syntax_semantics with a slash
    frame = frame.with_columns(pl.col("field").str.replace_all("/", "_")).sort("UID", "pairID", *TEXTS)
    return limited(frame, limit)


def limited(frame: pl.DataFrame, limit: int | None) -> Pairs:
    """The first ``limit`` pairs of each phenomenon, of a frame with the columns ``COLUMNS``."""
    kept = frame if limit is None else frame.group_by("UID", maintain_order=True).head(limit)
    return Pairs(kept, limit if len(kept) < len(frame) else None, storage.sha256_json(frame.rows()))


def check_model(directory: Path, tokenizer: PreTrainedTokenizerBase, pll: str, trust_remote_code: bool) -> None:
    """Raises UsageError if a model cannot score sentences in this form."""
    if tokenizer.mask_token_id is None:
        raise UsageError(f"the tokenizer in {directory} has no mask token; minimal pairs need a masked LM")
    if pll == "within-word":
        try:
            continuing_tokens(tokenizer, vocabulary_size(tokenizer))
        except ValueError:
            raise UsageError(
                f"the tokenizer in {directory} does not mark the tokens that continue a word; pass --pll original"
            ) from None
    load_masked_lm(directory, trust_remote_code)


def encode(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, pll: str) -> Sentences:
    """The sentences of the pairs, encoded by one tokenizer, and the masks that score each token.

    A token continues a word if its mark says so and the tokenizer has not split it from the token before: in ``mat,``
    RoBERTa does not mark ``,`` as a new word, but ``,`` does not belong to ``mat``.
    """
    encodings = tokenizer(pairs.sentences, return_attention_mask=False).encodings or []
    keys = [(tuple(encoding.ids), tuple(encoding.word_ids)) for encoding in encodings]
    first = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    starts = np.cumsum([0, *(len(ids) for ids, _ in first)])
    ids_T = np.array([token for ids, _ in first for token in ids], np.int32)
    tokens = Tokens(ids_T, None, starts, np.zeros(len(first)), tokenizer.pad_token_id)
    word_T = np.array([-1 if word is None else word for _, words in first for word in words])
    end_T = np.arange(len(ids_T))
    if pll == "within-word":
        continues_T = continuing_tokens(tokenizer, vocabulary_size(tokenizer)).numpy()[ids_T] & (word_T >= 0)
        continues_T[1:] &= word_T[1:] == word_T[:-1]
        continues_T[starts[:-1]] = False
        lasts = np.flatnonzero(np.append(~continues_T[1:], True))  # the last token of each word
        end_T = lasts[np.searchsorted(lasts, end_T)]
    row_T = np.repeat(np.arange(len(first)), tokens.lengths)
    place_I = np.flatnonzero(word_T >= 0)
    place_I = place_I[np.argsort(tokens.lengths[row_T[place_I]], kind="stable")]
    row_I, numbers = row_T[place_I], np.array([first[key] for key in keys])
    position_I, end_I = (column_I - starts[row_I] for column_I in (place_I, end_T[place_I]))
    return Sentences(pairs, tokens, numbers, row_I, position_I, end_I, tokenizer.mask_token_id)


@torch.inference_mode()
def score(
    directory: Path,
    sentences: Sentences,
    advance: Callable[[int], None] = lambda rows: None,
    batch_tokens: int = BATCH_TOKENS,
    trust_remote_code: bool = False,
) -> np.ndarray:
    """Pseudo-log-likelihoods [2N] in nats, first of the good sentences, then of the bad ones.

    They are computed in float32, because bfloat16 is too coarse for the small differences of a pair.

    Args:
        directory: checkpoint of a masked LM.
        sentences: encoded by the model's own tokenizer.
        advance: called after each batch with the number of completed sentences (of 2N).

    Raises:
        RunError: a sentence is too long for the model, or a score is not finite.
    """
    tokens, row_I = sentences.tokens, sentences.rows
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        loaded = load_masked_lm(directory, trust_remote_code).eval()
        model = MaskedLM(loaded, int(tokens.lengths.max()), str(directory))
    except UsageError as error:
        raise RunError(f"the longest sentence of the pairs cannot be scored: {error}") from None
    model.model.to(device)
    scores_I = np.empty(len(row_I), np.float64)
    done = 0
    for batch_B in batches(tokens.lengths[row_I], batch_tokens):
        inputs, position_B, target_B = masked_batch(sentences, batch_B)
        scores_I[batch_B] = log_probabilities(model, inputs, position_B, target_B).cpu().numpy()
        before, done = done, (int(batch_B[-1]) + 1) * len(sentences.numbers) // len(row_I)
        advance(done - before)
    if not np.isfinite(scores_I).all():
        raise RunError("the pseudo-log-likelihoods are not finite; the model has diverged")
    return np.bincount(row_I, scores_I, len(tokens))[sentences.numbers]


def batches(lengths_I: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Numbers of the inputs in batches whose rows × longest row are at most ``batch_tokens``, or of one row.

    Args:
        lengths_I: lengths of the inputs, ascending.
    """
    start = 0
    while start < len(lengths_I):
        stop = start + max(1, batch_tokens // int(lengths_I[start]))
        stop = start + max(1, batch_tokens // int(lengths_I[start:stop][-1]))
        yield np.arange(start, min(stop, len(lengths_I)))
        start = stop


def masked_batch(sentences: Sentences, batch_B: np.ndarray) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs [B, L], masked from ``positions`` to ``ends``; the positions [B]; and the ids of the scored tokens [B]."""
    inputs = sentences.tokens.batch(sentences.rows[batch_B])
    position_B, end_B = (torch.from_numpy(column_I[batch_B]) for column_I in (sentences.positions, sentences.ends))
    ids_BL = inputs["input_ids"]
    at_L = torch.arange(ids_BL.shape[1])
    masked_BL = (at_L >= position_B[:, None]) & (at_L <= end_B[:, None])
    inputs["input_ids"] = ids_BL.masked_fill(masked_BL, sentences.mask_id)
    return inputs, position_B, ids_BL.gather(1, position_B[:, None])[:, 0]


def log_probabilities(model: MaskedLM, inputs: dict[str, Tensor], position_B: Tensor, target_B: Tensor) -> Tensor:
    """Log-probabilities of the targets at their positions [B], float32."""
    device = model.model.device
    ids_BL, attention_BL = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
    position_B, target_B = position_B.to(device), target_B.to(device)
    logits_BV = model.logits(ids_BL, attention_BL, (torch.arange(len(position_B), device=device), position_B)).float()
    target_B1, highest_B1 = logits_BV.gather(1, target_B[:, None]), logits_BV.amax(1, keepdim=True)
    # in place: logsumexp would fill another tensor of this size, and take as long as the encoder of a small model
    return (target_B1 - highest_B1)[:, 0] - logits_BV.sub_(highest_B1).exp_().sum(1).log()


def evaluate(
    directory: Path, sentences: Sentences, advance: Callable[[int], None], trust_remote_code: bool
) -> dict[str, object]:
    """The fields of a result file: the share of the pairs whose good sentence has the higher score.

    Equal scores count as wrong.
    """
    good_N, bad_N = np.split(score(directory, sentences, advance, trust_remote_code=trust_remote_code), 2)
    frame = sentences.pairs.frame.with_columns(right=pl.Series(good_N > bad_N))
    accuracy = float(np.mean(good_N > bad_N))
    return {
        "metrics": {"accuracy": accuracy},
        "score": 100 * accuracy,
        **{
            name: dict(frame.group_by(column).agg(pl.col("right").mean()).sort(column).rows())
            for name, column in (("fields", "field"), ("phenomena", "UID"))
        },
        "ties": int((good_N == bad_N).sum()),
        "collapsed": bool((good_N == bad_N).all()),
        "constant_score": CHANCE,
        "train_split": "",  # nothing is trained on
        "train_rows": 0,
        "eval_rows": len(frame),
        "overlap": 0,
    }
