"""Entropy-aware masking: scores and a key → masked positions → corrupted inputs. Pure tensor functions.

One family with one temperature. The candidates of a row are sorted by ``H + τ·G`` (H: the score, a predictive entropy
or a surprisal in nats; G: Gumbel noise; ties by G, then by position) and the first are masked. τ = 0 masks the highest
scores (by entropy: Srinivasagan et al., arXiv 2605.28526), τ = ∞ is uniform random masking, and a τ between draws
without replacement from softmax(H/τ) (the Gumbel top-k trick, Kool et al. 2019, arXiv 1903.06059). What is sorted is
tokens, or words with the mean score of their pieces.

All noise is a hash of (seed, stream, epoch, sequence id, position), so a row's mask depends on nothing else: not on the
batch, the number of loader workers or ranks, nor on where a run was resumed.
"""

from __future__ import annotations

import copy
import math
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
SELECTION, FLOOR, CORRUPTION, REPLACEMENT = range(4)


@dataclass(frozen=True)
class MaskPolicy:
    """How many positions of a row to mask, and which.

    Attributes:
        ratio: share of the candidates to mask, in (0, 1].
        temperature: τ in nats, 0 to inf.
        band: quantiles (lo, hi) of the row's scores that candidates must lie between.
        floor: share of the masked positions that are drawn uniformly from the candidates that τ left.
        corruption: ``bert`` (80 % [MASK], 10 % a random token, 10 % unchanged) or ``mask-only``.
        seed: of all noise.
        unit: ``token``, or ``word``: the pieces of a word are masked together.
        by: the score, ``entropy`` (of the prediction) or ``surprisal`` (of the actual token).

    Raises:
        ValueError: a value out of range, or a band narrower than the ratio.
    """

    ratio: float = 0.15
    temperature: float = 0.0
    band: tuple[float, float] = (0.0, 1.0)
    floor: float = 0.0
    corruption: str = "bert"
    seed: int = 0
    unit: str = "token"
    by: str = "entropy"

    def __post_init__(self) -> None:
        low, high = self.band
        if not 0 < self.ratio <= 1:
            raise ValueError(f"mask ratio {self.ratio:g} is not above 0 and at most 1")
        if not self.temperature >= 0:
            raise ValueError(f"mask temperature {self.temperature:g} is negative; use 0 to inf")
        if not 0 <= low < high <= 1:
            raise ValueError(f"mask band {low:g} {high:g} is no range within 0 and 1")
        if high - low < self.ratio - 1e-9:
            raise ValueError(f"mask band {low:g} {high:g} is narrower than the mask ratio {self.ratio:g}; widen it")
        if self.corruption not in ("bert", "mask-only"):
            raise ValueError(f"corruption {self.corruption!r} is unknown; use bert or mask-only")
        if self.unit not in ("token", "word"):
            raise ValueError(f"mask unit {self.unit!r} is unknown; use token or word")
        if self.by not in ("entropy", "surprisal"):
            raise ValueError(f"masking by {self.by!r} is unknown; use entropy or surprisal")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"mask floor {self.floor:g} is not between 0 and 1")

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON can hold it: an infinite temperature is ``"inf"``."""
        return asdict(self) | {
            "temperature": "inf" if self.uniform else self.temperature,
            "band": list(self.band),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The policy that ``to_json`` wrote, now or before there were ``unit`` and ``by``.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        low, high = fields["band"]
        return cls(**(fields | {"temperature": float(fields["temperature"]), "band": (low, high)}))

    @property
    def uniform(self) -> bool:
        """Whether any candidate is as likely as another: τ = ∞, and the scores are not looked at."""
        return math.isinf(self.temperature)

    def repeats(self) -> bool:
        """Whether every epoch hides the same positions: nothing is drawn, but among equal scores."""
        return self.temperature == 0 and self.floor == 0

    def positions(self, length: int) -> int:
        """k, the masked positions of a row of L tokens whose ends are special: round(ratio · (L - 2)), at least 1."""
        return max(1, round(self.ratio * (length - 2)))


def select_positions(
    score_BL: Tensor,
    candidates_BL: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    continues_BL: Tensor | None = None,
) -> Tensor:
    """The positions to mask.

    A row with c candidates masks max(1, round(ratio · c)) of them: k, where all but its ends are candidates.

    Args:
        score_BL: in nats, any floating dtype. Where it is NaN a position is no candidate, unless τ = ∞, which never
            looks at it.
        candidates_BL: bool; False at special tokens and padding.
        sequence_id_B: int64, the row's stable id.
        epoch_B: int64, the how-many-th visit of the row this is.
        continues_BL: bool, the tokens that go on with the word of the one before; needed for the word unit.

    Returns:
        positions_BK: int64, ascending; a row with fewer than K ends in ``IGNORED``.
    """
    L = candidates_BL.shape[1]
    K = min(policy.positions(L), L)
    score_BL = torch.zeros_like(candidates_BL, dtype=torch.float64) if policy.uniform else score_BL.double()
    candidates_BL = candidates_BL & ~score_BL.isnan()
    if policy.unit == "token":
        continues_BL = None
    elif continues_BL is None:
        raise ValueError("the word unit needs continues_BL: which tokens go on with a word")
    # float64 throughout, so that every share rounds as Python's would
    count_B1 = candidates_BL.sum(1, keepdim=True).double()
    masked_B1 = (policy.ratio * count_B1).round().clamp(min=1, max=K).minimum(count_B1)
    if policy.band != (0.0, 1.0):
        candidates_BL = _within_band(score_BL, candidates_BL, count_B1, policy.band, continues_BL)

    position_L = torch.arange(L, device=score_BL.device)
    noise_BL = noise(policy.seed, SELECTION, epoch_B, sequence_id_B, position_L)
    if 0 < policy.temperature < math.inf:  # G rises with it, so elsewhere, where none is added, it orders as G does
        noise_BL = -(-noise_BL.log()).log()
    floor_B1 = (policy.floor * masked_B1).round()
    chosen_BL = _first(score_BL, policy.temperature, noise_BL, candidates_BL, masked_B1 - floor_B1, continues_BL)
    if policy.floor:
        rest_BL = candidates_BL & ~chosen_BL
        noise_BL = noise(policy.seed, FLOOR, epoch_B, sequence_id_B, position_L)
        chosen_BL = chosen_BL | _first(score_BL, math.inf, noise_BL, rest_BL, floor_B1, continues_BL)

    slot_BL = torch.where(chosen_BL, chosen_BL.cumsum(1) - 1, K)  # what is not chosen goes to one more, cut off
    slots_BK = torch.full((len(slot_BL), K + 1), IGNORED, device=slot_BL.device)
    return slots_BK.scatter(1, slot_BL, position_L.expand_as(slot_BL))[:, :K]


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
    # an ignored slot writes what the row's first slot does, where it does; that one, if ignored too, what is there
    hidden_BK = torch.where(ignored_BK, original_BK, hidden_BK)
    hidden_BK = torch.where(ignored_BK, hidden_BK[:, :1], hidden_BK)
    where_BK = torch.where(ignored_BK, where_BK[:, :1], where_BK)
    inputs_BL = input_ids_BL.scatter(1, where_BK, hidden_BK)
    return inputs_BL, original_BK.masked_fill(ignored_BK, IGNORED_LABEL)


class Masker:
    """Batches of sequences → what a masked LM trains on: selection, corruption, and the teacher's word on it.

    Nothing in it waits for an accelerator or copies to one: its tables go there once, by ``to``.

    Args:
        vocab_size: tokens that a random replacement is drawn from, less the special ones.
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

        To look for padding on an accelerator would be to wait for it. There a batch may say so itself (``padded``: a
        bool that whoever read it on the CPU has found), and is taken to have some if it does not.
        """
        attended_BL = batch["input_ids"] != self.pad_id
        padded = batch.get("padded")
        if padded is None:
            padded = attended_BL.device.type != "cpu" or not attended_BL.all()
        return attended_BL.long() if padded else None

    def __call__(self, batch: dict[str, Any], policy: MaskPolicy) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            batch: input_ids [B, L], sequence_id [B], epoch [B]; unless τ = ∞ entropy or surprisal [B, L] in nats, as
                the policy says; where a teacher's scan is to be followed topk_ids and topk_logprobs [B, L, T] and, at
                a temperature other than 1, temperature_lse [B, L]; and ``padded`` (see ``attention_mask``).

        Returns:
            input_ids [B, L], positions_BK, labels_BK, with padding attention_mask [B, L], and with a teacher
            teacher_ids_BKT, teacher_logprobs_BKT and temperature_lse_BK.
        """
        ids_BL, key = batch["input_ids"], (batch["sequence_id"], batch["epoch"])
        candidates_BL = self.candidates(ids_BL)
        score_BL = candidates_BL if policy.uniform else batch[policy.by]
        continues_BL = None if self.continues_V is None else self.continues_V[ids_BL]
        positions_BK = select_positions(score_BL, candidates_BL, *key, policy, continues_BL)
        inputs_BL, labels_BK = corrupt(ids_BL, positions_BK, *key, policy, self.mask_id, self.replacement_ids_R)
        masked = {"input_ids": inputs_BL, "positions_BK": positions_BK, "labels_BK": labels_BK}
        if (attention_BL := self.attention_mask(batch)) is not None:
            masked["attention_mask"] = attention_BL
        if "topk_ids" in batch:
            rows_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
            where_BK = positions_BK.clamp_min(0)
            masked["teacher_ids_BKT"] = batch["topk_ids"][rows_B1, where_BK].long()
            masked["teacher_logprobs_BKT"] = batch["topk_logprobs"][rows_B1, where_BK].float()
            if "temperature_lse" in batch:
                masked["temperature_lse_BK"] = batch["temperature_lse"][rows_B1, where_BK]
        return masked


