"""Evaluation under one fixed random mask, the same for every run: losses at positions, and their means.

Shapes: B rows, L tokens, P predicted positions of a row, N positions of all rows, C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.models.masked_positions import MaskedPositions
from entropy_masking.shards.manifests import sampled
from entropy_masking.shards.read import read_block, read_rows, to_tensors
from entropy_masking.shards.schema import Manifest
from train.split import Part

# random, for every regime, seed and mask ratio of a run
EVALUATION = MaskPolicy.random(ratio=0.15, corruption="mask-only", seed=0)
DECILES = 10
LOGITS_PER_CHUNK = 1 << 24  # in float32 at once


def batches(manifest: Manifest, parts: list[Part], columns: Sequence[str], size: int) -> Iterator[dict[str, Tensor]]:
    """The held-out sequences in order, as raw batches."""
    for part in parts:
        for group, own in part.groups():
            rows = read_block(manifest, part.entry, columns, group)
            tensors = to_tensors({name: array[own] for name, array in rows.items()})
            for start in range(0, len(tensors["sequence_id"]), size):
                yield {name: tensor[start : start + size] for name, tensor in tensors.items()}


def outcomes(
    model: MaskedPositions, masker: Masker, raw: dict[str, Tensor], autocast: Callable[[], ExitStack]
) -> tuple[np.ndarray, ...]:
    """(sequence id, position, loss, correct, entropy) [N] of the masked positions of a raw batch, in nats.

    The entropy comes from the shards; it is 0 if they have none. The logits stay on the model's device.
    """
    entropy_BL = raw.get("entropy", torch.zeros(raw["input_ids"].shape))
    sequences = {name: tensor for name, tensor in raw.items() if name != "entropy"}
    batch = masker(sequences | {"epoch": torch.zeros_like(raw["sequence_id"])}, EVALUATION)
    labels_N, positions_BP = batch.pop("labels_BP").flatten(), batch["positions_BP"]
    inputs: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with autocast():  # accelerate wraps the forward of the instance, and would convert all logits to float32
        logits_NV = MaskedPositions.forward(model, **inputs)["logits"].flatten(0, 1)
    rows = max(1, LOGITS_PER_CHUNK // logits_NV.shape[1])
    chunks = zip(logits_NV.split(rows), labels_N.to(model.device).split(rows), strict=True)
    parts = zip(*(_loss_and_hit(*chunk) for chunk in chunks), strict=True)
    loss_N, hit_N = (torch.cat(part).cpu() for part in parts)
    entropy_N = entropy_BL.gather(1, positions_BP.clamp_min(0)).flatten()
    sequence_N = raw["sequence_id"].repeat_interleave(positions_BP.shape[1])
    columns = (sequence_N, positions_BP.flatten(), loss_N, hit_N, entropy_N)
    return tuple(values_N[labels_N != IGNORED_LABEL].numpy() for values_N in columns)


def _loss_and_hit(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, 0 where ignored, and whether the label has the highest logit [C]."""
    logits_CV = logits_CV.float()
    loss_C = F.cross_entropy(logits_CV, labels_C, ignore_index=IGNORED_LABEL, reduction="none")
    return loss_C, logits_CV.argmax(1) == labels_C


def token_counts(manifest: Manifest, parts: list[Part]) -> np.ndarray:
    """How often each token occurs in a sample of the parts [V]; 0 for special tokens."""
    count_V = np.zeros(manifest.vocab_size, np.int64)
    for part in sampled(parts):
        group, own = next(part.groups())
        ids_NL = read_rows(manifest, part.entry, [], [group])["input_ids"][own]
        count_V += np.bincount(ids_NL.flatten(), minlength=len(count_V))[: len(count_V)]
    count_V[list(manifest.special_token_ids)] = 0
    return count_V


def unigram_loss(training_V: np.ndarray, held_out_V: np.ndarray) -> float:
    """The mean loss (nats) on held-out tokens of a model that knows only how often each token occurs, plus one."""
    log_V = np.log((training_V + 1) / (training_V + 1).sum())
    return float(-(held_out_V * log_V).sum() / max(1, held_out_V.sum()))


def metrics(columns: Sequence[np.ndarray], scored: bool) -> dict[str, float]:
    """The means of ``outcomes``: loss (nats), accuracy, positions; and the loss by decile of the known entropies.

    The positions are sorted, so neither sums nor ties depend on the number of ranks.
    """
    order = np.lexsort((columns[1], columns[0]))
    loss_N, hit_N, entropy_N = (column[order] for column in columns[2:])
    means = {"loss": float(loss_N.mean()), "accuracy": float(hit_N.mean()), "positions": len(loss_N)}
    if scored:
        order = entropy_N.argsort(kind="stable")[: (~np.isnan(entropy_N)).sum()]  # NaN comes last
        for decile, part in enumerate(np.array_split(order, DECILES), 1):
            if len(part):
                means[f"loss_decile_{decile}"] = float(loss_N[part].mean())
    return means
