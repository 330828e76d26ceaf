#!/usr/bin/env python3
"""Which masking recipe helps: short paired runs from common trunks, and a table of their differences.

    python bench/screen.py --articles articles.parquet --held-out ids.txt --output runs/screen
    python bench/screen.py … --rows random,parquet,self --trunks 5 --blimp DATA
    python bench/screen.py … --size mini --rows random,parquet,random-r30+kd --glue GLUE

A trunk is a student trained with random masks at a constant learning rate. Every recipe (bench/recipes.py) continues
each trunk for some steps while the rate falls to 0, on the same data in the same order. A row of the table is the mean
over trunks of (recipe - random), with its 95 % interval by the paired t. Recipes from random weights are compared with
random masks from random weights. One row reads scores that were shuffled within each sequence: if it differs from
random by more than its interval, suspect the screen.

Every step is a command of this project (OUTPUT/commands.sh, OUTPUT/logs). Finished steps are skipped, so the same
command continues after a break. Prints the table, and as the last line the same as one JSON object; both are in OUTPUT
too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import polars as pl

from bench.commands import Commands
from bench.recipes import LENGTH, RECIPES, ROWS, SIZES, Size
from bench.table import parser
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError, one_line
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.manifests import load_tokenizer, read_manifest
from entropy_masking.shards.parquet import Scores
from entropy_masking.shards.read import Columns, read_rows
from glue.intervals import paired_difference
from glue.tasks import TASKS, find_file, read_file
from train.options import LEARNING_RATES, MUON

BASELINE, SCRATCH_BASELINE = "random", "scratch-random"
COLUMNS = {
    "loss": "held-out loss",
    "easiest": "surest tenth",
    "hardest": "least sure tenth",
    "hard_three": "least sure three tenths",
    "blimp": "BLiMP",
    "glue": "GLUE",
}
TUNED = {"sst2": "", "qqp": "", "mnli_matched": "_matched", "qnli": ""}  # with the ending of their dev file
RATES = (1e-4, 3e-4, 1e-3)  # learning rates of fine-tuning; the baseline's first trunk chooses one

Measures = dict[str, dict[int, float]]  # by name and trunk


def main() -> None:
    args = parse()
    screen = Screen(args, SIZES[args.size])
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
            rate = screen.choose_rate()
            list(pool.map(lambda run: screen.tune(*run, rate), runs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        screen.commands.stop()
    screen.report()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    add = flags.add_argument
    add("--articles", required=True, help="Parquet file of the texts, with the columns id and text")
    add("--held-out", required=True, help="file with the ids of the held-out articles, one per line")
    add("--output", required=True, help="directory of all results")
    add("--size", choices=SIZES, default="tiny", help="(default: tiny)")
    add("--rows", default=",".join(ROWS), help="names of bench/recipes.py, by comma (default: its ROWS)")
    add("--trunks", type=console.positive, default=3, help="number of trunks, each with its own seed (default: 3)")
    add("--jobs", type=console.positive, default=2, help="runs at once, one core each (default: 2)")
    add("--reference", help="a model that scores the text (default: one is trained on the same articles)")
    add("--blimp", help="directory with blimp/blimp.parquet: zero-shot accuracy of every run")
    tuned = f"fine-tune every run on {', '.join(TUNED)}, on a part of their training rows"
    add("--glue", help=f"directory of GLUE tasks: {tuned}")
    args = flags.parse_args()
    args.rows = args.rows.split(",")
    if unknown := [name for name in args.rows if name not in RECIPES]:
        raise UsageError(f"--rows names {unknown[0]!r}, which is none of {', '.join(RECIPES)}")
    for name in list(args.rows):
        if (baseline := baseline_of(name)) not in args.rows:
            args.rows.insert(0, baseline)
    return args


def baseline_of(name: str) -> str:
    return SCRATCH_BASELINE if RECIPES[name].scratch else BASELINE


class Screen:
    """The steps of a screen, in their order."""

    def __init__(self, args: argparse.Namespace, size: Size) -> None:
        self.args, self.size = args, size
        self.output = Path(args.output).absolute()
        self.out = shlex.quote(str(self.output))  # in command lines
        self.commands = Commands(self.output)

    def split_articles(self) -> None:
        """Write the held-out texts, those of the branches, and those of the trunks.

        Raises:
            UsageError: a file cannot be read, or lacks articles.
        """
        try:
            articles = pl.read_parquet(self.args.articles, columns=["id", "text"])
            held_out = Path(self.args.held_out).read_text().split()
        except (OSError, UnicodeError, pl.exceptions.PolarsError) as error:
            raise UsageError(f"--articles or --held-out cannot be read: {one_line(error)}") from None
        articles = articles.with_columns(pl.col("id").cast(pl.String))
        if missing := sorted(set(held_out) - set(articles["id"])):
            raise UsageError(f"--held-out names {missing[0]!r}, which is no id in --articles")
        training = articles.filter(~pl.col("id").is_in(held_out))
        first = self.size.branch_documents
        if not held_out or len(training) <= first:
            raise UsageError(f"--held-out must name at least one article and leave more than {first} for training")
        parts = {"heldout": articles.filter(pl.col("id").is_in(held_out)), "articles": training}
        parts |= {"branches": training[:first], "trunks": training[first:]}
        self.output.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            if not (path := self.output / f"{name}.jsonl").exists():
                part.write_ndjson(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)  # so that no file is incomplete

    def prepare(self) -> None:
        """Tokenizer, tokens, the reference and its scores."""
        out, size, run = self.out, self.size, self.commands.run
        score = f"pipeline/score.py --backend local --cpus-per-worker 1 --sequence-length {LENGTH}"
        score += f" --shard-tokens {1 << 18 if size.vocab_size > 1000 else 1 << 12}"
        tokenizer = f"--vocab-size {size.vocab_size} --output {out}/tokenizer"
        run("tokenizer", f"pipeline/tokenizer.py --corpus {out}/articles.jsonl {tokenizer}")
        for name in ("trunks", "articles"):
            tokens = (
                f"--corpus {out}/{name}.jsonl --teacher none --tokenizer {out}/tokenizer --output {out}/{name}-tokens"
            )
            run(f"{name}-tokens", f"{score} {tokens}")
        reference = shlex.quote(self.args.reference or str(self.output / "reference"))
        if not self.args.reference:
            flags = f"--shards {out}/articles-tokens --model {size.reference} --eval-fraction 0 --entropy-source random"
            self.train("reference", 1, size.reference_steps, flags)
        for name in ("heldout", "branches"):
            run(f"{name}-scores", f"{score} --corpus {out}/{name}.jsonl --teacher {reference} --output {out}/{name}")
        if any(RECIPES[name].shuffled for name in self.args.rows):
            shuffle_scores(str(self.output / "branches"), str(self.output / "shuffled"))

    def train(self, name: str, seed: int, steps: int, flags: str) -> None:
        if "--seed" not in flags.split():
            flags += f" --seed {seed}"
        flags += f" --max-steps {steps} --per-device-train-batch-size {self.size.batch} --data-seed {seed}"
        self.commands.run(name.replace("/", "-"), f"train/run.py {flags} --output-dir {self.out}/{name}")

    def train_trunk(self, trunk: int) -> None:
        flags = f"--shards {self.out}/trunks-tokens --eval-shards {self.out}/heldout --model {self.size.student}"
        flags += " --entropy-source random --lr-scheduler-type constant_with_warmup"
        self.train(f"trunks/{trunk}", trunk, self.size.trunk_steps, flags)

    def train_and_test(self, name: str, trunk: int) -> None:
        """One recipe from one trunk, and its zero-shot accuracy."""
        recipe, size, out = RECIPES[name], self.size, self.out
        if recipe.scratch:
            steps, model = size.scratch_steps, f"bert-{size.student}" if recipe.bert else size.student
        else:  # with the optimizer of the student's preset, because a model by path would get AdamW
            rate = LEARNING_RATES[MUON][size.student]
            model = f"{out}/trunks/{trunk} --optim {MUON} --learning-rate {rate} --warmup-steps 0.05"
            steps = size.branch_steps
        shards = f"--shards {out}/{'shuffled' if recipe.shuffled else 'branches'} --eval-shards {out}/heldout"
        flags = f"{shards} {recipe.flags} --model {model} --save-strategy no"
        self.train(f"branches-{trunk}/{name}", trunk, steps, flags)
        if self.args.blimp:
            data = shlex.quote(self.args.blimp)
            self.glue("blimp", name, trunk, f"--tasks blimp --data {data} --limit-pairs {size.pairs}")

    def glue(self, kind: str, name: str, trunk: int, flags: str) -> None:
        where = f"--model {self.out}/branches-{trunk}/{name} --output {self.out}/{kind}-{trunk}/{name}"
        self.commands.run(f"{kind}-{trunk}-{name}", f"glue/run.py {where} {flags}")

    def split_tasks(self) -> None:
        """Split the training rows into training and dev rows, so that the real dev rows stay unseen."""
        for name, ending in TUNED.items():
            task, wanted = TASKS[name], self.size.train_rows + self.size.dev_rows
            directory = self.output / "glue-data" / task.directory
            if (directory / f"dev{ending}.parquet").exists():
                continue
            rows = read_file(find_file(Path(self.args.glue) / task.directory, "train", "train_subset"))
            rows = rows.sample(min(wanted, len(rows)), shuffle=True, seed=0)
            directory.mkdir(parents=True, exist_ok=True)
            rows[self.size.dev_rows :].write_parquet(directory / "train.parquet")
            rows[: self.size.dev_rows].write_parquet(directory / f"dev{ending}.parquet")

    def choose_rate(self) -> float:
        """The learning rate of fine-tuning that is best for the baseline's first trunk."""
        baseline = baseline_of(self.args.rows[0])
        for rate in RATES:
            self.tune(baseline, 1, rate, f"rate-{rate:g}")
        return max(RATES, key=lambda rate: mean_score(self.output / f"rate-{rate:g}-1" / baseline))

    def tune(self, name: str, trunk: int, rate: float, kind: str = "glue") -> None:
        data = f"--tasks {','.join(TUNED)} --data {self.out}/glue-data --drop-overlap"
        self.glue(kind, name, trunk, f"{data} --learning-rate {rate} --epochs 3")

    def report(self) -> None:
        """Print the table and write it."""
        rows = {name: self.measures(name) for name in self.args.rows}
        text = table(rows)
        (self.output / "table.md").write_text(text)
        settings = {"size": asdict(self.size), "trunks": self.args.trunks}
        result = {"settings": settings, "recipes": {name: RECIPES[name].flags for name in rows}, "rows": rows}
        storage.write_json(str(self.output / "table.json"), result)
        print(text)
        print(json.dumps(result))

    def measures(self, name: str) -> Measures:
        measures: Measures = {}
        for trunk in range(1, self.args.trunks + 1):
            summary = json.loads((self.output / f"branches-{trunk}" / name / "summary.json").read_text())
            values = {"loss": summary["eval_loss"], "training_flops": summary["training_flops"]}
            values["flops"] = summary["training_flops"] + summary["scoring_flops"]
            deciles = summary["eval_loss_by_entropy_decile"] or []
            values |= {f"decile_{number}": loss for number, loss in enumerate(deciles, 1)}
            for kind, wanted in (("blimp", self.args.blimp), ("glue", self.args.glue)):
                if wanted:
                    values[kind] = mean_score(self.output / f"{kind}-{trunk}" / name)
            for measure, value in values.items():
                measures.setdefault(measure, {})[trunk] = value
        return measures


