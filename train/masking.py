"""Entropy-aware masking: entropies and a key → masked positions → corrupted inputs. Pure tensor functions.

One family with one temperature. The candidates of a row are sorted by ``H + τ·G`` (H: predictive entropy in nats,
G: Gumbel noise; ties by G, then by position) and the first are masked. τ = 0 masks the highest entropies (Srinivasagan
et al., arXiv 2605.28526), τ = ∞ is uniform random masking, and a τ between draws without replacement from softmax(H/τ)
(the Gumbel top-k trick, Kool et al. 2019, arXiv 1903.06059).

All noise is a hash of (seed, stream, epoch, sequence id, position), so a row's mask depends on nothing else: not on the
batch, the number of loader workers or ranks, nor on where a run was resumed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

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
        band: quantiles (lo, hi) of the row's entropies that candidates must lie between.
        floor: share of the masked positions that are drawn uniformly from the candidates that τ left.
        corruption: ``bert`` (80 % [MASK], 10 % a random token, 10 % unchanged) or ``mask-only``.
        seed: of all noise.

    Raises:
        ValueError: a value out of range, or a band narrower than the ratio.
    """

    ratio: float = 0.15
    temperature: float = 0.0
    band: tuple[float, float] = (0.0, 1.0)
    floor: float = 0.0
    corruption: str = "bert"
    seed: int = 0

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
        if not 0 <= self.floor <= 1:
            raise ValueError(f"mask floor {self.floor:g} is not between 0 and 1")

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON can hold it: an infinite temperature is ``"inf"``."""
        return asdict(self) | {
            "temperature": "inf" if math.isinf(self.temperature) else self.temperature,
            "band": list(self.band),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The policy that ``to_json`` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        low, high = fields["band"]
        return cls(**(fields | {"temperature": float(fields["temperature"]), "band": (low, high)}))

    def repeats(self) -> bool:
        """Whether every epoch hides the same positions: nothing is drawn, but among equal entropies."""
        return self.temperature == 0 and self.floor == 0

    def positions(self, length: int) -> int:
        """k, the masked positions of a row of L tokens whose ends are special: round(ratio · (L - 2)), at least 1."""
        return max(1, round(self.ratio * (length - 2)))


def select_positions(
    entropy_BL: Tensor, candidates_BL: Tensor, sequence_id_B: Tensor, epoch_B: Tensor, policy: MaskPolicy
) -> Tensor:
    """The positions to mask.

    A row with c candidates masks max(1, round(ratio · c)) of them: k, where all but its ends are candidates.

    Args:
        entropy_BL: predictive entropy in nats, any floating dtype. Where it is NaN a position is no candidate, unless
            τ = ∞, which never looks at it.
        candidates_BL: bool; False at special tokens and padding.
        sequence_id_B: int64, the row's stable id.
        epoch_B: int64, the how-many-th visit of the row this is.

    Returns:
        positions_BK: int64, ascending; a row with fewer than K ends in ``IGNORED``.
    """
    L = candidates_BL.shape[1]
    K = min(policy.positions(L), L)
    uniform = math.isinf(policy.temperature)
    entropy_BL = torch.zeros_like(candidates_BL, dtype=torch.float64) if uniform else entropy_BL.double()
    candidates_BL = candidates_BL & ~entropy_BL.isnan()
    # float64 throughout, so that every share rounds as Python's would
    count_B1 = candidates_BL.sum(1, keepdim=True).double()
    masked_B1 = (policy.ratio * count_B1).round().clamp(min=1, max=K).minimum(count_B1)
    if policy.band != (0.0, 1.0):
        candidates_BL = candidates_BL & _within_band(entropy_BL, candidates_BL, count_B1, policy.band)

    gumbel_BL = -(-noise(policy.seed, SELECTION, epoch_B, sequence_id_B, L).log()).log()
    key_BL = gumbel_BL if uniform else entropy_BL + policy.temperature * gumbel_BL
    rank_BL = _descending_rank(key_BL, gumbel_BL, candidates_BL)
    floor_B1 = (policy.floor * masked_B1).round()
    chosen_BL = candidates_BL & (rank_BL < masked_B1 - floor_B1)
    if policy.floor:
        rest_BL = candidates_BL & ~chosen_BL
        noise_BL = noise(policy.seed, FLOOR, epoch_B, sequence_id_B, L)
        chosen_BL = chosen_BL | (rest_BL & (_descending_rank(noise_BL, noise_BL, rest_BL) < floor_B1))

    position_L = torch.arange(L, device=chosen_BL.device)
    positions_BK = torch.where(chosen_BL, position_L, L).sort(dim=1).values[:, :K]
    return torch.where(positions_BK < L, positions_BK, IGNORED)


def corrupt(
    input_ids_BL: Tensor,
    positions_BK: Tensor,
    sequence_id_B: Tensor,
    epoch_B: Tensor,
    policy: MaskPolicy,
    mask_id: int,
    replacement_ids_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Hide the tokens at ``positions_BK``.

    Args:
        replacement_ids_R: the ids that a random replacement is drawn from, i.e. all but special tokens.

    Returns:
        inputs_BL, and labels_BK: the hidden tokens, ``IGNORED_LABEL`` where the position is ``IGNORED``.
    """
    L = input_ids_BL.shape[1]
    ignored_BK = positions_BK == IGNORED
    where_BK = positions_BK.clamp_min(0)
    original_BK = input_ids_BL.gather(1, where_BK)
    hidden_BK = torch.full_like(original_BK, mask_id)
    if policy.corruption == "bert":
        fate_BK = noise(policy.seed, CORRUPTION, epoch_B, sequence_id_B, L).gather(1, where_BK)
        draw_BK = noise(policy.seed, REPLACEMENT, epoch_B, sequence_id_B, L).gather(1, where_BK)
        random_BK = replacement_ids_R[(draw_BK * len(replacement_ids_R)).long()]
        hidden_BK = torch.where(fate_BK < MASKED_SHARE, hidden_BK, random_BK)
        hidden_BK = torch.where(fate_BK < MASKED_SHARE + RANDOM_SHARE, hidden_BK, original_BK)
    # an ignored slot points at position 0 (a special token, never masked itself) and writes back what is there
    hidden_BK = torch.where(ignored_BK, input_ids_BL[:, :1], hidden_BK)
    where_BK = torch.where(ignored_BK, 0, where_BK)
    inputs_BL = input_ids_BL.scatter(1, where_BK, hidden_BK)
    return inputs_BL, original_BK.masked_fill(ignored_BK, IGNORED_LABEL)


