"""The screen as data: its sizes, and its rows as flags of train/run.py."""

from __future__ import annotations

from dataclasses import dataclass

LENGTH = 128  # tokens of a sequence


@dataclass(frozen=True)
class Size:
    """How large a screen is."""

    student: str  # a preset of train/run.py, as the next
    reference: str
    vocab_size: int  # of the tokenizer
    reference_steps: int
    trunk_steps: int
    branch_steps: int
    scratch_steps: int
    batch: int  # sequences a step
    branch_documents: int  # that the reference scores and the branches read; trunks read the others
    pairs: int  # BLiMP's, of each phenomenon
    train_rows: int  # of each task of GLUE, as the next
    dev_rows: int


SIZES = {
    "trial": Size("tiny", "tiny", 128, 4, 4, 4, 4, 4, 40, 1, 32, 16),  # shows that it works, and nothing else
    "tiny": Size("tiny", "mini", 8192, 3200, 1500, 400, 732, 32, 850, 100, 4000, 2000),
    "mini": Size("mini", "small", 8192, 6400, 1500, 400, 732, 32, 850, 100, 4000, 2000),
}


@dataclass(frozen=True)
class Recipe:
    """A row of the screen."""

    flags: str  # of train/run.py that set it apart
    shuffled: bool = False  # the control: it reads scores that were shuffled within each row
    scratch: bool = False  # trained from random weights instead of a trunk, and compared with ``scratch-random``
    bert: bool = False  # a BERT of the student's size


AT_ONCE = "--mask-warmup 0 --mask-ramp 0"  # the trunk is the warm-up
RISING = "--mask-warmup 0 --mask-ramp 1"
HALF = "--mask-ratio 0.3 --predict-ratio 0.15"
KD, R30 = "--distill-weight 0.5", "--mask-ratio 0.3"
ADAMW = "--optim adamw_torch_fused --learning-rate"
RANDOM, PARQUET, SELF = (f"--entropy-source {source}" for source in ("random", "parquet", "self"))


def hard(percent: int, temperature: float, when: str = AT_ONCE) -> str:
    """Flags of a hard share in percent, and of the temperature that samples it."""
    return f"--hard-share {percent / 100:g} --mask-temperature {temperature:g} {when}"


# h: hard share in percent, t: temperature, r: mask ratio in percent; without h and t, those of the defaults
RECIPES = {
    "random": Recipe(RANDOM),
    "random-again": Recipe(f"{RANDOM} --seed 1000"),  # the same data order, other masks: the noise
    "random-r30": Recipe(f"{RANDOM} {R30}"),
    "random-r40": Recipe(f"{RANDOM} --mask-ratio 0.4"),
    "random-mask-only": Recipe(f"{RANDOM} --corruption mask-only"),
    "random+kd": Recipe(f"{RANDOM} {KD}"),
    "random+kd-half": Recipe(f"{RANDOM} {KD} --distill-positions 0.5"),
    "random+kd-0.8": Recipe(f"{RANDOM} --distill-weight 0.8"),
    "random-r30+kd": Recipe(f"{RANDOM} {R30} {KD}"),
    "parquet": Recipe(PARQUET),
    "parquet-paper": Recipe(f"{PARQUET} --recipe paper"),
    "parquet-h30-t0": Recipe(f"{PARQUET} {hard(30, 0)}"),
    "parquet-h50-t0-rising": Recipe(f"{PARQUET} {hard(50, 0, RISING)}"),
    "parquet-h50-t0-rising-shuffled": Recipe(f"{PARQUET} {hard(50, 0, RISING)}", shuffled=True),
    "parquet-h30-t1": Recipe(f"{PARQUET} {hard(30, 1)}"),
    "parquet-h50-t0.3": Recipe(f"{PARQUET} {hard(50, 0.3)}"),
    "parquet-h100-t0.3": Recipe(f"{PARQUET} {hard(100, 0.3)}"),
    "parquet-h100-t0.5": Recipe(f"{PARQUET} {hard(100, 0.5)}"),
    "parquet-h100-t1": Recipe(f"{PARQUET} {hard(100, 1)}"),
    "parquet-r30": Recipe(f"{PARQUET} {R30}"),
    "parquet-h100-t0.5-r30": Recipe(f"{PARQUET} {hard(100, 0.5)} {R30}"),
    "parquet+kd": Recipe(f"{PARQUET} {KD}"),
    "parquet-r30+kd": Recipe(f"{PARQUET} {R30} {KD}"),
    "parquet-h100-t0.5-r30+kd": Recipe(f"{PARQUET} {hard(100, 0.5)} {R30} {KD}"),
    "predict-random": Recipe(f"{RANDOM} {HALF}"),
    "predict-excess": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by excess"),
    "predict-excess+kd": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by excess {KD}"),
    "predict-entropy": Recipe(f"{PARQUET} --hard-share 0 {HALF} --predict-by entropy"),
    "self": Recipe(SELF),
    "self-paper": Recipe(f"{SELF} --recipe paper"),
    "self-h50-t0-rising": Recipe(f"{SELF} {hard(50, 0, RISING)}"),
    "self-excess-h50-t0-rising": Recipe(f"{SELF} --mask-by excess {hard(50, 0, RISING)}"),
    "self-h30-t1": Recipe(f"{SELF} {hard(30, 1)}"),
    "self-h50-t0.3": Recipe(f"{SELF} {hard(50, 0.3)}"),
    "self-h100-t0.5": Recipe(f"{SELF} {hard(100, 0.5)}"),
    "self-h100-t1": Recipe(f"{SELF} {hard(100, 1)}"),
    "self+kd": Recipe(f"{SELF} {KD}"),
    "scratch-random": Recipe(RANDOM, scratch=True),
    "scratch-random-again": Recipe(f"{RANDOM} --seed 1000", scratch=True),  # other initial weights too
    "scratch-parquet": Recipe(PARQUET, scratch=True),
    "scratch-self": Recipe(SELF, scratch=True),
    "scratch-parquet-h100-t0.5": Recipe(f"{PARQUET} --hard-share 1 --mask-temperature 0.5", scratch=True),
    "scratch-self-h100-t0.5": Recipe(f"{SELF} --hard-share 1 --mask-temperature 0.5", scratch=True),
    "scratch-random-r30": Recipe(f"{RANDOM} {R30}", scratch=True),
    "scratch-stable-decay": Recipe(f"{RANDOM} --lr-scheduler-type warmup_stable_decay", scratch=True),
    "scratch-bert-adamw-1e-3": Recipe(f"{RANDOM} {ADAMW} 1e-3", scratch=True, bert=True),
    **{f"scratch-adamw-{rate}": Recipe(f"{RANDOM} {ADAMW} {rate}", scratch=True) for rate in ("1e-3", "2e-3", "4e-3")},
    **{f"scratch-muon-{x}": Recipe(f"{RANDOM} --muon-learning-rate {x}", scratch=True) for x in (0.01, 0.04)},
}

ROWS = tuple(name for name, recipe in RECIPES.items() if not recipe.scratch)  # of a screen that names none
