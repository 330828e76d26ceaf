"""Masks a batch: positions → corrupted inputs, labels, and the teacher's top k there.

Shapes: B rows, L tokens, K masked positions of a row, P predicted ones, R tokens that can replace one, V vocabulary,
T tokens that a teacher names.
"""

import copy
from typing import Self

import torch
from torch import Tensor

from entropy_masking.codes import decode_tensor
from entropy_masking.masking.noise import CORRUPTION, PREDICTION, REPLACEMENT, noise
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED, count, highest, select_positions, take

IGNORED_LABEL = -100  # torch's ignore_index
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of BERT's 80/10/10 corruption


def corrupt(
    input_ids_BL: Tensor,
    positions_BK: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    mask_id: int,
    replacement_ids_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Corrupt the tokens at ``positions_BK``; ``IGNORED`` positions come last.

    Args:
        replacement_ids_R: the candidates for a random replacement: all ids except special tokens.

    Returns:
        inputs_BL, and labels_BK: the original tokens, ``IGNORED_LABEL`` where the position is ``IGNORED``.
    """
    ignored_BK = positions_BK == IGNORED
    where_BK = positions_BK.clamp_min(0)
    original_BK = input_ids_BL.gather(1, where_BK)
    corrupted_BK = torch.full_like(original_BK, mask_id)
    if policy.corruption == "bert":
        kind_noise_BK = noise(policy.seed, CORRUPTION, epoch_B, sequence_id_B, where_BK)
        id_noise_BK = noise(policy.seed, REPLACEMENT, epoch_B, sequence_id_B, where_BK)
        random_BK = replacement_ids_R[(id_noise_BK * len(replacement_ids_R)).long()]
        corrupted_BK = torch.where(kind_noise_BK < MASKED_SHARE, corrupted_BK, random_BK)
        corrupted_BK = torch.where(kind_noise_BK < MASKED_SHARE + RANDOM_SHARE, corrupted_BK, original_BK)
    # an ignored slot writes what the row's first slot writes, so it changes nothing
    corrupted_BK = torch.where(ignored_BK, original_BK, corrupted_BK)
    corrupted_BK = torch.where(ignored_BK, corrupted_BK[:, :1], corrupted_BK)
    where_BK = torch.where(ignored_BK, where_BK[:, :1], where_BK)
    return input_ids_BL.scatter(1, where_BK, corrupted_BK), original_BK.masked_fill(ignored_BK, IGNORED_LABEL)


class Masker:
    """Masks batches: selects positions, corrupts inputs, and gathers the teacher's top k there.

    Only ``to`` copies tensors to an accelerator. The other methods neither copy tensors nor wait for an accelerator.

    Args:
        vocab_size: of the tokenizer; a random replacement is one of its tokens that are not special.
        special_token_ids: ids that are never masked; ``pad_id`` is one of them.
        continues_V: bool, the tokens that continue a word (``masking.words``); the word unit needs it.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        special_token_ids: list[int],
        mask_id: int,
        pad_id: int,
        continues_V: Tensor | None = None,
    ) -> None:
        self.mask_id, self.pad_id, self.continues_V = mask_id, pad_id, continues_V
        self.special_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.special_V[[token for token in special_token_ids if token < vocab_size]] = True
        self.replacement_ids_R = (~self.special_V).nonzero().squeeze(1)

    def to(self, device: torch.device | str) -> Self:
        """A masker of batches on ``device``."""
        moved = copy.copy(self)
        moved.special_V, moved.replacement_ids_R = self.special_V.to(device), self.replacement_ids_R.to(device)
        moved.continues_V = None if self.continues_V is None else self.continues_V.to(device)
        return moved

    def candidates(self, input_ids_BL: Tensor) -> Tensor:
        """[B, L] bool: the positions that may be masked."""
        return ~self.special_V[input_ids_BL]

    def attention_mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """[B, L] int64, 0 at padding; None for a batch without padding.

        A search for padding would wait for an accelerator. So a batch may have ``padded``, a bool that was computed on
        the CPU. A batch on an accelerator without ``padded`` counts as padded.
        """
        attended_BL = batch["input_ids"] != self.pad_id
        if "padded" in batch:
            padded = bool(batch["padded"])
        else:
            padded = attended_BL.device.type != "cpu" or not attended_BL.all()
        return attended_BL.long() if padded else None

    def __call__(self, batch: dict[str, Tensor], policy: MaskPolicy) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            batch: tensors by name:

                - ``input_ids`` [B, L], ``sequence_id`` [B], ``epoch`` [B].
                - Unless h = 0: the score [B, L] with the name ``policy.by`` or ``score``.
                - For a warm-up or a ramp: ``progress`` [B].
                - Optional: the score [B, L] with the name ``policy.predict_by``; ``padded`` (see ``attention_mask``).
                - For ``excess``: ``reference`` [B, L], the reference's surprisal.
                - For distillation: ``topk_ids`` and ``topk_logprobs`` [B, L, T], as in shards (integers) or in nats; at
                  a temperature other than 1 also ``temperature_lse`` [B, L].

        Returns:
            input_ids [B, L], positions_BP and labels_BP of the predicted positions; with padding attention_mask [B, L];
            with a teacher teacher_ids_BPT, teacher_logprobs_BPT and temperature_lse_BP. If the batch lacks the score
            for ``predict_by``, all K masked positions are returned, ``predicted_B1`` says how many of them to predict,
            and the student chooses.

        Raises:
            ValueError: the batch lacks a score, the reference or the progress that the policy needs.
        """
        _check_batch(batch, policy)
        ids_BL, key = batch["input_ids"], (batch["sequence_id"], batch["epoch"])
        candidates_BL = self.candidates(ids_BL)
        score_BL = candidates_BL if policy.uniform else batch["score" if "score" in batch else policy.by]
        continues_BL = None if self.continues_V is None else self.continues_V[ids_BL]
        positions_BP = select_positions(score_BL, candidates_BL, *key, policy, continues_BL, batch.get("progress"))
        inputs_BL, labels_BP = corrupt(ids_BL, positions_BP, *key, policy, self.mask_id, self.replacement_ids_R)
        masked = {"input_ids": inputs_BL}
        if not policy.predicts_all:
            size = policy.max_predicted(ids_BL.shape[1])
            predicted_B1 = count(policy.predict_ratio or 0, candidates_BL, size)
            if policy.predict_by == "random":
                score_BK = noise(policy.seed, PREDICTION, batch["epoch"], batch["sequence_id"], positions_BP)
            elif policy.predict_by in batch:
                score_BK = batch[policy.predict_by].gather(1, positions_BP.clamp_min(0))
            else:
                score_BK = None
            if score_BK is not None:
                slots_BP = highest(score_BK, positions_BP != IGNORED, predicted_B1, size)
                positions_BP, labels_BP = (
                    take(positions_BP, slots_BP, IGNORED),
                    take(labels_BP, slots_BP, IGNORED_LABEL),
                )
            else:
                masked["predicted_B1"] = predicted_B1
                if policy.predict_by == "excess":
                    masked["reference_BP"] = batch["reference"].gather(1, positions_BP.clamp_min(0)).float()
        masked |= {"positions_BP": positions_BP, "labels_BP": labels_BP}
        if (attention_BL := self.attention_mask(batch)) is not None:
            masked["attention_mask"] = attention_BL
        if "topk_ids" in batch:
            where = torch.arange(len(ids_BL), device=ids_BL.device)[:, None], positions_BP.clamp_min(0)
            masked["teacher_ids_BPT"] = batch["topk_ids"][where].long()
            logprobs_BPT = batch["topk_logprobs"][where]
            is_float = logprobs_BPT.is_floating_point()
            masked["teacher_logprobs_BPT"] = logprobs_BPT.float() if is_float else decode_tensor(logprobs_BPT)
            if "temperature_lse" in batch:
                masked["temperature_lse_BP"] = batch["temperature_lse"][where]
        return masked


def _check_batch(batch: dict[str, Tensor], policy: MaskPolicy) -> None:
    ranks, phases = not policy.uniform, policy.warmup or policy.ramp
    by_excess = not policy.predicts_all and policy.predict_by == "excess"
    for lacks, sentence in (
        (ranks and not batch.keys() & {policy.by, "score"}, f"{policy.by} to mask by; add it, or mask at random"),
        (ranks and phases and "progress" not in batch, "progress for a warm-up or a ramp; add it, or set both to 0"),
        (by_excess and not batch.keys() & {"excess", "reference"}, "reference to predict by excess; add its surprisal"),
    ):
        if lacks:
            raise ValueError(f"the batch has no {sentence}")
