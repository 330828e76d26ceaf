"""Entropy-aware masking: scores and a key → masked positions → corrupted inputs. Pure tensor functions.

k positions of a row are masked. The hard share h of them is chosen by score, the rest uniformly:

1. The uniform part, k - round(h·k) positions, is drawn from all candidates. So every candidate is masked with a
   probability of about (1 - h) · ratio or more.
2. The hard part takes the candidates left with the highest ``r + τ·G``: r in (0, 1] is the rank of the score within the
   row, and G is Gumbel noise. τ = 0 takes the highest scores. τ > 0 samples without replacement from softmax(r/τ) (the
   Gumbel top-k trick, Kool et al. 2019, arXiv 1903.06059). Ranks make τ mean the same for every teacher and student.

h is a function of the progress of the run: 0 during the warm-up, then it rises to its value over the ramp. Without
warm-up and ramp, h = 1 and τ = 0 is the selection of Srinivasagan et al. (arXiv 2605.28526), and h = 0 masks at random.

All noise is a hash of (seed, stream, epoch, sequence id, position). So the mask of a row depends on nothing else: not
on the batch, the number of loader workers or ranks, nor on where a run was resumed.

Shapes: B rows, L tokens, K masked positions of a row, P predicted ones, V vocabulary, T tokens that a teacher names.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from train.noise import noise
from train.words import take_while_it_fits, word_heads, word_sizes_and_means

IGNORED = -1  # fills the positions of a row that masks fewer than k
IGNORED_LABEL = -100  # torch's ignore_index
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of BERT's 80/10/10 corruption

# each use of noise has a stream of its own, so that they are independent
SELECTION, HARD, CORRUPTION, REPLACEMENT, PREDICTION = range(5)

SCORES = ("entropy", "surprisal", "excess")


@dataclass(frozen=True)
class MaskPolicy:
    """How many positions of a row to mask, which ones, and which of them to predict.

    Attributes:
        ratio: share of the candidates to mask, in (0, 1].
        hard_share: h, share of the masked positions that is chosen by score, in [0, 1].
        temperature: τ of the hard part, in units of the rank within a row (0 to 1), finite.
        warmup: share of the run in which all masks are random, in [0, 1).
        ramp: share of the run after the warm-up over which h rises from 0 to its value, in [0, 1].
        by: the score: ``entropy`` (of the prediction), ``surprisal`` (of the actual token), or ``excess`` (the
            student's loss minus the reference's surprisal).
        predict_ratio: share of the candidates to predict, at most ``ratio``; None for all that is masked.
        predict_by: what chooses the predicted positions among the masked ones: a score as in ``by``, or ``random``.
        corruption: ``bert`` (80 % [MASK], 10 % a random token, 10 % unchanged) or ``mask-only``.
        seed: of all noise.
        unit: ``token``, or ``word``: the pieces of a word are masked together.

    Raises:
        ValueError: a value is out of range.
    """

    ratio: float = 0.3
    hard_share: float = 0.5
    temperature: float = 0.3
    warmup: float = 0.0
    ramp: float = 0.0
    by: str = "entropy"
    predict_ratio: float | None = None
    predict_by: str = "random"
    corruption: str = "bert"
    seed: int = 0
    unit: str = "token"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"mask ratio {self.ratio:g} is not above 0 and at most 1")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard share {self.hard_share:g} is not between 0 and 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"mask temperature {self.temperature:g} is not finite and at least 0; use hard share 0 for random masks"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"mask warm-up {self.warmup:g} is not at least 0 and below 1, a share of the run")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"mask ramp {self.ramp:g} is not between 0 and 1, a share of the run")
        if self.by not in SCORES:
            raise ValueError(f"masking by {self.by!r} is unknown; use {', '.join(SCORES)}")
        if self.predict_ratio is not None and not 0 < self.predict_ratio <= self.ratio:
            raise ValueError(
                f"predict ratio {self.predict_ratio:g} is not above 0 and at most the mask ratio {self.ratio:g}"
            )
        if self.predict_by not in ("random", *SCORES):
            raise ValueError(f"predicting by {self.predict_by!r} is unknown; use random, {', '.join(SCORES)}")
        if self.corruption not in ("bert", "mask-only"):
            raise ValueError(f"corruption {self.corruption!r} is unknown; use bert or mask-only")
        if self.unit not in ("token", "word"):
            raise ValueError(f"mask unit {self.unit!r} is unknown; use token or word")

    @classmethod
    def random(cls, **fields: Any) -> Self:
        """Uniform masks."""
        return cls(hard_share=0.0, **fields)

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """The 15 % with the highest scores: the selection of arXiv 2605.28526. Fields that are given win."""
        return cls(**({"ratio": 0.15, "hard_share": 1.0, "temperature": 0.0} | fields))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The policy that ``to_json`` wrote. Raises TypeError or ValueError for anything else."""
        return cls(**fields)

    @property
    def uniform(self) -> bool:
        """Whether every candidate is as likely as any other, so that no scores are read for masking."""
        return self.hard_share == 0

    @property
    def predicts_all(self) -> bool:
        return self.predict_ratio is None or self.predict_ratio == self.ratio

    @property
    def uses_scores(self) -> bool:
        """Whether scores choose what is masked, or what is predicted."""
        return not self.uniform or not (self.predicts_all or self.predict_by == "random")

    def repeats(self) -> bool:
        """Whether every epoch masks the same positions: only ties are drawn."""
        return self.hard_share == 1 and self.temperature == self.warmup == self.ramp == 0 and self.predicts_all

    def share_at(self, progress_B: Tensor) -> Tensor:
        """h at a progress of 0 to 1 through the run, float64."""
        past_B = progress_B.double() - self.warmup
        risen_B = (past_B / self.ramp).clamp(0, 1) if self.ramp else (past_B >= 0).double()
        return self.hard_share * risen_B

    def positions(self, length: int) -> int:
        """k, the masked positions of a row of L tokens whose ends are special: round(ratio · (L - 2)), at least 1."""
        return max(1, round(self.ratio * (length - 2)))

    def predictions(self, length: int) -> int:
        """The predicted positions of such a row."""
        return max(1, round((self.predict_ratio or self.ratio) * (length - 2)))