class Masker:
    """Batches of sequences → what a masked LM trains on: selection, corruption, and the teacher's word on it.

    Args:
        vocab_size: tokens that a random replacement is drawn from, less the special ones.
        special_token_ids: ids that are never masked; ``pad_id`` is one of them.
    """

    def __init__(self, *, vocab_size: int, special_token_ids: list[int], mask_id: int, pad_id: int) -> None:
        self.mask_id, self.pad_id = mask_id, pad_id
        special_V = torch.zeros(vocab_size, dtype=torch.bool)
        special_V[[token for token in special_token_ids if token < vocab_size]] = True
        self.special_V, self.replacement_ids_R = special_V, (~special_V).nonzero().squeeze(1)

    def __call__(self, batch: dict[str, Tensor], policy: MaskPolicy) -> dict[str, Tensor]:
        """Mask a batch.

        Args:
            batch: input_ids [B, L], sequence_id [B], epoch [B]; entropy [B, L] in nats unless τ = ∞; and where a
                teacher's scan is to be followed topk_ids and topk_logprobs [B, L, T] and, at a temperature other than
                1, temperature_lse [B, L].

        Returns:
            input_ids [B, L], positions_BK, labels_BK, with padding attention_mask [B, L], and with a teacher
            teacher_ids_BKT, teacher_logprobs_BKT and temperature_lse_BK.
        """
        ids_BL, key = batch["input_ids"], (batch["sequence_id"], batch["epoch"])
        device = ids_BL.device
        candidates_BL = ~self.special_V.to(device)[ids_BL]
        entropy_BL = batch.get("entropy", torch.zeros((), device=device)).expand(ids_BL.shape)
        positions_BK = select_positions(entropy_BL, candidates_BL, *key, policy)
        replacement_ids_R = self.replacement_ids_R.to(device)
        inputs_BL, labels_BK = corrupt(ids_BL, positions_BK, *key, policy, self.mask_id, replacement_ids_R)
        masked = {"input_ids": inputs_BL, "positions_BK": positions_BK, "labels_BK": labels_BK}
        attended_BL = ids_BL != self.pad_id
        if not attended_BL.all():
            masked["attention_mask"] = attended_BL.long()
        if "topk_ids" in batch:
            rows_B1 = torch.arange(len(ids_BL), device=device)[:, None]
            where_BK = positions_BK.clamp_min(0)
            masked["teacher_ids_BKT"] = batch["topk_ids"][rows_B1, where_BK].long()
            masked["teacher_logprobs_BKT"] = batch["topk_logprobs"][rows_B1, where_BK].float()
            if "temperature_lse" in batch:
                masked["temperature_lse_BK"] = batch["temperature_lse"][rows_B1, where_BK]
        return masked


