"""Which positions a run masks and predicts, as data. Shapes: B rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # flags are checked before torch is imported, which takes seconds
    from torch import Tensor

SCORES = ("entropy", "surprisal", "excess")


@dataclass(frozen=True)
class MaskPolicy:
    """How many positions of a row to mask, which ones, and which of them to predict.

    Attributes:
        ratio: share of the candidates to mask, in (0, 1].
        hard_share: h, share of the masked positions that is chosen by score, in [0, 1].
        temperature: τ of the hard part, in units of the rank within a row (0 to 1); finite, at least 0.
        warmup: share of the run in which all masks are random, in [0, 1).
        ramp: share of the run after the warm-up over which h rises from 0 to its value, in [0, 1].
        by: the score: ``entropy`` (of the prediction), ``surprisal`` (of the actual token), or ``excess`` (the
            student's loss minus the reference's surprisal).
        predict_ratio: share of the candidates to predict, at most ``ratio``; None predicts all masked positions.
        predict_by: chooses the predicted positions among the masked ones: a score as in ``by``, or ``random``.
        corruption: ``bert`` (80 % [MASK], 10 % a random token, 10 % unchanged) or ``mask-only``.
        seed: of all noise.
        unit: ``token``, or ``word``, which masks all tokens of a word or none.

    Raises:
        ValueError: a value is out of range. The message begins with the name of its attribute.
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
        predicted = self.ratio if self.predict_ratio is None else self.predict_ratio
        known, room = ", ".join(SCORES), round(1 - self.warmup, 9)
        for name, holds, allowed in (
            ("ratio", 0 < self.ratio <= 1, "more than 0 and at most 1"),
            ("hard_share", 0 <= self.hard_share <= 1, "at least 0 and at most 1"),
            (
                "temperature",
                0 <= self.temperature < float("inf"),
                "a finite number of at least 0, or a hard share of 0 for random masks",
            ),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and less than 1, a share of the run"),
            ("ramp", 0 <= self.ramp <= room, f"at least 0 and at most 1 - warm-up = {room:g}, a share of the run"),
            ("by", self.by in SCORES, known),
            ("predict_ratio", 0 < predicted <= self.ratio, f"more than 0 and at most the mask ratio {self.ratio:g}"),
            ("predict_by", self.predict_by in ("random", *SCORES), f"random, {known}"),
            ("corruption", self.corruption in ("bert", "mask-only"), "bert or mask-only"),
            ("unit", self.unit in ("token", "word"), "token or word"),
            ("seed", -(1 << 63) <= self.seed < 1 << 63, "an integer of 64 bits"),
        ):
            if not holds:
                value = getattr(self, name)
                shown = f"{value:g}" if isinstance(value, float) else f"{value!r}"
                problem = f"{shown} is {'unknown' if isinstance(value, str) else 'out of range'}"
                raise ValueError(f"{name} {problem}; use {allowed}")

    @classmethod
    def random(cls, **fields: Any) -> Self:
        """Uniform masks."""
        return cls(hard_share=0.0, **fields)

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """The 15 % with the highest scores, our reading of arXiv 2605.28526. ``fields`` override this."""
        return cls(**{"ratio": 0.15, "hard_share": 1.0, "temperature": 0.0} | fields)

    @property
    def uniform(self) -> bool:
        """Whether all candidates are equally likely. Then masking reads no scores."""
        return self.hard_share == 0

    @property
    def predicts_all(self) -> bool:
        return self.predict_ratio in (None, self.ratio)

    @property
    def uses_scores(self) -> bool:
        """Whether scores choose the masked or the predicted positions."""
        return not self.uniform or not (self.predicts_all or self.predict_by == "random")

    def repeats(self) -> bool:
        """Whether every epoch masks the same positions, apart from ties."""
        return self.hard_share == 1 and self.temperature == self.warmup == self.ramp == 0 and self.predicts_all

    def share_at(self, progress_B: Tensor) -> Tensor:
        """h [B] float64 at a progress of 0 to 1 through the run."""
        past_B = progress_B.double() - self.warmup
        risen_B = (past_B / self.ramp).clamp(0, 1) if self.ramp else (past_B >= 0).double()
        return self.hard_share * risen_B

    def max_masked(self, length: int) -> int:
        """K, the masked positions of a row of L tokens whose ends are special: round(ratio · (L - 2)), at least 1."""
        return max(1, round(self.ratio * (length - 2)))

    def max_predicted(self, length: int) -> int:
        """P, the predicted positions of such a row."""
        return max(1, round((self.predict_ratio or self.ratio) * (length - 2)))