def select_positions(
    score_BL: Tensor,
    candidates_BL: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    continues_BL: Tensor | None = None,
    progress_B: Tensor | None = None,
) -> Tensor:
    """The positions to mask.

    A row with c candidates masks max(1, round(ratio · c)) of them: k, where all but its ends are candidates.

    Args:
        score_BL: any floating dtype; not read where h = 0. NaN ranks below every score.
        candidates_BL: bool; False at special tokens and padding.
        sequence_id_B: int64, the row's stable id.
        epoch_B: int64, how often the row was visited before.
        continues_BL: bool, the tokens that continue the word before them; needed for the word unit.
        progress_B: float64, how far the run is at each row, 0 to 1; without it warm-up and ramp are over.

    Returns:
        positions_BK: int64, ascending; a row with fewer than K ends in ``IGNORED``.
    """
    L = candidates_BL.shape[1]
    K = min(policy.positions(L), L)
    if policy.unit == "token":
        continues_BL = None
    elif continues_BL is None:
        raise ValueError("the word unit needs continues_BL: which tokens continue a word")
    masked_B1 = _count(policy.ratio, candidates_BL, K)
    position_L = torch.arange(L, device=candidates_BL.device)
    noise_BL = noise(policy.seed, SELECTION, epoch_B, sequence_id_B, position_L)
    share_B = torch.full_like(sequence_id_B, policy.hard_share, dtype=torch.float64)
    hard_B1 = ((share_B if progress_B is None else policy.share_at(progress_B))[:, None] * masked_B1).round()
    chosen_BL = _first(noise_BL, noise_BL, candidates_BL, masked_B1 - hard_B1, continues_BL)
    if not policy.uniform:
        score_BL, gumbel_BL = score_BL.double().nan_to_num(nan=-torch.inf), None
        if policy.temperature:
            uniform_BL = noise(policy.seed, HARD, epoch_B, sequence_id_B, position_L)
            gumbel_BL = -policy.temperature * (-uniform_BL.log()).log()
        left_BL, left_B1 = candidates_BL & ~chosen_BL, masked_B1 - chosen_BL.sum(1, keepdim=True)
        chosen_BL = chosen_BL | _first(score_BL, noise_BL, left_BL, left_B1, continues_BL, gumbel_BL)
    return _slots(chosen_BL, K)


