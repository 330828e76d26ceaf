#!/usr/bin/env python3
"""Which masking recipe helps: short paired runs from common trunks, and a table of their differences.

    python bench/screen.py --articles articles.parquet --held-out ids.txt --output runs/screen
    python bench/screen.py … --size mini --rows random,parquet,self --trunks 5 --blimp DATA --glue GLUE

A trunk is a student trained with random masks at a constant learning rate. From each trunk every recipe
(bench/recipes.py) goes on for some steps while the rate falls to 0, on the same data in the same order. A row of the
table is the mean over trunks of (recipe - baseline), with its 95 % interval by the paired t. Baselines mask at random.
One row reads shuffled scores: if it differs from random by more than its interval, suspect the screen.

Every step is a command of this project; its log in OUTPUT/logs begins with the command. The same line skips what is
done, so it resumes a screen. Prints the table, and as the last line the same as one JSON object; both are in OUTPUT too.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import polars as pl

from bench.commands import new_parser, run_logged
from bench.recipes import LENGTH, RECIPES, ROWS, SIZES
from bench.shuffle import shuffle_scores
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import UsageError, one_line
from entropy_masking.models.checkpoints import local_checkpoint
from glue.files import find_file, read_file
from glue.intervals import estimate
from glue.tables import difference, markdown
from glue.tasks import TASKS
from train.arguments import LEARNING_RATES
from train.flags import MUON

TUNED = {"sst2": "", "qqp": "", "mnli_matched": "_matched", "qnli": ""}  # with the ending of their dev file
COMMON_MASKS = ("--entropy-source", "random", "--mask-ratio", 0.15)  # of trunks and of the reference
TUNING = ("--learning-rate", 1e-3, "--epochs", 3, "--drop-overlap")  # as for the results in docs/RECIPES.md
COLUMNS = {  # heading of the table: measures whose mean it shows
    "all tokens": ["loss"],
    "easiest 10 %": ["decile_1"],
    "hardest 10 %": ["decile_10"],
    "hardest 30 %": ["decile_8", "decile_9", "decile_10"],
    "BLiMP": ["blimp"],
    "GLUE": ["glue"],
}

Row = dict[str, dict[int, float]]  # measures of a recipe, by trunk


def main() -> None:
    args = parse()
    screen = Screen(args)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        screen.split_articles()
        screen.prepare()
        if not all(RECIPES[name].scratch for name in args.rows):
            list(pool.map(screen.train_trunk, range(1, args.trunks + 1)))
        runs = [(name, trunk) for trunk in range(1, args.trunks + 1) for name in args.rows]
        list(pool.map(lambda run: screen.train_and_test(*run), runs))
        if args.glue:
            screen.split_tasks()
            list(pool.map(lambda run: screen.tune(*run), runs))
    finally:  # what is running ends
        pool.shutdown(cancel_futures=True)
    screen.report()


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--articles", required=True, help="Parquet file of the texts, with the columns id and text")
    add("--held-out", required=True, help="file with the ids of the held-out articles, one per line")
    add("--output", required=True, help="directory for all results")
    add("--size", choices=SIZES, default="tiny", help="(default: tiny)")
    add("--rows", default=",".join(ROWS), help="names of bench/recipes.py, by comma (default: its ROWS)")
    add("--trunks", type=positive, default=3, help="number of trunks, each with its own seed (default: 3)")
    add("--jobs", type=positive, default=2, help="runs at once (default: 2)")
    reference = "model with the screen's tokenizer that scores the text (default: one is trained on the same articles)"
    add("--reference", help=reference)
    add("--blimp", help="directory with blimp/blimp.parquet: zero-shot accuracy of every run")
    add("--glue", help=f"directory of GLUE tasks: fine-tune every run on some training rows of {', '.join(TUNED)}")
    args = parser.parse_args()
    args.rows = list(dict.fromkeys(args.rows.split(",")))
    if unknown := [name for name in args.rows if name not in RECIPES]:
        raise UsageError(f"--rows names {unknown[0]!r}, which is none of {', '.join(RECIPES)}")
    for name in list(args.rows):
        while (name := RECIPES[name].baseline) not in args.rows:
            args.rows.insert(0, name)
    # absolute, because commands run in another directory
    args.reference = args.reference and local_checkpoint(args.reference)
    args.blimp, args.glue = (path and Path(path).absolute() for path in (args.blimp, args.glue))
    if args.blimp:
        find_file(args.blimp / "blimp", "blimp")
    for name in TUNED if args.glue else ():
        training_file(args.glue, name)
    return args


def training_file(data: Path, name: str) -> Path:
    """The training rows of a task. Raises UsageError if there is no such file."""
    return find_file(data / TASKS[name].directory, "train", "train_subset")


class Screen:
    """The steps of a screen, in their order."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.output = Path(args.output).absolute()
        self.run = partial(run_logged, self.output)

    def split_articles(self) -> None:
        """Write the texts of each part. Raises UsageError for a file that cannot be read, or lacks ids or articles."""
        try:
            articles = pl.read_parquet(self.args.articles, glob=False, columns=["id", "text"]).cast({"id": pl.String})
            held_out = Path(self.args.held_out).read_text().split()
        except (OSError, UnicodeError, pl.exceptions.PolarsError) as error:
            raise UsageError(f"--articles or --held-out cannot be read: {one_line(error)}") from None
        if missing := sorted(set(held_out) - set(articles["id"])):
            raise UsageError(f"--held-out names {missing[0]!r}, which is not an id in --articles")
        training = articles.filter(~pl.col("id").is_in(held_out))
        first = self.size.branch_documents
        if not held_out or len(training) <= first:
            raise UsageError(f"--held-out must name at least one article and leave more than {first} for training")
        parts = {"heldout": articles.filter(pl.col("id").is_in(held_out)), "articles": training}
        parts |= {"branches": training[:first], "trunks": training[first:]}
        for name, part in parts.items():
            storage.write_bytes(str(self.output / f"{name}.jsonl"), part.write_ndjson().encode())

    def prepare(self) -> None:
        """Tokenizer, tokens, the reference and its scores."""
        of, run = self.output.joinpath, self.run
        vocabulary = ("--vocab-size", self.size.vocab_size, "--output", of("tokenizer"))
        uncased = ("--lowercase", "--strip-accents")  # as for the results in docs/RECIPES.md
        run("tokenizer", "pipeline/tokenizer.py", "--corpus", of("articles.jsonl"), *uncased, *vocabulary)
        score = ("pipeline/score.py", "--backend", "local", "--cpus-per-worker", 1, "--sequence-length", LENGTH)
        score += ("--shard-tokens", 1 << 18 if self.size.vocab_size > 1000 else 1 << 12)
        for name in ("trunks", "articles"):
            files = ("--corpus", of(f"{name}.jsonl"), "--output", of(f"{name}-tokens"))
            run(f"{name}-tokens", *score, *files, "--teacher", "none", "--tokenizer", of("tokenizer"))
        reference = self.args.reference or of("reference")
        if not self.args.reference:
            flags = ("--shards", of("articles-tokens"), "--model", self.size.reference, "--eval-fraction", 0)
            self.train("reference", 1, self.size.reference_steps, *flags, *COMMON_MASKS)
        for name in ("heldout", "branches"):
            files = ("--corpus", of(f"{name}.jsonl"), "--output", of(name))
            run(f"{name}-scores", *score, *files, "--teacher", reference)
        if any(RECIPES[name].shuffled for name in self.args.rows):
            shuffle_scores(str(of("branches")), str(of("shuffled")))

    def train(self, name: str, seed: int, steps: int, *flags: object) -> None:
        """Run train/run.py, which evaluates at the end only. A ``--seed`` in the flags wins over ``seed``."""
        settings = ("--max-steps", steps, "--per-device-train-batch-size", self.size.batch, "--eval-strategy", "no")
        seeds, output = ("--data-seed", seed, "--seed", seed), ("--output-dir", self.output / name)
        self.run(name.replace("/", "-"), "train/run.py", *settings, *seeds, *flags, *output)

    def train_trunk(self, trunk: int) -> None:
        shards = ("--shards", self.output / "trunks-tokens", "--eval-shards", self.output / "heldout")
        flags = ("--model", self.size.student, "--lr-scheduler-type", "constant_with_warmup")
        self.train(f"trunks/{trunk}", trunk, self.size.trunk_steps, *shards, *flags, *COMMON_MASKS)

    def train_and_test(self, name: str, trunk: int) -> None:
        """One recipe from one trunk, and its zero-shot accuracy."""
        recipe, student = RECIPES[name], self.size.student
        shards = self.output / ("shuffled" if recipe.shuffled else "branches")
        flags = ["--shards", shards, "--eval-shards", self.output / "heldout", *recipe.flags.split()]
        steps = self.size.branch_steps
        if recipe.scratch:
            flags += ["--model", f"bert-{student}" if recipe.bert else student]
            steps = self.size.scratch_steps
        else:  # a model by path would get AdamW's defaults
            flags += ["--model", self.output / "trunks" / str(trunk), "--optim", MUON]
            flags += ["--learning-rate", LEARNING_RATES[MUON][student], "--warmup-steps", 0.05]
        self.train(f"branches-{trunk}/{name}", trunk, steps, *flags, "--save-strategy", "no")
        if self.args.blimp:
            blimp = ("--tasks", "blimp", "--data", self.args.blimp, "--limit-pairs", self.size.pairs)
            self.glue("blimp", name, trunk, *blimp)

    def glue(self, kind: str, name: str, trunk: int, *flags: object) -> None:
        model, output = self.output / f"branches-{trunk}" / name, self.output / f"{kind}-{trunk}" / name
        self.run(f"{kind}-{trunk}-{name}", "glue/run.py", "--model", model, *flags, "--output", output)

    def split_tasks(self) -> None:
        """Split the training rows into training and dev rows, so that the real dev rows stay unseen."""
        for name, ending in TUNED.items():
            task, wanted = TASKS[name], self.size.train_rows + self.size.dev_rows
            directory = self.output / "glue-data" / task.directory
            if (directory / f"dev{ending}.jsonl").exists():
                continue
            rows = read_file(training_file(self.args.glue, name))
            rows = rows.sample(min(wanted, len(rows)), shuffle=True, seed=0)
            # the dev rows come last, because they mark the task as done
            for part, own in (("train", rows[self.size.dev_rows :]), (f"dev{ending}", rows[: self.size.dev_rows])):
                storage.write_bytes(str(directory / f"{part}.jsonl"), own.write_ndjson().encode())

    def tune(self, name: str, trunk: int) -> None:
        self.glue("glue", name, trunk, "--tasks", ",".join(TUNED), "--data", self.output / "glue-data", *TUNING)

    def report(self) -> None:
        """Print the table and write it."""
        rows = {name: self.row(name) for name in self.args.rows}
        text = table(rows)
        (self.output / "table.md").write_text(text, encoding="utf-8")
        settings = {"size": asdict(self.size), "trunks": self.args.trunks}
        report = {"settings": settings, "recipes": {name: RECIPES[name].flags for name in rows}, "rows": rows}
        storage.write_json(str(self.output / "table.json"), report)
        print(f"{text}\n{json.dumps(report)}")

    def row(self, name: str) -> Row:
        row: Row = {}
        for trunk in range(1, self.args.trunks + 1):
            summary = json.loads((self.output / f"branches-{trunk}" / name / "summary.json").read_text())
            values = {"loss": summary["eval_loss"], "training_flops": summary["training_flops"]}
            values["flops"] = summary["training_flops"] + summary["scoring_flops"]
            deciles = summary["eval_loss_by_entropy_decile"] or []
            values |= {f"decile_{number}": loss for number, loss in enumerate(deciles, 1)}
            for kind in ("blimp", "glue"):
                if getattr(self.args, kind):
                    values[kind] = mean_score(self.output / f"{kind}-{trunk}" / name)
            for measure, value in values.items():
                row.setdefault(measure, {})[trunk] = value
        return row


