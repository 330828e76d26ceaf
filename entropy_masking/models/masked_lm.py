"""Any masked LM with its head at the masked positions only.

Shapes: B rows, L tokens, K masked positions of a row, P predicted ones, M measured ones, H width, V vocabulary,
T tokens that a teacher names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_masking.entropy import entropy_and_surprisal
from entropy_masking.errors import UsageError
from entropy_masking.losses import masked_lm_loss
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.masking.selection import highest, is_highest, take

PROBE = 16  # tokens of a row on which a model's head is tried out
# what a forward raises that was not made for such input
UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
MEASURED_EVERY = 4  # self-masking measures one in four predicted positions; more cost time and improve little
LOGITS_PER_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 28}  # logits computed at once when scoring without gradient


@dataclass
class _Choice:
    """Which of the masked positions the student is to predict, and what it says of all of them."""

    labels_BK: Tensor
    by: str
    size: int
    count_B1: Tensor
    reference_BK: Tensor | None
    slots_BP: Tensor | None = None
    entropy_BK: Tensor | None = None
    surprisal_BK: Tensor | None = None

    def make(self, entropy_BK: Tensor, surprisal_BK: Tensor) -> Tensor:
        """The slots [B, P] of the highest scores; what is not to be predicted repeats slot 0 and is ignored later."""
        self.entropy_BK, self.surprisal_BK = entropy_BK, surprisal_BK
        score_BK = entropy_BK if self.by == "entropy" else surprisal_BK
        if self.by == "excess":
            assert self.reference_BK is not None
            score_BK = score_BK - self.reference_BK
        self.slots_BP = highest(score_BK, self.labels_BK != IGNORED_LABEL, self.count_B1, self.size)
        return self.slots_BP.clamp_min(0)


class MaskedPositions:
    """Mixed into a masked LM: with ``positions_BP`` the head runs only there, and the forward returns the loss.

    The encoder's output is narrowed by a hook, so that the model's own head does the rest: this holds for any
    architecture whose forward is encoder, head. For others the head runs everywhere, and its logits are narrowed.
    Without ``positions_BP`` the forward is the model's own. Where the student chooses what it predicts, another hook
    scores the input of the vocabulary projection without gradient and passes the chosen positions on; without such a
    module, the logits are chosen from.
    """

    sparse_head = True  # the head can run at some positions alone
    parted_head = True  # its projection is a module of its own
    _positions_BP: Tensor | None = None  # those that the head gets to see
    _choice: _Choice | None = None

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
        **others: Any,
    ) -> Any:
        """Loss of a masked batch, a mean over B·P positions.

        Args:
            input_ids: corrupted tokens [B, L].
            positions_BP: positions to predict; negative ones are ignored.
            labels_BP: the tokens that stand there, -100 where ignored.
            teacher_ids_BPT, teacher_logprobs_BPT: the teacher's top T at those positions; needed if ``distill_weight``.
            temperature_lse_BP: lse_T of the teacher there (``entropy_masking.losses``); needed if T is not 1.
            predicted_B1: if given, the arguments above cover all masked positions, and the student predicts this many
                of each row: those with the highest ``predict_by`` (``entropy``, ``surprisal``, ``excess``).
            predictions: slots of a row for them.
            reference_BP: surprisal of the reference in nats; needed for ``excess``.
            distill_weight: α in ``(1 - α)·CE + α·T²·KL(teacher ‖ student)``.
            distill_temperature: T of both distributions in the KL.
            distill_share: share of a row's predicted positions that is distilled, those of the student's highest
                entropies; the others have the cross-entropy alone.
            measure: also return what the student says of masked tokens, without gradient.

        Returns:
            ``{"loss": scalar}``, or without labels ``{"logits": logits_BPV}``. With ``measure`` also ``tokens``,
            ``entropy`` and ``surprisal`` [B, M] in nats, of one in ``MEASURED_EVERY`` predicted positions, or of all
            masked ones where the student chooses; tokens are -100 where ignored.
        """
        own_forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        if positions_BP is None:
            return own_forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        choice = None
        if predicted_B1 is not None and labels_BP is not None:
            choice = _Choice(labels_BP, predict_by, predictions, predicted_B1, reference_BP)
        positions_BP = positions_BP.clamp_min(0)
        self._positions_BP = positions_BP if self.sparse_head else None
        self._choice = choice if self.parted_head else None
        try:
            logits_BPV = own_forward(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self._positions_BP = self._choice = None
        if not self.sparse_head:
            logits_BPV = _at(logits_BPV, positions_BP)
        if labels_BP is None:
            return {"logits": logits_BPV}
        output: dict[str, Tensor] = {}
        if choice:
            if choice.slots_BP is None:
                logits_BPV = _at(logits_BPV, choice.make(*_scores(logits_BPV, labels_BP)))
            assert choice.slots_BP is not None and choice.entropy_BK is not None and choice.surprisal_BK is not None
            if measure:
                output |= {"tokens": labels_BP, "entropy": choice.entropy_BK, "surprisal": choice.surprisal_BK}
            slots_BP = choice.slots_BP
            labels_BP = take(labels_BP, slots_BP, IGNORED_LABEL)
            if teacher_ids_BPT is not None and teacher_logprobs_BPT is not None:
                teacher_ids_BPT = _at(teacher_ids_BPT, slots_BP.clamp_min(0))
                teacher_logprobs_BPT = _at(teacher_logprobs_BPT, slots_BP.clamp_min(0))
            if temperature_lse_BP is not None:
                temperature_lse_BP = take(temperature_lse_BP, slots_BP, 0)
        elif measure:
            tokens_BM = labels_BP[:, ::MEASURED_EVERY]
            entropy_BM, surprisal_BM = _scores(logits_BPV[:, ::MEASURED_EVERY], tokens_BM)
            output |= {"tokens": tokens_BM, "entropy": entropy_BM, "surprisal": surprisal_BM}
        weight: float | Tensor = distill_weight
        if distill_weight and distill_share < 1:
            real_BP = labels_BP != IGNORED_LABEL
            count_B1 = (distill_share * real_BP.sum(1, keepdim=True).double()).round().clamp_min(1)
            distilled_BP = is_highest(_scores(logits_BPV, labels_BP)[0], real_BP, count_B1)
            weight = (distill_weight * distilled_BP).flatten()
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


def with_masked_positions(model: Any) -> Any:
    """Give a masked LM the forward of ``MaskedPositions``. It keeps its class name, so it is saved as what it was.

    Whether its head can run on some positions alone is tried out on a few tokens; where it cannot, that is said in one
    line, and it runs everywhere.

    Raises:
        UsageError: the model gives no logits [B, L, V] for input_ids and an attention mask.
    """

    def narrow(module: Any, args: Any, output: Any) -> Any:
        if model._positions_BP is not None:
            output.last_hidden_state = _at(output.last_hidden_state, model._positions_BP)
        return output

    def choose(module: Any, args: Any) -> Any:
        choice, model._choice = model._choice, None  # the projection is called to score, too
        if choice is None:
            return None
        return (_at(args[0], choice.make(*_projected_scores(module, args[0].detach(), choice.labels_BK))), *args[1:])

    name = type(model).__name__
    model.base_model.register_forward_hook(narrow)
    if model.get_output_embeddings() is not None:
        model.get_output_embeddings().register_forward_pre_hook(choose)
    model.__class__ = type(name, (MaskedPositions, type(model)), {"__module__": type(model).__module__})
    with torch.no_grad(), _on_trial(model):
        model.sparse_head, model.parted_head = _try_head(model)
    if not model.sparse_head:
        print(
            f"the head of {name} needs whole sequences, so it runs at every position: training is slower",
            file=sys.stderr,
        )
    return model


def _at(hidden_BLX: Tensor, positions_BK: Tensor) -> Tensor:
    rows_B1 = torch.arange(len(hidden_BLX), device=hidden_BLX.device)[:, None]
    return hidden_BLX[rows_B1, positions_BK]


def _try_head(model: Any) -> tuple[bool, bool]:
    """Whether the logits at some positions stay the same when the head runs there alone; and when some are chosen."""
    ids_BL = torch.arange(2 * PROBE, device=model.device).view(2, PROBE) % model.config.vocab_size
    positions_BK = torch.tensor([[1, 2, 5], [0, 3, PROBE - 1]], device=model.device)
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    try:
        logits_BLV = model(**inputs).logits
        if logits_BLV.shape != (*ids_BL.shape, model.config.vocab_size):
            raise ValueError(f"their shape is {list(logits_BLV.shape)}")
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(model).__name__} gives no logits for each token of a batch ({reason}); use another masked LM"
        ) from None
    tokens_BK = ids_BL.gather(1, positions_BK)
    expected_BKV, scores = _at(logits_BLV, positions_BK), _scores(_at(logits_BLV, positions_BK), tokens_BK)
    count_B1 = torch.full_like(positions_BK[:, :1], 2)
    choice = _Choice(tokens_BK, "surprisal", 2, count_B1, None)
    losses_BP = scores[1].gather(1, choice.make(*scores))
    sparse = parted = True
    try:
        sparse = _same(model(**inputs, positions_BP=positions_BK)["logits"], expected_BKV)
        chosen = {"positions_BP": positions_BK, "labels_BP": tokens_BK, "predicted_B1": count_B1, "predictions": 2}
        output = model(**inputs, **chosen, measure=True)
        parted = _same(output["loss"], losses_BP.mean())
        parted &= all(_same(output[n], s) for n, s in zip(("entropy", "surprisal"), scores, strict=True))
    except UNFIT:
        sparse = parted = False
    return sparse, sparse and parted


def _same(found: Tensor, expected: Tensor) -> bool:
    nearly = 1e-3 * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=nearly)


@contextmanager
def _on_trial(model: Any) -> Iterator[None]:
    """Make a new model resemble a trained one for the trial: no dropout, non-zero vocabulary biases. Restores both."""
    was_training = model.training
    model.eval()
    biases = [parameter for parameter in model.parameters() if parameter.shape == (model.config.vocab_size,)]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias.copy_(torch.linspace(-1, 1, len(bias)))
    try:
        yield
    finally:
        for bias, values in zip(biases, before, strict=True):
            bias.copy_(values)
        model.train(was_training)


@torch.no_grad()
def _scores(logits_BKV: Tensor, tokens_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and surprisal [B, K] float32 in nats; those of a negative token mean nothing."""
    found = entropy_and_surprisal(logits_BKV.detach().flatten(0, 1), tokens_BK.flatten().clamp_min(0))
    return found[0].view_as(tokens_BK), found[1].view_as(tokens_BK)