def is_highest(score_BK: Tensor, real_BK: Tensor, count_B1: Tensor) -> Tensor:
    """Bool: the ``count_B1`` highest scores of each row among the real ones, ties by position. NaN comes last."""
    order_BK = _descending(score_BK.double().nan_to_num(nan=-torch.inf), real_BK)
    return real_BK & (_place(order_BK) < count_B1)


def highest(score_BK: Tensor, real_BK: Tensor, count_B1: Tensor, size: int) -> Tensor:
    """The slots of ``is_highest`` [B, size], ascending; a row with fewer ends in ``IGNORED``."""
    return _slots(is_highest(score_BK, real_BK, count_B1), size)


def _count(ratio: float, candidates_BL: Tensor, most: int) -> Tensor:
    """max(1, round(ratio · c)) of a row with c candidates, at most ``most``; float64, to round as Python does."""
    count_B1 = candidates_BL.sum(1, keepdim=True).double()
    return (ratio * count_B1).round().clamp(min=1, max=most).minimum(count_B1)


def _slots(chosen_BL: Tensor, size: int) -> Tensor:
    """The positions of what is chosen [B, size], ascending, then ``IGNORED``."""
    position_L = torch.arange(chosen_BL.shape[1], device=chosen_BL.device)
    slot_BL = torch.where(chosen_BL, chosen_BL.cumsum(1) - 1, size)  # what is not chosen goes to one more, cut off
    slots_BK = torch.full((len(slot_BL), size + 1), IGNORED, device=slot_BL.device)
    return slots_BK.scatter(1, slot_BL, position_L.expand_as(slot_BL))[:, :size]


