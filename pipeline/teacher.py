"""A masked LM as a teacher: scoring sequences in a chosen context, or given positions. See docs/scoring.md.

Shapes: N sequences or scored positions, R rows of a batch, L tokens, K given positions of a row, C positions of a
chunk, H width of the head's input, V vocabulary, T temperatures.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_masking import entropy
from entropy_masking.models.checkpoints import load_masked_lm
from entropy_masking.models.flops import forward_flops
from entropy_masking.models.masked_lm import MaskedLM
from entropy_masking.shards.parquet import SCORE_COLUMNS, Scores, temperature_column
from entropy_masking.shards.schema import Manifest

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BATCHES_IN_FLIGHT = 2  # on a GPU: it computes one while the CPU stores the results of the other
LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}  # float32 logits at once: enough for full speed


class Teacher:
    """Scores sequences with a masked LM.

    The encoder runs under autocast in ``dtype``. The vocabulary projection gives float32: in bfloat16 the most probable
    tokens would tie. The head runs on the scored positions only, in chunks.

    Args:
        manifest: of the run that the scores belong to: tokenizer, context, passes, top k, temperatures, dtype and size
            of batches. The ``masked`` context scores a position in the pass that masks it: pass g masks the positions
            i with i mod P = g. Logits beyond the tokenizer's vocabulary, for rows that pad the embedding, are cut off.
        directory: checkpoint of an ``AutoModelForMaskedLM``; it is tried on sequences of the run's length.
        compile: compile the encoder and the reduction with ``torch.compile``.

    Attributes:
        forward_seconds, flops: of all forwards so far (encoder, head and reduction). FLOPs are multiplications and
            additions of matrix products and attention, counted by torch on one sequence and one position.
        stopped: if it is set, the next forward raises ``Stopped``.
    """

    def __init__(
        self, manifest: Manifest, directory: Path, *, compile: bool = False, trust_remote_code: bool = False
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_masked_lm(directory, trust_remote_code).eval()
        self.masked_lm = MaskedLM(model, manifest.sequence_length, str(directory))
        model = self.masked_lm.model.to(self.device)
        self.mask_id, self.pad_id = manifest.special_ids["mask"], manifest.special_ids["pad"]
        self.special_ids, self.vocab_size = np.array(manifest.special_token_ids), manifest.vocab_size
        self.context, self.passes, self.top_k = manifest.context, manifest.passes or 1, manifest.top_k
        self.batch_tokens, self.dtype = manifest.fingerprint["batch_tokens"], DTYPES[manifest.fingerprint["dtype"]]
        self.temperatures = [t for t in manifest.temperatures if t != 1]
        self._flops = forward_flops(self.masked_lm, manifest.sequence_length)
        self.projection = self.masked_lm.projection
        if self.projection is not None:
            on_gpu = self.device.type == "cuda"
            self._weight_VH = self.projection.weight.detach().to(self.dtype if on_gpu else torch.float32)
        self._chunk = max(1, LOGITS_PER_CHUNK[self.device.type] // model.config.vocab_size)
        self._reduce: Callable[..., entropy.Reduced] = entropy.score
        if compile:
            # without the head: the number of positions differs from batch to batch
            model.base_model.forward = torch.compile(model.base_model.forward, dynamic=False)
            self._reduce = torch.compile(entropy.score, dynamic=False)
        self.compiled = compile
        self.forward_seconds, self.flops = 0.0, 0
        self.stopped = threading.Event()

    def score(
        self,
        input_ids_NL: np.ndarray,
        positions_NK: np.ndarray | None = None,
        batch_tokens: int | None = None,
        uniform_NK: np.ndarray | None = None,
    ) -> Scores:
        """Score N sequences of L tokens; special tokens and padding stay NaN (top-k: id 0, NaN).

        With ``positions_NK``, which are negative where a row has fewer than K, the sequences are masked inputs, and
        these positions are scored: [N, K]. The actual tokens are unknown then, and the surprisals those of token 0.
        With ``uniform_NK`` too (float64), sampled tokens and their log-weights replace the top k (``entropy.sample``).

        The batches depend only on the shapes, ``passes`` and ``batch_tokens``. So the same input always gives the same
        bits on the same hardware.
        """
        if positions_NK is None:
            return self._gather(self._scan(input_ids_NL, batch_tokens), input_ids_NL.shape)
        return self._gather(self._given(input_ids_NL, positions_NK, uniform_NK, batch_tokens), positions_NK.shape)

    def _gather(self, batches: Iterator[Batch], shape: tuple[int, ...]) -> Scores:
        """The results of all batches, in their places."""
        scores: Scores = {name: np.full(shape, np.nan, np.float32) for name in SCORE_COLUMNS}
        scores["topk_ids"] = np.zeros((*shape, self.top_k), np.int32)
        scores["topk_logprobs"] = np.full((*shape, self.top_k), np.nan, np.float32)
        scores |= {temperature_column(t): np.full(shape, np.nan, np.float32) for t in self.temperatures}
        for place, (*columns, lse_NT) in self._run(batches):
            for values, column in zip(scores.values(), (*columns, *lse_NT.T), strict=True):
                values[place] = column
        return scores

    def _scan(self, input_ids_NL: np.ndarray, batch_tokens: int | None) -> Iterator[Batch]:
        """All (sequence, pass) pairs in order, in batches of at most ``batch_tokens`` tokens."""
        N, L = input_ids_NL.shape
        ids_NL = input_ids_NL.astype(np.int64)
        candidates_NL = ~np.isin(ids_NL, self.special_ids)
        size = max(1, (batch_tokens or self.batch_tokens) // L)
        most = math.ceil(L / self.passes) if self.context == "masked" else L
        for pairs_R in _cut(N * self.passes, size):
            sequences_R, passes_R = pairs_R // self.passes, pairs_R % self.passes
            ids_RL, scored_RL = ids_NL[sequences_R], candidates_NL[sequences_R]
            if self.context == "masked":
                scored_RL = scored_RL & (np.arange(L) % self.passes == passes_R[:, None])
            rows, columns = np.nonzero(scored_RL)
            actual = ids_RL[rows, columns]
            if self.context == "masked":
                ids_RL[rows, columns] = self.mask_id
            yield Batch(ids_RL, rows, columns, actual, (sequences_R[rows], columns), size, size * most)

    def _given(
        self,
        inputs_NL: np.ndarray,
        positions_NK: np.ndarray,
        uniform_NK: np.ndarray | None,
        batch_tokens: int | None,
    ) -> Iterator[Batch]:
        N, L = inputs_NL.shape
        size = max(1, (batch_tokens or self.batch_tokens) // L)
        for rows_R in _cut(N, size):
            ids_RL = inputs_NL[rows_R].astype(np.int64)
            rows, places = np.nonzero(positions_NK[rows_R] >= 0)
            columns = positions_NK[rows_R][rows, places]
            place = rows_R[rows], places
            uniform = None if uniform_NK is None else uniform_NK[place]
            most = size * positions_NK.shape[1]
            yield Batch(ids_RL, rows, columns, np.zeros_like(columns), place, size, most, uniform)

    def _run(self, batches: Iterator[Batch]) -> Iterator[tuple[Place, entropy.Reduced]]:
        """Results of each batch, on the CPU. While a GPU computes one batch, the CPU stores those of the one before."""
        in_flight = 1 if self.device.type == "cpu" else BATCHES_IN_FLIGHT
        pending = deque[tuple[Place, entropy.Reduced, torch.cuda.Event | None]]()
        for batch in batches:
            if self.stopped.is_set():
                raise Stopped
            if not len(batch.rows):
                continue
            started = time.monotonic()
            pending.append((batch.place, *self._forward(batch)))
            self.forward_seconds += time.monotonic() - started
            encoder, head = self._flops
            self.flops += len(batch.ids_RL) * encoder + len(batch.rows) * head
            if len(pending) == in_flight:
                yield self._wait(*pending.popleft())
        for last in pending:
            yield self._wait(*last)

    def _wait(
        self, place: Place, reduced: entropy.Reduced, copied: torch.cuda.Event | None
    ) -> tuple[Place, entropy.Reduced]:
        """The results of a batch, when they are on the CPU."""
        if copied:
            started = time.monotonic()
            copied.synchronize()
            self.forward_seconds += time.monotonic() - started
        return place, reduced

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> tuple[entropy.Reduced, torch.cuda.Event | None]:
        """The batch's scores in the memory of the CPU, and on a GPU the event after which they are there."""
        ids_RL, chunk = batch.ids_RL, self._chunk
        if self.compiled:  # one shape of all batches, and one of all chunks, so that they all run the same code
            ids_RL = np.concatenate([ids_RL, np.repeat(ids_RL[-1:], batch.size - len(ids_RL), axis=0)])
            chunk = math.ceil(batch.most / math.ceil(batch.most / chunk))
        ids = self._to_device(ids_RL)
        padding_RL = ids_RL == self.pad_id
        attention = self._to_device((~padding_RL).astype(np.int64)) if padding_RL.any() else None
        actual_N = self._to_device(batch.actual)
        uniform_N = None if batch.uniform is None else self._to_device(batch.uniform)
        parts = []
        for start, logits_CV in self._logits(ids, attention, batch, chunk):
            actual_C = actual_N[start : start + chunk]
            uniform_C = None if uniform_N is None else uniform_N[start : start + chunk]
            if missing := (chunk - len(actual_C)) * self.compiled:
                logits_CV, actual_C = F.pad(logits_CV, (0, 0, 0, missing)), F.pad(actual_C, (0, missing))
                uniform_C = None if uniform_C is None else F.pad(uniform_C, (0, missing))
            reduced = self._reduce(logits_CV, actual_C, self.top_k, self.temperatures, uniform_C)
            parts.append(entropy.Reduced(*(column[: len(actual_N) - start] for column in reduced)))
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        if self.device.type == "cpu":
            return entropy.Reduced(*joined), None
        # these copies follow this forward at once, so they do not wait for the next one
        columns, copied = [column.to("cpu", non_blocking=True) for column in joined], torch.cuda.Event()
        copied.record()
        return entropy.Reduced(*columns), copied

    def _logits(
        self, ids_RL: Tensor, attention_RL: Tensor | None, batch: Batch, chunk: int
    ) -> Iterator[tuple[int, Tensor]]:
        """(start, float32 logits over the tokenizer's vocabulary) of chunks of the chosen positions."""
        starts = range(0, len(batch.rows), chunk)
        if self.projection is None:  # without autocast: logits in half precision would tie in the top k
            for start in starts:
                rows_C, columns_C = batch.rows[start : start + chunk], batch.columns[start : start + chunk]
                first, last = rows_C[0], rows_C[-1] + 1  # the rows ascend
                attention = None if attention_RL is None else attention_RL[first:last]
                select = self._to_device(rows_C - first), self._to_device(columns_C)
                yield start, self.masked_lm.logits(ids_RL[first:last], attention, select)[:, : self.vocab_size].float()
            return
        with self.autocast():
            select = self._to_device(batch.rows), self._to_device(batch.columns)
            features_NH = self.masked_lm.features(ids_RL, attention_RL, select)
        for start in starts:
            yield start, self._project(features_NH[start : start + chunk], self.projection.bias)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _project(self, features_CH: Tensor, bias_V: Tensor | None) -> Tensor:
        """float32 logits of a chunk over the tokenizer's vocabulary."""
        weight_VH = self._weight_VH[: self.vocab_size]
        if weight_VH.dtype == torch.float32:
            with _bfloat16_products(self.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):
                logits_CV = F.linear(features_CH.float(), weight_VH)
        else:  # the GPU multiplies in half precision and sums in float32
            logits_CV = torch.mm(features_CH.to(weight_VH.dtype), weight_VH.T, out_dtype=torch.float32)
        return logits_CV if bias_V is None else logits_CV.add_(bias_V[: self.vocab_size])

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


Place = tuple[np.ndarray, np.ndarray]


class Stopped(BaseException):
    """The teacher was stopped before it had scored everything."""


class Batch(NamedTuple):
    """One forward: inputs, positions to score, the actual tokens there, and the places of the results.

    ``size`` is the number of rows of a full batch, ``most`` the most positions that it scores, and ``uniform`` a random
    number for each position where tokens are sampled.
    """

    ids_RL: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    actual: np.ndarray
    place: Place
    size: int
    most: int
    uniform: np.ndarray | None = None


@contextlib.contextmanager
def _bfloat16_products(enabled: bool) -> Iterator[None]:
    """Let a CPU with bfloat16 tiles multiply float32 matrices in bfloat16; sums and results stay float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _cut(rows: int, size: int) -> Iterator[np.ndarray]:
    """Row numbers, cut into batches of ``size``."""
    for start in range(0, rows, size):
        yield np.arange(start, min(start + size, rows))