def mean_score(directory: Path) -> float:
    """Mean of the scores in a directory of glue/run.py, in percent."""
    return float(np.mean([json.loads(file.read_text())["score"] for file in sorted(directory.glob("*.json"))]))


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown: a baseline's measures, and the differences of the others to their baseline."""
    columns = {heading: own for heading, own in COLUMNS.items() if all(own[0] in row for row in rows.values())}
    lines = []
    for name, row in rows.items():
        minus = RECIPES[name].baseline
        baseline = rows[minus]
        if name == minus:
            minus, texts = "", [f"{by_trunk(row, own).mean():.3f}" for own in columns.values()]
        else:
            differences = [by_trunk(row, own) - by_trunk(baseline, own) for own in columns.values()]
            texts = [difference(asdict(estimate(values.tolist())), digits=3) for values in differences]
        training, scored = by_trunk(row, ["training_flops"]).mean(), by_trunk(row, ["flops"]).mean()
        base = by_trunk(baseline, ["flops"]).mean()
        flops = f"{training / base:.2f}, {scored / base:.2f}"
        lines.append([name, minus, str(len(row["loss"])), *texts, flops])
    return markdown(["recipe", "baseline", "n", *columns, "FLOPs, with scoring"], lines, words=2) + "\n"


def by_trunk(row: Row, measures: list[str]) -> np.ndarray:
    """The mean of some measures [trunks]."""
    return np.mean([list(row[measure].values()) for measure in measures], axis=0)


if __name__ == "__main__":
    console.run(main)
