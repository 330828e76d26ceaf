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
        reference_steps, trunk_steps, branch_steps, scratch_steps, batch: steps, and sequences a step.
        branch_documents: documents that the reference scores and the branches read; trunks read the others.
        pairs: BLiMP's, of each phenomenon.
        train_rows, dev_rows: of each task of GLUE.
    """

    student: str
    reference: str
    vocab_size: int
    reference_steps: int
    trunk_steps: int
    branch_steps: int
    scratch_steps: int
    batch: int
    branch_documents: int
    pairs: int
    train_rows: int
    dev_rows: int


SIZES = {
    "trial": Size("tiny", "tiny", 128, 4, 4, 4, 4, 4, 40, 1, 32, 16),  # shows that it works, and nothing else
    "tiny": Size("tiny", "mini", 8192, 3200, 1500, 400, 732, 32, 850, 100, 4000, 2000),
    "mini": Size("mini", "small", 8192, 6400, 1500, 400, 732, 32, 850, 100, 4000, 2000),
}


@dataclass(frozen=True)
class Recipe:
    """A row of the screen.

    Attributes:
        flags: of train/run.py that set it apart.
        shuffled: it reads scores that were shuffled within each row: the control.
        scratch: trained from random weights instead of from a trunk, and compared with ``scratch-random``.
        bert: a BERT of the student's size.
    """

    flags: str
    shuffled: bool = False
    scratch: bool = False
    bert: bool = False


AT_ONCE = "--mask-warmup 0 --mask-ramp 0"  # the trunk is the warm-up
RISING = "--mask-warmup 0 --mask-ramp 1"
TOP = "--mask-temperature 0"
HALF = "--mask-ratio 0.3 --predict-ratio 0.15"
KD = "--distill-weight 0.5"
ADAMW = "--optim adamw_torch_fused --learning-rate"
RANDOM, PARQUET, SELF = (f"--entropy-source {source}" for source in ("random", "parquet", "self"))

RECIPES = {
    "random": Recipe(RANDOM),
    "random-again": Recipe(f"{RANDOM} --seed 1000"),  # the same data order, other masks: the noise
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
    "parquet-h100-t0.3": Recipe(f"{PARQUET} --hard-share 1 --mask-temperature 0.3 {AT_ONCE}"),
    "parquet-h100-t1": Recipe(f"{PARQUET} --hard-share 1 {AT_ONCE}"),
    "parquet-h50-t0.3": Recipe(f"{PARQUET} --hard-share 0.5 --mask-temperature 0.3 {AT_ONCE}"),
    "parquet-h100-t0.5-r30": Recipe(f"{PARQUET} --hard-share 1 --mask-temperature 0.5 {AT_ONCE} --mask-ratio 0.3"),
    "parquet-h100-t0.5-r30+kd": Recipe(
        f"{PARQUET} --hard-share 1 --mask-temperature 0.5 {AT_ONCE} --mask-ratio 0.3 {KD}"
    ),
    "parquet-sampled-30": Recipe(f"{PARQUET} --hard-share 0.3 {AT_ONCE}"),
    "parquet-30-surprisal": Recipe(f"{PARQUET} --hard-share 0.3 {TOP} --mask-by surprisal {AT_ONCE}"),
    "parquet-30-of-30": Recipe(f"{PARQUET} --mask-ratio 0.3 --hard-share 0.3 {TOP} {AT_ONCE}"),
    "parquet-of-30": Recipe(f"{PARQUET} --mask-ratio 0.3"),
    "parquet+kd": Recipe(f"{PARQUET} {KD}"),
    "parquet-of-30+kd": Recipe(f"{PARQUET} --mask-ratio 0.3 {KD}"),
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
    "self-h100-t0.5": Recipe(f"{SELF} --hard-share 1 --mask-temperature 0.5 {AT_ONCE}"),
    "self-h100-t1": Recipe(f"{SELF} --hard-share 1 {AT_ONCE}"),
    "self-h50-t0.3": Recipe(f"{SELF} --hard-share 0.5 --mask-temperature 0.3 {AT_ONCE}"),
    "self-of-30": Recipe(f"{SELF} --mask-ratio 0.3"),
    "self-sampled-30": Recipe(f"{SELF} --hard-share 0.3 {AT_ONCE}"),
    "self+kd": Recipe(f"{SELF} {KD}"),
    "scratch-random": Recipe(RANDOM, scratch=True),
    "scratch-parquet": Recipe(PARQUET, scratch=True),
    "scratch-self": Recipe(SELF, scratch=True),
    "scratch-parquet-h100-t0.5": Recipe(f"{PARQUET} --hard-share 1 --mask-temperature 0.5", scratch=True),
    "scratch-self-h100-t0.5": Recipe(f"{SELF} --hard-share 1 --mask-temperature 0.5", scratch=True),
    "scratch-random-again": Recipe(f"{RANDOM} --seed 1000", scratch=True),
    "scratch-stable-decay": Recipe(f"{RANDOM} --lr-scheduler-type warmup_stable_decay", scratch=True),
    "scratch-long-warmup": Recipe(f"{RANDOM} --warmup-steps 0.2", scratch=True),
    "scratch-bert-adamw-1e-3": Recipe(f"{RANDOM} {ADAMW} 1e-3", scratch=True, bert=True),
}
RECIPES |= {
    f"scratch-adamw-{rate}": Recipe(f"{RANDOM} {ADAMW} {rate}", scratch=True) for rate in ("1e-3", "2e-3", "4e-3")
}
RECIPES |= {
    f"scratch-muon-{rate}": Recipe(f"{RANDOM} --muon-learning-rate {rate}", scratch=True) for rate in (0.01, 0.04)
}

# the rows of a screen that names none
ROWS = (
    *("random", "random-again", "random-30", "random-40", "random-only-mask"),
    *("random+kd", "random+kd-0.8", "random+kd-hard-half", "random-30+kd"),
    *("parquet", "parquet-paper", "parquet-30", "parquet-rising-50", "parquet-rising-50-shuffled"),
    *("parquet-sampled", "parquet-sampled-30", "parquet-of-30", "parquet+kd", "parquet-of-30+kd"),
    *("predict-random-half", "predict-excess-half"),
    *("self", "self-sampled-30", "self-rising-50", "self-paper", "self+kd"),
)
