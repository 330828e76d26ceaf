#!/usr/bin/env python3
"""Which masking recipe helps: short paired runs from common trunks, and a table of their differences.

    python bench/screen.py --shards runs/scored --eval-shards runs/heldout --output runs/screen
    python bench/screen.py … --student mini --rows random,parquet,self --trunks 5 --blimp DATA

A trunk is a student trained with random masks at a constant learning rate. From each trunk every recipe
(bench/recipes.py) goes on for some steps while the rate falls to 0, on the same data in the same order. A row of the
table is the mean over trunks of (recipe - baseline), with its 95 % interval by the paired t. Baselines mask at random.
One row reads shuffled scores: if it differs from random by more than its interval, suspect the screen.

Every run is a command of this project, the first line of its log in OUTPUT/logs. The same line skips what is done, so
it resumes a screen. Prints the table, and as the last line the same as one JSON object; both are in OUTPUT too.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.commands import new_parser, run_logged
from bench.recipes import RECIPES, ROWS
from bench.results import measures_of, screen_table
from bench.shuffle import shuffle_scores
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive, positive_float
from entropy_masking.errors import UsageError
from glue.files import find_file
from train.arguments import LEARNING_RATES
from train.options import MUON

BRANCH_SEEDS = 2000  # plus the trunk; with the trunk's own seed, a branch would repeat the trunk's first batches


def main() -> None:
    args = parse()
    screen = Screen(args)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        if any(RECIPES[name].shuffled for name in args.rows):
            shuffle_scores(args.shards, str(screen.output / "shuffled"))
        if not all(RECIPES[name].scratch for name in args.rows):
            list(pool.map(screen.train_trunk, range(1, args.trunks + 1)))
        runs = [(name, trunk) for trunk in range(1, args.trunks + 1) for name in args.rows]
        list(pool.map(lambda run: screen.train_and_test(*run), runs))
    finally:  # waits for the runs in progress, and starts no other
        pool.shutdown(cancel_futures=True)
    screen.report()


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="scored shards, for the rows that read scores")
    add("--eval-shards", required=True, help="scored shards of held-out text, for the losses")
    add("--trunk-shards", help="shards that the trunks and the rows without scores read (default: --shards)")
    add("--output", required=True, help="directory for all results")
    add("--student", choices=LEARNING_RATES[MUON], default="tiny", help="preset of train/run.py (default: tiny)")
    add("--batch", type=positive, default=32, help="sequences of a step (default: 32)")
    add("--trunk-steps", type=positive, default=1500, help="(default: 1500)")
    add("--trunk-mask-ratio", type=positive_float, default=0.15, help="(default: 0.15)")
    add("--branch-steps", type=positive, default=400, help="(default: 400)")
    add("--scratch-steps", type=positive, default=732, help="of a row from random weights (default: 732)")
    add("--rows", default=",".join(ROWS), help="names of bench/recipes.py, by comma (default: its ROWS)")
    add("--trunks", type=positive, default=3, help="number of trunks, each with its own seed (default: 3)")
    add("--jobs", type=positive, default=2, help="runs at once (default: 2)")
    add("--blimp", help="directory with blimp/blimp.parquet: zero-shot accuracy of every run")
    add("--pairs", type=positive, default=100, help="of each phenomenon of BLiMP (default: 100)")
    args = parser.parse_args()
    args.rows = list(dict.fromkeys(args.rows.split(",")))
    if unknown := [name for name in args.rows if name not in RECIPES]:
        raise UsageError(f"--rows names {unknown[0]!r}, which is none of {', '.join(RECIPES)}")
    for name in list(args.rows):
        while (name := RECIPES[name].baseline) not in args.rows:
            args.rows.insert(0, name)
    # absolute, because commands run in another directory
    args.trunk_shards = args.trunk_shards or args.shards
    for name in ("shards", "eval_shards", "trunk_shards", "output", "blimp"):
        if value := getattr(args, name):
            setattr(args, name, storage.absolute(value))
    if args.blimp:
        find_file(Path(args.blimp, "blimp"), "blimp")
    return args


class Screen:
    """The runs of a screen, in their order."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output)
        self.run = partial(run_logged, self.output)

    def train(self, name: str, seed: int, steps: int, *flags: object) -> None:
        """Run train/run.py, which evaluates at the end only. A ``--seed`` in the flags, that of the masks, wins."""
        settings = ("--max-steps", steps, "--per-device-train-batch-size", self.args.batch, "--eval-strategy", "no")
        seeds, output = ("--data-seed", seed, "--seed", seed), ("--output-dir", self.output / name)
        self.run(name.replace("/", "-"), "train/run.py", *settings, *seeds, *flags, *output)

    def train_trunk(self, trunk: int) -> None:
        shards = ("--shards", self.args.trunk_shards, "--eval-shards", self.args.eval_shards)
        flags = ("--model", self.args.student, "--lr-scheduler-type", "constant_with_warmup")
        masks = ("--entropy-source", "random", "--mask-ratio", self.args.trunk_mask_ratio)
        self.train(f"trunks/{trunk}", trunk, self.args.trunk_steps, *shards, *flags, *masks)

    def train_and_test(self, name: str, trunk: int) -> None:
        """One recipe from one trunk, and its zero-shot accuracy."""
        recipe, args = RECIPES[name], self.args
        scored = self.output / "shuffled" if recipe.shuffled else args.shards
        shards = scored if recipe.reads_scores else args.trunk_shards
        flags = ["--shards", shards, "--eval-shards", args.eval_shards, *recipe.flags.split()]
        if recipe.scratch:
            flags += ["--model", f"bert-{args.student}" if recipe.bert else args.student]
        else:  # a model by path would get AdamW's defaults
            flags += ["--model", self.output / "trunks" / str(trunk), "--optim", MUON]
            flags += ["--learning-rate", LEARNING_RATES[MUON][args.student], "--warmup-steps", 0.05]
        steps = round(recipe.steps * (args.scratch_steps if recipe.scratch else args.branch_steps))
        seed = trunk if recipe.scratch else BRANCH_SEEDS + trunk
        flags += ["--seed", seed + BRANCH_SEEDS] if recipe.again else []
        self.train(f"branches-{trunk}/{name}", seed, steps, *flags)
        if args.blimp:
            model, output = (self.output / f"{kind}-{trunk}" / name for kind in ("branches", "blimp"))
            flags = ["--tasks", "blimp", "--data", args.blimp, "--limit-pairs", args.pairs]
            self.run(f"blimp-{trunk}-{name}", "glue/run.py", "--model", model, "--output", output, *flags)

    def report(self) -> None:
        """Print the table and write it."""
        rows = {name: self.row(name) for name in self.args.rows}
        text = screen_table(rows)
        (self.output / "table.md").write_text(text, encoding="utf-8")
        report = {"settings": vars(self.args), "recipes": {name: RECIPES[name].flags for name in rows}, "rows": rows}
        storage.write_json(str(self.output / "table.json"), report)
        print(f"{text}\n{json.dumps(report)}")

    def row(self, name: str) -> dict[str, dict[str, float]]:
        """The measures of a recipe, each by trunk."""
        row: dict[str, dict[str, float]] = {}
        for trunk in map(str, range(1, self.args.trunks + 1)):
            for measure, value in measures_of(self.output, name, trunk).items():
                row.setdefault(measure, {})[trunk] = value
        return row


if __name__ == "__main__":
    console.run(main)