def _first(
    score_BL: Tensor,
    temperature: float,
    noise_BL: Tensor,
    candidates_BL: Tensor,
    count_B1: Tensor,
    continues_BL: Tensor | None,
) -> Tensor:
    """The first ``count_B1`` candidates by score + temperature · noise, ties by noise, then by position.

    By words: word after word in the order of (mean score of its pieces + temperature · noise at its first piece), each
    that still fits; then single pieces in their own order.
    """

    def order(score_BL: Tensor, candidates_BL: Tensor) -> Tensor:
        if math.isinf(temperature):
            return _descending(noise_BL, candidates_BL)
        by_noise_BL = noise_BL.argsort(dim=1, descending=True, stable=True)
        key_BL = score_BL + temperature * noise_BL if temperature else score_BL
        key_BL, candidates_BL = key_BL.gather(1, by_noise_BL), candidates_BL.gather(1, by_noise_BL)
        return by_noise_BL.gather(1, _descending(key_BL, candidates_BL))

    taken_BL = torch.zeros_like(candidates_BL)
    if continues_BL is not None:
        head_BL = word_heads(candidates_BL, continues_BL)
        size_BL, mean_BL = word_sizes_and_means(score_BL, candidates_BL, head_BL)
        words_BL = size_BL > 0
        order_BL = order(mean_BL, words_BL)
        fits_BL = take_while_it_fits(size_BL.gather(1, order_BL), count_B1)
        heads_taken_BL = torch.zeros_like(taken_BL).scatter(1, order_BL, fits_BL)
        taken_BL = candidates_BL & heads_taken_BL.gather(1, head_BL)
        count_B1 = count_B1 - taken_BL.sum(1, keepdim=True)
        candidates_BL = candidates_BL & ~taken_BL
    return taken_BL | (candidates_BL & (_rank(order(score_BL, candidates_BL)) < count_B1))