def noise(seed: int, stream: int, epoch_B: Tensor, sequence_id_B: Tensor, length: int) -> Tensor:
    """Uniform numbers in (0, 1) [B, L] float64: a hash of (seed, stream, epoch, sequence id, position)."""
    constant = torch.tensor([seed, stream], dtype=torch.int64, device=sequence_id_B.device)
    key = _mix(_mix(constant[0]) + constant[1])
    key_B = _mix(_mix(key + epoch_B.long()) + sequence_id_B.long())
    position_L = torch.arange(length, device=sequence_id_B.device)
    bits_BL = _shift_right(_mix(_mix(position_L) + key_B[:, None]), 11)
    return (bits_BL.double() + 0.5) * 2.0**-53


def hash_order(seed: int, *key: int, size: int) -> Tensor:
    """A permutation of ``range(size)`` that is a function of (seed, key) alone, whatever the library versions."""
    return hashes(seed, *key, of_N=torch.arange(size)).argsort(stable=True)


def hashes(seed: int, *key: int, of_N: Tensor) -> Tensor:
    """An int64 for each int64 in ``of_N``, a function of it and (seed, key) alone."""
    state = _mix(torch.tensor(seed, dtype=torch.int64))
    for part in key:
        state = _mix(state + part)
    return _mix(_mix(of_N) + state)


def _within_band(entropy_BL: Tensor, candidates_BL: Tensor, count_B1: Tensor, band: tuple[float, float]) -> Tensor:
    """Candidates whose rank among the row's entropies lies between two quantiles; never fewer than their share."""
    ascending_BL = _descending_rank(-entropy_BL, -entropy_BL, candidates_BL)
    low_B1, high_B1 = (band[0] * count_B1).floor(), (band[1] * count_B1).ceil()
    return (ascending_BL >= low_B1) & (ascending_BL < high_B1)


def _descending_rank(key_BL: Tensor, tie_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """Rank of each candidate by key, ties by ``tie_BL``, then by position; what is no candidate comes last."""
    by_tie_BL = tie_BL.argsort(dim=1, descending=True, stable=True)
    key_BL = key_BL.masked_fill(~candidates_BL, -torch.inf)
    order_BL = by_tie_BL.gather(1, key_BL.gather(1, by_tie_BL).argsort(dim=1, descending=True, stable=True))
    return order_BL.argsort(dim=1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic, after its increment."""
    x = x + -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own carries the sign of an int64 along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