@torch.no_grad()
def _projected_scores(project: Any, features_BKH: Tensor, tokens_BK: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_scores``, from the input of the vocabulary projection; the full logits are never materialised."""
    rows = max(1, LOGITS_PER_CHUNK["cuda" if features_BKH.is_cuda else "cpu"] // project.weight.shape[0])
    parts_NH, parts_N = features_BKH.flatten(0, 1).split(rows), tokens_BK.flatten().clamp_min(0).split(rows)
    found = [entropy_and_surprisal(project(part_NH), part_N) for part_NH, part_N in zip(parts_NH, parts_N, strict=True)]
    entropy_N, surprisal_N = (torch.cat(column) for column in zip(*found, strict=True))
    return entropy_N.view_as(tokens_BK), surprisal_N.view_as(tokens_BK)


@torch.no_grad()
def student_scores(model: Any, input_ids_BL: Tensor, attention_BL: Tensor | None) -> dict[str, Tensor]:
    """The model's predictive ``entropy`` and its ``surprisal`` at the actual tokens [B, L], float32, in nats.

    On the batch as it is, nothing masked, and without dropout; a few rows at a time where the head cannot be parted.
    """
    was_training = model.training
    model.eval()
    B, L = input_ids_BL.shape
    position_L, rows = torch.arange(L, device=input_ids_BL.device), B
    if not model.parted_head:
        rows = max(1, LOGITS_PER_CHUNK["cuda" if input_ids_BL.is_cuda else "cpu"] // (L * model.config.vocab_size))
    found: dict[str, list[Tensor]] = {"entropy": [], "surprisal": []}
    for start in range(0, B, rows):
        ids_RL = input_ids_BL[start : start + rows]
        attention_RL = None if attention_BL is None else attention_BL[start : start + rows]
        none_R1 = torch.zeros_like(ids_RL[:, :1])
        where = {"positions_BP": position_L.expand_as(ids_RL), "labels_BP": ids_RL, "predicted_B1": none_R1}
        output = model(ids_RL, attention_RL, **where, predictions=0, measure=True)
        for name, chunks in found.items():
            chunks.append(output[name])
    model.train(was_training)
    return {name: torch.cat(chunks) for name, chunks in found.items()}