def mean_score(directory: Path) -> float:
    """Mean of the scores in a directory of glue/run.py, in percent."""
    results = [json.loads(file.read_text()) for file in sorted(directory.rglob("*.json"))]
    scored = [result for result in results if isinstance(result, dict) and {"metrics", "score"} <= result.keys()]
    return float(np.mean([result["score"] for result in scored]))


def table(rows: dict[str, Measures]) -> str:
    """The rows as Markdown: a baseline's measures, and the differences of the others to their baseline."""
    rows = {name: with_deciles(measures) for name, measures in rows.items()}
    columns = [column for column in COLUMNS if column in next(iter(rows.values()))]
    lines = [
        f"| minus {BASELINE} | n | {' | '.join(COLUMNS[column] for column in columns)} | FLOPs, with scores |",
        f"|---|---:|{'---:|' * (len(columns) + 1)}",
    ]
    for name, measures in rows.items():
        baseline = rows[baseline_of(name)]
        if name == baseline_of(name):
            values = [f"{mean(measures[column]):.3f}" for column in columns]
        else:
            values = [difference(measures[c], baseline[c]) if c in measures else "" for c in columns]
        flops = [f"{mean(measures[kind]) / mean(baseline['flops']):.2f}" for kind in ("training_flops", "flops")]
        lines.append(f"| {name} | {len(measures['loss'])} | {' | '.join(values)} | {', '.join(flops)} |")
    return "\n".join(lines) + "\n"