def _within_band(
    score_BL: Tensor,
    candidates_BL: Tensor,
    count_B1: Tensor,
    band: tuple[float, float],
    continues_BL: Tensor | None,
) -> Tensor:
    """Candidates whose rank among the row's scores lies between two quantiles; never fewer than their share.

    By words each piece has the rank that its word's mean score gives it, and words come in whole.
    """
    if continues_BL is not None:
        head_BL = word_heads(candidates_BL, continues_BL)
        score_BL = word_sizes_and_means(score_BL, candidates_BL, head_BL)[1].gather(1, head_BL)
    ascending_BL = _rank(_descending(-score_BL, candidates_BL))
    low_B1, high_B1 = (band[0] * count_B1).floor(), (band[1] * count_B1).ceil()
    within_BL = candidates_BL & (ascending_BL >= low_B1) & (ascending_BL < high_B1)
    if continues_BL is not None:
        touched_BL = torch.zeros_like(score_BL).scatter_add(1, head_BL, within_BL.double()) > 0
        within_BL = candidates_BL & touched_BL.gather(1, head_BL)
    return within_BL


def _descending(key_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """Positions of the candidates by key, ties by position; what is no candidate comes last."""
    lowest = torch.finfo(key_BL.dtype).min  # a candidate's, however low
    return key_BL.clamp_min(lowest).masked_fill(~candidates_BL, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _rank(order_BL: Tensor) -> Tensor:
    """The place of each position in an order."""
    place_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter(1, order_BL, place_BL)
