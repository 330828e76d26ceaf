"""The rows of the screen as flags of train/run.py."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A row of the screen."""

    flags: str  # of train/run.py
    baseline: str = "random"  # the row that it is compared with
    shuffled: bool = False  # the control: it reads scores that were shuffled within each sequence
    scratch: bool = False  # it begins with random weights instead of a trunk
    bert: bool = False  # a BERT of the student's size
    steps: float = 1  # times the steps of the other rows
    again: bool = False  # the noise: other random masks on the same data

    @property
    def reads_scores(self) -> bool:
        """Whether it needs the scores of the shards, for its masks or to distil."""
        return "--entropy-source parquet" in self.flags or "--distill" in self.flags

    @property
    def described(self) -> str:
        """The flags, and what else is different."""
        notes = [f"{self.steps} times the steps"] * (self.steps != 1) + ["shuffled scores"] * self.shuffled
        return ", ".join([self.flags, *notes, *["other masks"] * self.again])


AT_ONCE = "--mask-warmup 0 --mask-ramp 0"  # the trunk is the warm-up
RISING = "--mask-warmup 0 --mask-ramp 1"
# the rest of the default recipe (a ramp of 0.3 / 0.7), if the trunk has 30 % of the steps
DEFAULT = "--mask-warmup 0 --mask-ramp 0.4286"
KD = "--distill-weight 0.5"
ADAMW = "--entropy-source random --mask-ratio 0.15 --optim adamw_torch_fused --learning-rate"


def flags_of(name: str, when: str = AT_ONCE) -> str:
    """The flags that a name says, such as parquet-h50-t0.3-r30+kd. Unless it is late or rising, ``when`` ends them.

    h is the hard share and r the mask ratio in percent (15 where there is none), t the temperature.
    """
    numbers = dict(re.findall(r"-([hrt])([\d.]+)", name))
    flags = [f"--entropy-source {re.split('[-+]', name)[0]} --mask-ratio {int(numbers.get('r', 15)) / 100:g}"]
    if "h" in numbers:
        flags += [f"--hard-share {int(numbers['h']) / 100:g} --mask-temperature {numbers['t']}"]
        if "-late" not in name and when:  # late: the warm-up and the ramp of the defaults
            flags += [RISING if "-rising" in name else when]
    return " ".join([*flags, KD] if name.endswith("+kd") else flags)


def scratch(flags: str, baseline: str = "scratch-random", bert: bool = False) -> Recipe:
    """A row from random weights. Its warm-up and ramp are the defaults."""
    return Recipe(flags, baseline=baseline, scratch=True, bert=bert)


# rows whose names say their flags: from a trunk, and from random weights
NAMED = """
    random random-r30 random-r40 random+kd random-r30+kd
    parquet-h30-t0 parquet-h50-t0-rising parquet-h30-t1 parquet-h30-t1-late parquet-h50-t0.3
    parquet-h100-t0.3 parquet-h100-t0.5 parquet-h100-t1
    parquet-h30-t1-late-r30 parquet-h50-t0.3-r30
    parquet-h30-t1-late+kd parquet-h30-t1-late-r30+kd parquet-h50-t0.3-r30+kd
    self-h50-t0-rising self-h30-t1 self-h30-t1-late self-h50-t0.3 self-h100-t0.5 self-h100-t1
    self-h30-t1-late+kd
"""
SCRATCH = """
    random random-r30 parquet-h30-t1 parquet-h50-t0.3 parquet-h100-t0.5 self-h30-t1 self-h50-t0.3 self-h100-t0.5
"""
RECIPES = {
    **{name: Recipe(flags_of(name)) for name in NAMED.split()},
    "random-again": Recipe(flags_of("random"), again=True),
    "random-mask-only": Recipe(f"{flags_of('random')} --corruption mask-only"),
    "random+kd-half": Recipe(f"{flags_of('random+kd')} --distill-positions 0.5"),
    "random+kd-0.8": Recipe(f"{flags_of('random')} --distill-weight 0.8"),
    "parquet-paper": Recipe("--entropy-source parquet --recipe paper"),
    "parquet-h50-t0-rising-shuffled": Recipe(flags_of("parquet-h50-t0-rising"), shuffled=True),
    "predict-random": Recipe(f"{flags_of('random-r30')} --predict-ratio 0.15"),
    "predict-excess": Recipe(f"{flags_of('parquet-r30')} --hard-share 0 --predict-ratio 0.15 --predict-by excess"),
    "self-paper": Recipe("--entropy-source self --recipe paper"),
    # the defaults: nothing else is set
    "parquet": Recipe("--entropy-source parquet", baseline="random-r30"),
    "self": Recipe("--entropy-source self", baseline="random-r30"),
    "random-r30-again": Recipe(flags_of("random-r30"), baseline="random-r30", again=True),
    # the study (docs/STUDY.md)
    "random-r30-long": Recipe(flags_of("random-r30"), baseline="random-r30", steps=1.57),
    "study-parquet": Recipe(f"--entropy-source parquet {DEFAULT}", baseline="random-r30"),
    "study-self": Recipe(f"--entropy-source self {DEFAULT}", baseline="random-r30"),
    "study-parquet+kd": Recipe(f"--entropy-source parquet {DEFAULT} {KD}", baseline="random-r30"),
    "study-self+kd": Recipe(f"--entropy-source self {DEFAULT} {KD}", baseline="random-r30"),
    "study-parquet-shuffled": Recipe(f"--entropy-source parquet {DEFAULT}", baseline="random-r30", shuffled=True),
    "scratch-parquet": scratch("--entropy-source parquet", baseline="scratch-random-r30"),
    "scratch-self": scratch("--entropy-source self", baseline="scratch-random-r30"),
    "scratch-parquet+kd": scratch(f"--entropy-source parquet {KD}", baseline="scratch-random-r30"),
    **{f"scratch-{name}": scratch(flags_of(name, when="")) for name in SCRATCH.split()},
    "scratch-bert-adamw-1e-3": scratch(f"{ADAMW} 1e-3", bert=True),
    **{f"scratch-adamw-{rate}": scratch(f"{ADAMW} {rate}") for rate in ("1e-3", "2e-3", "4e-3", "8e-3")},
    **{f"scratch-muon-{rate}": scratch(f"{flags_of('random')} --muon-learning-rate {rate}") for rate in (0.01, 0.04)},
}

# of a screen that names none
ROWS = tuple(name for name, recipe in RECIPES.items() if not (recipe.scratch or name.startswith("study-")))
