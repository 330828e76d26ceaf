"""The forward of a student: the head and the loss at masked positions only.

Shapes: B rows, L tokens, K masked positions of a row, P predicted ones, M measured ones, X any of these, H width of the
projection's input, N positions of all rows, V vocabulary, T tokens that a teacher names.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from entropy_masking.entropy import entropy_and_surprisal
from entropy_masking.losses import masked_lm_loss
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.masking.selection import highest, is_highest, take
from entropy_masking.models.masked_lm import MaskedLM

MEASURED_EVERY = 4  # self-masking measures one in four predicted positions; more cost time and improve little
LOGITS_PER_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 28}  # logits computed at once when scoring without gradient


def with_masked_positions(model: PreTrainedModel, length: int, name: str = "") -> MaskedPositions:
    """Give a masked LM the forward of ``MaskedPositions``, and its adapter as ``masked_lm``.

    The class keeps its name, so the model is saved as its original class. Raises UsageError if the model, which
    messages call ``name``, cannot be used on sequences of ``length`` tokens.
    """
    masked_lm = MaskedLM(model, length, name)
    masked_lm.check_training(length, name or type(model).__name__)
    model.__class__ = type(type(model).__name__, (MaskedPositions, type(model)), {"__module__": type(model).__module__})
    assert isinstance(model, MaskedPositions)
    model.masked_lm = masked_lm
    return model


class MaskedPositions(PreTrainedModel):
    """Mixed into a masked LM: with ``positions_BP`` the head runs only there, and the forward returns the loss.

    Without ``positions_BP`` the forward is the model's own.
    """

    masked_lm: MaskedLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions_BP: Tensor | None = None,
        labels_BP: Tensor | None = None,
        teacher_ids_BPT: Tensor | None = None,
        teacher_logprobs_BPT: Tensor | None = None,
        temperature_lse_BP: Tensor | None = None,
        predicted_B1: Tensor | None = None,
        reference_BP: Tensor | None = None,
        predict_by: str = "surprisal",
        predictions: int = 0,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        distill_share: float = 1.0,
        measure: bool = False,
        **others: object,
    ) -> dict[str, Tensor] | ModelOutput:
        """Loss of a masked batch, a mean over B·P positions.

        Args:
            input_ids: corrupted tokens [B, L].
            positions_BP: positions to predict; negative ones are ignored.
            labels_BP: the original tokens there, -100 where ignored.
            teacher_ids_BPT, teacher_logprobs_BPT: the teacher's top T there; needed if ``distill_weight``.
            temperature_lse_BP: lse_T of the teacher there (``entropy_masking.losses``); needed if T is not 1.
            predicted_B1: if given, the arguments above cover all masked positions, and the student predicts this many
                of each row: those with the highest ``predict_by`` (``entropy``, ``surprisal``, ``excess``).
            predictions: P, the maximum number of predicted positions in a row; needed with ``predicted_B1``.
            reference_BP: surprisal under the reference in nats; needed for ``excess``.
            distill_weight: α in ``(1 - α)·CE + α·T²·KL(teacher ‖ student)``.
            distill_temperature: T of both distributions in the KL.
            distill_share: share of a row's predicted positions that is distilled, those with the student's highest
                entropies; the others have the cross-entropy alone.
            measure: also return the student's scores of masked tokens, without gradient.

        Returns:
            ``{"loss": scalar}``, or without labels ``{"logits": logits_BPV}``. With ``measure`` also ``tokens``,
            ``entropy`` and ``surprisal`` [B, M] in nats, of one in ``MEASURED_EVERY`` predicted positions, or of all
            masked ones if the student chooses; tokens are -100 where ignored.
        """
        if positions_BP is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        assert input_ids is not None
        project = self.masked_lm.project
        select = _rows(positions_BP), positions_BP.clamp_min(0)
        features_BPH = self.masked_lm.features(input_ids, attention_mask, select)
        if labels_BP is None:
            return {"logits": project(features_BPH)}
        output: dict[str, Tensor] = {}
        if predicted_B1 is not None:
            # all positions are scored without gradient; the chosen ones are projected again, with gradient
            scores = self._projected_scores(features_BPH, labels_BP)
            if measure:
                output = {"tokens": labels_BP, **scores}
            score_BP = scores["surprisal" if predict_by == "excess" else predict_by]
            if predict_by == "excess":
                assert reference_BP is not None
                score_BP = score_BP - reference_BP
            slots_BP = highest(score_BP, labels_BP != IGNORED_LABEL, predicted_B1, predictions)
            chosen = _rows(slots_BP), slots_BP.clamp_min(0)
            features_BPH, labels_BP = features_BPH[chosen], take(labels_BP, slots_BP, IGNORED_LABEL)
            if teacher_ids_BPT is not None and teacher_logprobs_BPT is not None:
                teacher_ids_BPT, teacher_logprobs_BPT = teacher_ids_BPT[chosen], teacher_logprobs_BPT[chosen]
            if temperature_lse_BP is not None:
                temperature_lse_BP = take(temperature_lse_BP, slots_BP, 0)
        logits_BPV = project(features_BPH)
        if measure and predicted_B1 is None:
            tokens_BM = labels_BP[:, ::MEASURED_EVERY]
            output = {"tokens": tokens_BM, **_scores(logits_BPV[:, ::MEASURED_EVERY], tokens_BM)}
        weight: float | Tensor = distill_weight
        if distill_weight and distill_share < 1:
            weight = (distill_weight * _most_uncertain(logits_BPV, labels_BP, distill_share)).flatten()
        loss_N = masked_lm_loss(
            logits_BPV.flatten(0, 1),
            labels_BP.flatten(),
            None if teacher_ids_BPT is None else teacher_ids_BPT.flatten(0, 1),
            None if teacher_logprobs_BPT is None else teacher_logprobs_BPT.flatten(0, 1),
            weight,
            distill_temperature,
            None if temperature_lse_BP is None else temperature_lse_BP.flatten(),
        )
        # a constant denominator: the mean is the same however a batch is split among steps and ranks
        return output | {"loss": loss_N.sum() / labels_BP.numel()}

    @torch.no_grad()
    def _projected_scores(self, features_BKH: Tensor, tokens_BK: Tensor) -> dict[str, Tensor]:
        """``_scores`` of the projected features; the full logits are never materialised."""
        rows = _rows_per_chunk(features_BKH, self.config.vocab_size)
        chunks = zip(features_BKH.detach().flatten(0, 1).split(rows), tokens_BK.flatten().split(rows), strict=True)
        parts = [_scores(self.masked_lm.project(part_NH), part_N) for part_NH, part_N in chunks]
        return {name: torch.cat([part[name] for part in parts]).view_as(tokens_BK) for name in parts[0]}


@torch.no_grad()
def student_scores(model: MaskedPositions, input_ids_BL: Tensor, attention_BL: Tensor | None) -> dict[str, Tensor]:
    """The model's predictive ``entropy`` and its ``surprisal`` at the actual tokens [B, L], float32, in nats.

    The batch is not masked, and dropout is off. Without a projection, a few rows are scored at a time.
    """
    was_training = model.training
    model.eval()
    B, L = input_ids_BL.shape
    position_L, rows = torch.arange(L, device=input_ids_BL.device), B
    if model.masked_lm.projection is None:
        rows = _rows_per_chunk(input_ids_BL, L * model.config.vocab_size)
    parts = []
    for start in range(0, B, rows):
        ids_RL = input_ids_BL[start : start + rows]
        attention_RL = None if attention_BL is None else attention_BL[start : start + rows]
        none_R1 = torch.zeros_like(ids_RL[:, :1])
        where = {"positions_BP": position_L.expand_as(ids_RL), "labels_BP": ids_RL, "predicted_B1": none_R1}
        parts.append(model(ids_RL, attention_RL, **where, predictions=0, measure=True))
    model.train(was_training)
    return {name: torch.cat([part[name] for part in parts]) for name in ("entropy", "surprisal")}


@torch.no_grad()
def _scores(logits_XV: Tensor, tokens_X: Tensor) -> dict[str, Tensor]:
    """Entropy and surprisal [*X] float32 in nats; meaningless for negative tokens."""
    V = logits_XV.shape[-1]
    entropy_N, surprisal_N = entropy_and_surprisal(logits_XV.reshape(-1, V), tokens_X.flatten().clamp_min(0))
    return {"entropy": entropy_N.view_as(tokens_X), "surprisal": surprisal_N.view_as(tokens_X)}


def _most_uncertain(logits_BPV: Tensor, labels_BP: Tensor, share: float) -> Tensor:
    """Bool [B, P]: the share of a row's predicted positions with the highest entropies, at least one."""
    real_BP = labels_BP != IGNORED_LABEL
    count_B1 = (share * real_BP.sum(1, keepdim=True).double()).round().clamp_min(1)
    return is_highest(_scores(logits_BPV, labels_BP)["entropy"], real_BP, count_B1)


def _rows(columns_BX: Tensor) -> Tensor:
    return torch.arange(len(columns_BX), device=columns_BX.device)[:, None].expand_as(columns_BX)


def _rows_per_chunk(on: Tensor, logits: int) -> int:
    """The number of rows, of ``logits`` logits each, that are computed at once; at least one."""
    return max(1, LOGITS_PER_CHUNK["cuda" if on.is_cuda else "cpu"] // logits)