def with_deciles(measures: Measures) -> Measures:
    """With the losses of the first, the last, and the last three deciles of the reference's entropy."""
    if "decile_10" not in measures:
        return measures
    last = [measures[f"decile_{number}"] for number in (8, 9, 10)]
    hard_three = {trunk: float(np.mean([losses[trunk] for losses in last])) for trunk in measures["loss"]}
    return measures | {"easiest": measures["decile_1"], "hardest": last[-1], "hard_three": hard_three}


def mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """Mean and interval, paired by trunk."""
    paired = paired_difference({k: {0: v} for k, v in values.items()}, {k: {0: v} for k, v in baseline.items()})
    if paired is None:
        return ""
    interval = "" if paired.low is None or paired.high is None else f" [{paired.low:+.3f}, {paired.high:+.3f}]"
    return f"{paired.mean:+.3f}{interval}"


def shuffle_scores(source: str, target: str) -> None:
    """A shard directory with the tokens of another and its scores shuffled within each row: a control."""
    manifest = read_manifest(source)
    fingerprint = manifest.fingerprint | {"shuffled": manifest.fingerprint_hash}
    hashed = storage.sha256_json(fingerprint)
    commit.claim_directory(target, fingerprint, manifest.planned_shards)
    commit.save_tokenizer(load_tokenizer(source), target)
    records, originals = commit.done_records(target, manifest.planned_shards, hashed), commit.read_records(source)
    for entry in manifest.shards:
        if entry.index in records:
            continue
        started, rng = time.monotonic(), np.random.default_rng(entry.index)
        rows = read_rows(manifest, entry, Columns(entropy=True, surprisal=True))
        scored_NL = ~np.isnan(rows["entropy"])
        from_NL = np.where(scored_NL, rng.random(scored_NL.shape), np.inf).argsort(1)
        to_NL = np.where(scored_NL, 0, 1).argsort(1, kind="stable")
        for name in ("entropy", "surprisal"):
            values_NL = np.empty_like(rows[name])
            np.put_along_axis(values_NL, to_NL, np.take_along_axis(rows[name], from_NL, 1), 1)
            rows[name] = values_NL
        none = np.empty((*scored_NL.shape, 0), np.int64)
        scores = Scores(rows["entropy"], rows["surprisal"], none, none.astype(np.float32), {})
        parts = parquet.to_table(entry.index, rows["input_ids"], scores, manifest.vocab_size, top_k=0)
        fields = originals[entry.index].model_dump() | {"fingerprint_hash": hashed}
        data = parquet.to_parquet(parquet.row_groups(parts))
        records[entry.index] = commit.commit_shard(target, entry.index, data, fields, started)
    changed = {"uri": target, "top_k": 0, "temperatures": [], "shards": [], "totals": {}}
    changed |= {"fingerprint": fingerprint, "fingerprint_hash": hashed}
    commit.write_manifest(manifest.model_copy(update=changed), records, {})


if __name__ == "__main__":
    console.run(main)