def corrupt(
    input_ids_BL: Tensor,
    positions_BK: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    mask_id: int,
    replacement_ids_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Hide the tokens at ``positions_BK``, of which those that are ``IGNORED`` come last.

    Args:
        replacement_ids_R: the ids that a random replacement is drawn from, i.e. all but special tokens.

    Returns:
        inputs_BL, and labels_BK: the hidden tokens, ``IGNORED_LABEL`` where the position is ``IGNORED``.
    """
    ignored_BK = positions_BK == IGNORED
    where_BK = positions_BK.clamp_min(0)
    original_BK = input_ids_BL.gather(1, where_BK)
    hidden_BK = torch.full_like(original_BK, mask_id)
    if policy.corruption == "bert":
        fate_BK = noise(policy.seed, CORRUPTION, epoch_B, sequence_id_B, where_BK)
        draw_BK = noise(policy.seed, REPLACEMENT, epoch_B, sequence_id_B, where_BK)
        random_BK = replacement_ids_R[(draw_BK * len(replacement_ids_R)).long()]
        hidden_BK = torch.where(fate_BK < MASKED_SHARE, hidden_BK, random_BK)
        hidden_BK = torch.where(fate_BK < MASKED_SHARE + RANDOM_SHARE, hidden_BK, original_BK)
    # ignored slots must not change the row: they repeat the write of its first slot, and if that one is ignored too,
    # they write the original token
    hidden_BK = torch.where(ignored_BK, original_BK, hidden_BK)
    hidden_BK = torch.where(ignored_BK, hidden_BK[:, :1], hidden_BK)
    where_BK = torch.where(ignored_BK, where_BK[:, :1], where_BK)
    inputs_BL = input_ids_BL.scatter(1, where_BK, hidden_BK)
    return inputs_BL, original_BK.masked_fill(ignored_BK, IGNORED_LABEL)


class Masker:
    """Masks batches: selects positions, corrupts inputs, and gathers the teacher's top k there.

    Nothing in it waits for an accelerator or copies to one: its tables go there once, by ``to``.

    Args:
        vocab_size: of the tokenizer; a random replacement is one of its tokens that are not special.
        special_token_ids: ids that are never masked; ``pad_id`` is one of them.
        continues_V: bool, the tokens that go on with a word (``train.words``); needed for the word unit.
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
        special_V = torch.zeros(vocab_size, dtype=torch.bool)
        special_V[[token for token in special_token_ids if token < vocab_size]] = True
        self.special_V, self.replacement_ids_R = special_V, (~special_V).nonzero().squeeze(1)

    def to(self, device: torch.device | str) -> Self:
        """A masker of batches on ``device``."""
        moved = copy.copy(self)
        moved.special_V, moved.replacement_ids_R = self.special_V.to(device), self.replacement_ids_R.to(device)
        moved.continues_V = None if self.continues_V is None else self.continues_V.to(device)
        return moved

    def candidates(self, input_ids_BL: Tensor) -> Tensor:
        """[B, L] bool: what may be masked."""
        return ~self.special_V[input_ids_BL]

    def attention_mask(self, batch: dict[str, Any]) -> Tensor | None:
        """[B, L] int64, 0 at padding; None where a batch has none.

        Checking for padding would wait for an accelerator. So a batch may carry ``padded``, a bool found on the CPU;
        without it, a batch on an accelerator counts as padded.
        """
        attended_BL = batch["input_ids"] != self.pad_id
        padded = batch.get("padded")
        if padded is None:
            padded = attended_BL.device.type != "cpu" or not attended_BL.all()
        return attended_BL.long() if padded else None

    def __call__(self, batch: dict[str, Any], policy: MaskPolicy) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            batch: ``input_ids`` [B, L], ``sequence_id`` [B], ``epoch`` [B]. Optional: ``progress`` [B] for warm-up and
                ramp; unless h = 0 the score [B, L] that ``policy.by`` names, or ``score`` in its place; the score that
                ``policy.predict_by`` names; ``reference`` [B, L], the reference's surprisal, for ``excess``;
                ``topk_ids`` and ``topk_logprobs`` [B, L, T] for distillation, and ``temperature_lse`` [B, L] at T ≠ 1;
                ``padded`` (see ``attention_mask``).

        Returns:
            input_ids [B, L], positions_BP and labels_BP of the predicted positions; with padding attention_mask [B, L];
            with a teacher teacher_ids_BPT, teacher_logprobs_BPT and temperature_lse_BP. If the batch lacks the score
            for ``predict_by``, all K masked positions are returned, ``predicted_B1`` says how many of them to predict,
            and the student chooses.
        """
        ids_BL, key = batch["input_ids"], (batch["sequence_id"], batch["epoch"])
        candidates_BL = self.candidates(ids_BL)
        score_BL = candidates_BL if policy.uniform else batch["score" if "score" in batch else policy.by]
        continues_BL = None if self.continues_V is None else self.continues_V[ids_BL]
        positions_BK = select_positions(score_BL, candidates_BL, *key, policy, continues_BL, batch.get("progress"))
        inputs_BL, labels_BK = corrupt(ids_BL, positions_BK, *key, policy, self.mask_id, self.replacement_ids_R)
        masked = {"input_ids": inputs_BL, "positions_BP": positions_BK, "labels_BP": labels_BK}
        if not policy.predicts_all:
            size = policy.predictions(ids_BL.shape[1])
            predicted_B1 = _count(policy.predict_ratio or 0, candidates_BL, size)
            if policy.predict_by not in ("random", *batch):
                masked["predicted_B1"] = predicted_B1
                if policy.predict_by == "excess":
                    masked["reference_BP"] = batch["reference"].gather(1, positions_BK.clamp_min(0)).float()
            else:
                if policy.predict_by == "random":
                    score_BK = noise(policy.seed, PREDICTION, key[1], key[0], positions_BK)
                else:
                    score_BK = batch[policy.predict_by].gather(1, positions_BK.clamp_min(0))
                slots_BP = highest(score_BK, positions_BK != IGNORED, predicted_B1, size)
                masked["positions_BP"] = take(positions_BK, slots_BP, IGNORED)
                masked["labels_BP"] = take(labels_BK, slots_BP, IGNORED_LABEL)
        if (attention_BL := self.attention_mask(batch)) is not None:
            masked["attention_mask"] = attention_BL
        if "topk_ids" in batch:
            rows_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
            where_BP = masked["positions_BP"].clamp_min(0)
            masked["teacher_ids_BPT"] = batch["topk_ids"][rows_B1, where_BP].long()
            masked["teacher_logprobs_BPT"] = batch["topk_logprobs"][rows_B1, where_BP].float()
            if "temperature_lse" in batch:
                masked["temperature_lse_BP"] = batch["temperature_lse"][rows_B1, where_BP]
        return masked


def take(values_BK: Tensor, slots_BP: Tensor, ignored: int) -> Tensor:
    """The values of some slots [B, P], ``ignored`` where a slot is ``IGNORED``."""
    return values_BK.gather(1, slots_BP.clamp_min(0)).masked_fill(slots_BP == IGNORED, ignored)


def _first(
    score_BL: Tensor,
    noise_BL: Tensor,
    candidates_BL: Tensor,
    count_B1: Tensor,
    continues_BL: Tensor | None,
    gumbel_BL: Tensor | None = None,
) -> Tensor:
    """The first ``count_B1`` candidates by score, ties by noise, then by position; bool [B, L].

    With ``gumbel_BL`` by rank of the score within the row plus that. By words: word after word in the order of the mean
    score of its pieces, with the noise at its first piece, each that still fits; then single pieces in their own order.
    """

    def order(score_BL: Tensor, candidates_BL: Tensor) -> Tensor:
        if gumbel_BL is not None:
            score_BL = _rank_share(score_BL, candidates_BL) + gumbel_BL
        by_noise_BL = noise_BL.argsort(dim=1, descending=True, stable=True)
        key_BL, candidates_BL = score_BL.gather(1, by_noise_BL), candidates_BL.gather(1, by_noise_BL)
        return by_noise_BL.gather(1, _descending(key_BL, candidates_BL))

    taken_BL = torch.zeros_like(candidates_BL)
    if continues_BL is not None:
        head_BL = word_heads(candidates_BL, continues_BL)
        size_BL, mean_BL = word_sizes_and_means(score_BL, candidates_BL, head_BL)
        if score_BL is noise_BL:  # words are drawn by one number each
            mean_BL = noise_BL
        order_BL = order(mean_BL, size_BL > 0)
        fits_BL = take_while_it_fits(size_BL.gather(1, order_BL), count_B1)
        heads_taken_BL = torch.zeros_like(taken_BL).scatter(1, order_BL, fits_BL)
        taken_BL = candidates_BL & heads_taken_BL.gather(1, head_BL)
        count_B1 = count_B1 - taken_BL.sum(1, keepdim=True)
        candidates_BL = candidates_BL & ~taken_BL
    return taken_BL | (candidates_BL & (_place(order(score_BL, candidates_BL)) < count_B1))


def _rank_share(score_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """The rank of each candidate's score among those of its row as a share of them, in (0, 1]; ties at their mean."""
    values_BL = score_BL.double().masked_fill(~candidates_BL, torch.inf).contiguous()
    sorted_BL = values_BL.sort(dim=1).values
    below_BL, upto_BL = torch.searchsorted(sorted_BL, values_BL), torch.searchsorted(sorted_BL, values_BL, right=True)
    return (below_BL + upto_BL + 1) / 2 / candidates_BL.sum(1, keepdim=True).clamp_min(1)


def _descending(key_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """Positions of the candidates by key, ties by position; all others come last."""
    lowest = torch.finfo(key_BL.dtype).min  # a candidate's, however low
    return key_BL.clamp_min(lowest).masked_fill(~candidates_BL, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _place(order_BL: Tensor) -> Tensor:
    """The place of each position in an order."""
    place_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter(1, order_BL, place_BL)
