"""The screen as data: its sizes, and its rows as flags of train/run.py."""

from __future__ import annotations

from dataclasses import dataclass

LENGTH = 128  # tokens of a sequence


@dataclass(frozen=True)
class Size:
    """How large a screen is.

    Attributes:
        student, reference: presets of train/run.py.
        vocab_size: of the tokenizer.
        reference_steps, trunk_steps, branch_steps, batch: steps, and sequences a step.
        branch_documents: documents that the reference scores and the branches read; trunks read the others.
        pairs: BLiMP's, of each phenomenon.
    """

    student: str
    reference: str
    vocab_size: int
    reference_steps: int
    trunk_steps: int
    branch_steps: int
    batch: int
    branch_documents: int
    pairs: int


SIZES = {
    "trial": Size("tiny", "tiny", 128, 4, 4, 4, 4, 40, 1),  # shows that it works, and nothing else
    "tiny": Size("tiny", "mini", 8192, 3200, 1500, 400, 32, 850, 100),
    "mini": Size("mini", "small", 8192, 6400, 3000, 800, 32, 1700, 200),
}


@dataclass(frozen=True)
class Recipe:
    """A row of the screen.

    Attributes:
        flags: of train/run.py that set it apart.
        shuffled: it reads scores that were shuffled within each row: the control.
        scratch: trained from random weights instead of from a trunk.
    """

    flags: str
    shuffled: bool = False
    scratch: bool = False


AT_ONCE = "--mask-warmup 0 --mask-ramp 0"  # the trunk is the warm-up
RISING = "--mask-warmup 0 --mask-ramp 1"
TOP = "--mask-temperature 0"
HALF = "--mask-ratio 0.3 --predict-ratio 0.15"
KD = "--distill-weight 0.5"
RANDOM, PARQUET, SELF = (f"--entropy-source {source}" for source in ("random", "parquet", "self"))

RECIPES = {
    "random": Recipe(RANDOM),
    "random-again": Recipe(f"{RANDOM} --seed 1000"),  # the same data order, other masks: the noise of the screen
    "random-30": Recipe(f"{RANDOM} --mask-ratio 0.3"),
    "random-40": Recipe(f"{RANDOM} --mask-ratio 0.4"),
    "random-only-mask": Recipe(f"{RANDOM} --corruption mask-only"),
    "random-30-only-mask": Recipe(f"{RANDOM} --mask-ratio 0.3 --corruption mask-only"),
    "random+kd": Recipe(f"{RANDOM} {KD}"),
    "random+kd-hard-half": Recipe(f"{RANDOM} {KD} --distill-positions 0.5"),
    "random+kd-0.8": Recipe(f"{RANDOM} --distill-weight 0.8"),
    "random-30+kd": Recipe(f"{RANDOM} --mask-ratio 0.3 {KD}"),
    "parquet": Recipe(PARQUET),  # the defaults
    "parquet-paper": Recipe(f"{PARQUET} --recipe paper"),
    "parquet-15": Recipe(f"{PARQUET} --hard-share 0.15 {TOP} {AT_ONCE}"),
    "parquet-30": Recipe(f"{PARQUET} --hard-share 0.3 {TOP} {AT_ONCE}"),
    "parquet-rising-50": Recipe(f"{PARQUET} --hard-share 0.5 {TOP} {RISING}"),
    "parquet-rising-50-shuffled": Recipe(f"{PARQUET} --hard-share 0.5 {TOP} {RISING}", shuffled=True),
    "parquet-sampled": Recipe(f"{PARQUET} --hard-share 1 --mask-temperature 0.5 {AT_ONCE}"),
    "parquet-sampled-30": Recipe(f"{PARQUET} --hard-share 0.3 {AT_ONCE}"),
    "parquet-30-surprisal": Recipe(f"{PARQUET} --hard-share 0.3 {TOP} --mask-by surprisal {AT_ONCE}"),
    "parquet-30-of-30": Recipe(f"{PARQUET} --mask-ratio 0.3 --hard-share 0.3 {TOP} {AT_ONCE}"),
    "parquet-30+kd": Recipe(f"{PARQUET} --hard-share 0.3 {TOP} {AT_ONCE} {KD}"),
    "parquet-30-of-30+kd": Recipe(f"{PARQUET} --mask-ratio 0.3 --hard-share 0.3 {TOP} {AT_ONCE} {KD}"),
    "predict-random-half": Recipe(f"{RANDOM} {HALF}"),
    "predict-excess-half": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by excess"),
    "predict-entropy-half": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by entropy"),
    "predict-excess-half+kd": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by excess {KD}"),
    "self": Recipe(SELF),  # the defaults
    "self-rising-50": Recipe(f"{SELF} --hard-share 0.5 {TOP} {RISING}"),
    "self-all": Recipe(f"{SELF} --hard-share 1 {TOP} {AT_ONCE}"),
    "self-paper": Recipe(f"{SELF} --recipe paper"),
    "self-30": Recipe(f"{SELF} --hard-share 0.3 {TOP} {AT_ONCE}"),
    "self-surprisal": Recipe(f"{SELF} --mask-by surprisal"),
    "self-excess-rising-50": Recipe(f"{SELF} --mask-by excess --hard-share 0.5 {TOP} {RISING}"),
    "self+kd": Recipe(f"{SELF} {KD}"),
    "scratch-random": Recipe(RANDOM, scratch=True),
    "scratch-parquet": Recipe(PARQUET, scratch=True),
    "scratch-self": Recipe(SELF, scratch=True),
}
