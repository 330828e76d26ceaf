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
        baseline: the row that it is compared with.
        scratch: trained from random weights instead of from a trunk.
        bert: a BERT of the student's size.
    """

    flags: str
    baseline: str = "random"
    shuffled: bool = False
    scratch: bool = False
    bert: bool = False


AT_ONCE = "--mask-warmup 0 --mask-ramp 0"  # the trunk is the warm-up
RISING = "--mask-warmup 0 --mask-ramp 1"
HALF = "--predict-ratio 0.15"
KD = "--distill-weight 0.5"
ADAMW = "--optim adamw_torch_fused --learning-rate"


def source(name: str, percent: int = 15) -> str:
    """Flags of an entropy source, and of the mask ratio in percent."""
    return f"--entropy-source {name} --mask-ratio {percent / 100:g}"


def hard(percent: int, temperature: float, when: str = AT_ONCE) -> str:
    """Flags of a hard share in percent, and of the temperature that samples it."""
    return f"--hard-share {percent / 100:g} --mask-temperature {temperature:g} {when}".rstrip()


def scratch(flags: str, baseline: str = "scratch-random", bert: bool = False) -> Recipe:
    """A row from random weights. Its warm-up and ramp are the defaults."""
    return Recipe(flags, baseline=baseline, scratch=True, bert=bert)


RANDOM, PARQUET, SELF = source("random"), source("parquet"), source("self")
RANDOM_30, PARQUET_30, SELF_30 = source("random", 30), source("parquet", 30), source("self", 30)
MILD = hard(30, 1, when="")  # with the warm-up and the ramp of the defaults

# h: hard share in percent, t: temperature, r: mask ratio in percent, 15 where none is named
RECIPES = {
    "random": Recipe(RANDOM),
    "random-again": Recipe(f"{RANDOM} --seed 1000"),  # the same data order, other masks: the noise
    "random-r30": Recipe(RANDOM_30),
    "random-r40": Recipe(source("random", 40)),
    "random-mask-only": Recipe(f"{RANDOM} --corruption mask-only"),
    "random+kd": Recipe(f"{RANDOM} {KD}"),
    "random+kd-half": Recipe(f"{RANDOM} {KD} --distill-positions 0.5"),
    "random+kd-0.8": Recipe(f"{RANDOM} --distill-weight 0.8"),
    "random-r30+kd": Recipe(f"{RANDOM_30} {KD}"),
    "parquet-paper": Recipe("--entropy-source parquet --recipe paper"),
    "parquet-h30-t0": Recipe(f"{PARQUET} {hard(30, 0)}"),
    "parquet-h50-t0-rising": Recipe(f"{PARQUET} {hard(50, 0, RISING)}"),
    "parquet-h50-t0-rising-shuffled": Recipe(f"{PARQUET} {hard(50, 0, RISING)}", shuffled=True),
    "parquet-h30-t1": Recipe(f"{PARQUET} {hard(30, 1)}"),
    "parquet-h30-t1-late": Recipe(f"{PARQUET} {MILD}"),
    "parquet-h50-t0.3": Recipe(f"{PARQUET} {hard(50, 0.3)}"),
    "parquet-h100-t0.3": Recipe(f"{PARQUET} {hard(100, 0.3)}"),
    "parquet-h100-t0.5": Recipe(f"{PARQUET} {hard(100, 0.5)}"),
    "parquet-h100-t1": Recipe(f"{PARQUET} {hard(100, 1)}"),
    "parquet-h30-t1-late-r30": Recipe(f"{PARQUET_30} {MILD}"),
    "parquet-h50-t0.3-r30": Recipe(f"{PARQUET_30} {hard(50, 0.3)}"),
    "parquet-h100-t0.5-r30": Recipe(f"{PARQUET_30} {hard(100, 0.5)}"),
    "parquet-h30-t1-late+kd": Recipe(f"{PARQUET} {MILD} {KD}"),
    "parquet-h30-t1-late-r30+kd": Recipe(f"{PARQUET_30} {MILD} {KD}"),
    "parquet-h50-t0.3-r30+kd": Recipe(f"{PARQUET_30} {hard(50, 0.3)} {KD}"),
    "predict-random": Recipe(f"{RANDOM_30} {HALF}"),
    "predict-excess": Recipe(f"{PARQUET_30} --hard-share 0 {HALF} --predict-by excess"),
    "predict-excess+kd": Recipe(f"{PARQUET_30} --hard-share 0 {HALF} --predict-by excess {KD}"),
    "predict-entropy": Recipe(f"{PARQUET_30} --hard-share 0 {HALF} --predict-by entropy"),
    "self-paper": Recipe("--entropy-source self --recipe paper"),
    "self-h50-t0-rising": Recipe(f"{SELF} {hard(50, 0, RISING)}"),
    "self-excess-h50-t0-rising": Recipe(f"{SELF} --mask-by excess {hard(50, 0, RISING)}"),
    "self-h30-t1": Recipe(f"{SELF} {hard(30, 1)}"),
    "self-h30-t1-late": Recipe(f"{SELF} {MILD}"),
    "self-h50-t0.3": Recipe(f"{SELF} {hard(50, 0.3)}"),
    "self-h100-t0.5": Recipe(f"{SELF} {hard(100, 0.5)}"),
    "self-h100-t1": Recipe(f"{SELF} {hard(100, 1)}"),
    "self-h50-t0.3-r30": Recipe(f"{SELF_30} {hard(50, 0.3)}"),
    "self-h30-t1-late+kd": Recipe(f"{SELF} {MILD} {KD}"),
    # the defaults: nothing else is set
    "parquet": Recipe("--entropy-source parquet", baseline="random-r30"),
    "self": Recipe("--entropy-source self", baseline="random-r30"),
    "parquet+kd": Recipe(f"--entropy-source parquet {KD}", baseline="random-r30+kd"),
    "self+kd": Recipe(f"--entropy-source self {KD}", baseline="random-r30+kd"),
    "scratch-random": scratch(RANDOM),
    "scratch-random-again": scratch(f"{RANDOM} --seed 1000"),  # other initial weights too
    "scratch-random-r30": scratch(RANDOM_30),
    "scratch-parquet-h30-t1": scratch(f"{PARQUET} {MILD}"),
    "scratch-parquet-h50-t0.3": scratch(f"{PARQUET} {hard(50, 0.3, when='')}"),
    "scratch-parquet-h100-t0.5": scratch(f"{PARQUET} {hard(100, 0.5, when='')}"),
    "scratch-self-h30-t1": scratch(f"{SELF} {MILD}"),
    "scratch-self-h50-t0.3": scratch(f"{SELF} {hard(50, 0.3, when='')}"),
    "scratch-self-h100-t0.5": scratch(f"{SELF} {hard(100, 0.5, when='')}"),
    "scratch-parquet": scratch("--entropy-source parquet", baseline="scratch-random-r30"),
    "scratch-self": scratch("--entropy-source self", baseline="scratch-random-r30"),
    "scratch-stable-decay": scratch(f"{RANDOM} --lr-scheduler-type warmup_stable_decay"),
    "scratch-bert-adamw-1e-3": scratch(f"{RANDOM} {ADAMW} 1e-3", bert=True),
    **{f"scratch-adamw-{rate}": scratch(f"{RANDOM} {ADAMW} {rate}") for rate in ("1e-3", "2e-3", "4e-3")},
    **{f"scratch-muon-{rate}": scratch(f"{RANDOM} --muon-learning-rate {rate}") for rate in (0.01, 0.04)},
}

ROWS = tuple(name for name, recipe in RECIPES.items() if not recipe.scratch)  # of a screen that names none
