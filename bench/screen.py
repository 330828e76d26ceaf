#!/usr/bin/env python3
"""Which masking recipe helps: short paired runs from common trunks, and a table of their differences.

    python bench/screen.py --articles articles.parquet --held-out ids.txt --output runs/screen
    python bench/screen.py … --rows random,parquet,self --trunks 5 --blimp DATA
    python bench/screen.py … --size mini --rows random,parquet,random-r30+kd --glue GLUE

A trunk is a student trained with random masks at a constant learning rate. From each trunk every recipe
(bench/recipes.py) goes on for some steps while the rate falls to 0, on the same data in the same order. A row of the
table is the mean over trunks of (recipe - baseline), with its 95 % interval by the paired t. Baselines mask at random.
One row reads scores that were shuffled within each sequence: if it differs from random by more than its interval,
suspect the screen.

Every step is a command of this project (OUTPUT/commands.sh, OUTPUT/logs). What is done is skipped, so the same line
goes on after a break. Prints the table, and as the last line the same as one JSON object; both are in OUTPUT too.
"""

from __future__ import annotations

import argparse
import json
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
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError, one_line
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.manifests import load_tokenizer, read_manifest
from entropy_masking.shards.parquet import Scores
from entropy_masking.shards.read import Columns, read_rows
from entropy_masking.shards.schema import Run
from glue.intervals import Estimate, paired_difference
from glue.tasks import TASKS, find_file, read_file
from train.options import LEARNING_RATES, MUON

DECILES = 10
TUNED = {"sst2": "", "qqp": "", "mnli_matched": "_matched", "qnli": ""}  # with the ending of their dev file
RATES = (1e-4, 3e-4, 1e-3)  # learning rates of fine-tuning; the baseline's first trunk chooses one


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--articles", required=True, help="Parquet file of the texts, with the columns id and text")
    add("--held-out", required=True, help="file with the ids of the held-out articles, one per line")
    add("--output", required=True, help="directory of all that is made")
    add("--size", choices=SIZES, default="tiny", help="(default: tiny)")
    add("--rows", default=",".join(ROWS), help="names of bench/recipes.py, by comma (default: its ROWS)")
    add("--trunks", type=console.positive, default=3, help="number of trunks, each with its own seed (default: 3)")
    add("--jobs", type=console.positive, default=2, help="runs at once, one core each (default: 2)")
    add("--reference", help="a model that scores the text (default: one is trained on the same articles)")
    add("--blimp", help="directory with blimp/blimp.parquet: zero-shot accuracy of every run")
    add(
        "--glue",
        help=f"directory of GLUE tasks: fine-tune every run on {', '.join(TUNED)}, on a part of their training rows",
    )
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := [name for name in args.rows if name not in RECIPES]:
        raise UsageError(f"--rows names {unknown[0]!r}, which is none of {', '.join(RECIPES)}")
    for name in list(args.rows):
        while (name := RECIPES[name].baseline) not in args.rows:
            args.rows.insert(0, name)
    return args


class Screen:
    """What a screen runs, in the order in which it can be run."""

    def __init__(self, args: argparse.Namespace, size: Size) -> None:
        self.args, self.size = args, size
        self.output = Path(args.output).absolute()
        self.commands = Commands(self.output)

    def split_articles(self) -> None:
        """Write the texts held out, those of the branches, and those of the trunks.

        Raises:
            UsageError: a file cannot be read, or does not have what is needed.
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
            path, text = self.output / f"{name}.jsonl", part.write_ndjson()
            if not path.exists():
                path.with_suffix(".part").write_text(text, encoding="utf-8")
                path.with_suffix(".part").rename(path)  # whole, or not there
            elif path.read_text(encoding="utf-8") != text:
                raise UsageError(f"{path} was made from other articles or ids; use another --output")

    def prepare(self) -> None:
        """Tokenizer, tokens, the reference and its scores."""
        of, run = self.output.joinpath, self.commands.run
        local = ("pipeline/score.py", "--backend", "local", "--cpus-per-worker", 1, "--sequence-length", LENGTH)
        vocabulary = ("--vocab-size", self.size.vocab_size, "--output", of("tokenizer"))
        run("tokenizer", "pipeline/tokenizer.py", "--corpus", of("articles.jsonl"), *vocabulary)
        tokens = ("--teacher", "none", "--tokenizer", of("tokenizer"), "--shard-tokens", self.shard_tokens())
        for name in ("trunks", "articles"):
            corpus = ("--corpus", of(f"{name}.jsonl"))
            run(f"{name}-tokens", *local, *corpus, *tokens, "--output", of(f"{name}-tokens"))
        reference = self.args.reference or of("reference")
        if not self.args.reference:
            flags = ("--shards", of("articles-tokens"), "--model", self.size.reference, "--eval-fraction", 0)
            self.train("reference", 1, self.size.reference_steps, *flags, "--entropy-source", "random")
        for name in ("heldout", "branches"):
            corpus = ("--corpus", of(f"{name}.jsonl"), "--shard-tokens", self.shard_tokens())
            run(f"{name}-scores", *local, *corpus, "--teacher", reference, "--output", of(name))
        if any(RECIPES[name].shuffled for name in self.args.rows):
            shuffle_scores(str(of("branches")), str(of("shuffled")))

    def shard_tokens(self) -> int:
        return 1 << 18 if self.size.vocab_size > 1000 else 1 << 12

    def train(self, name: str, seed: int, steps: int, *flags: object) -> None:
        step = ("--max-steps", steps, "--per-device-train-batch-size", self.size.batch, "--data-seed", seed)
        step += ("--eval-strategy", "no")  # at the end only
        seeded = () if "--seed" in flags else ("--seed", seed)
        where = ("--output-dir", self.output / name)
        self.commands.run(name.replace("/", "-"), "train/run.py", *flags, *step, *seeded, *where)

    def train_trunk(self, trunk: int) -> None:
        of = self.output.joinpath
        flags = ("--shards", of("trunks-tokens"), "--eval-shards", of("heldout"), "--model", self.size.student)
        constant = ("--entropy-source", "random", "--lr-scheduler-type", "constant_with_warmup")
        self.train(f"trunks/{trunk}", trunk, self.size.trunk_steps, *flags, *constant)

    def train_and_test(self, name: str, trunk: int) -> None:
        """One recipe from one trunk, and its zero-shot accuracy."""
        recipe, of = RECIPES[name], self.output.joinpath
        directory = of("shuffled" if recipe.shuffled else "branches")
        flags = ["--shards", directory, "--eval-shards", of("heldout"), *recipe.flags.split()]
        steps = self.size.branch_steps
        if recipe.scratch:
            flags += ["--model", f"bert-{self.size.student}" if recipe.bert else self.size.student]
            steps = self.size.scratch_steps
        else:
            flags += ["--model", of("trunks", str(trunk)), *self.rates(), "--warmup-steps", 0.05]
        self.train(f"branches-{trunk}/{name}", trunk, steps, *flags, "--save-strategy", "no")
        if self.args.blimp:
            blimp = ("--tasks", "blimp", "--data", self.args.blimp, "--limit-pairs", self.size.pairs)
            self.glue("blimp", name, trunk, *blimp)

    def rates(self) -> list[object]:
        """Optimizer and learning rate of the student's preset; a model by path would get AdamW's defaults."""
        return ["--optim", MUON, "--learning-rate", LEARNING_RATES[MUON][self.size.student]]

    def glue(self, kind: str, name: str, trunk: int, *flags: object) -> None:
        model, output = self.output / f"branches-{trunk}" / name, self.output / f"{kind}-{trunk}" / name
        self.commands.run(f"{kind}-{trunk}-{name}", "glue/run.py", "--model", model, *flags, "--output", output)

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
        baseline = RECIPES[self.args.rows[0]].baseline
        for rate in RATES:
            self.tune(baseline, 1, rate, f"rate-{rate:g}")
        return max(RATES, key=lambda rate: mean_score(self.output / f"rate-{rate:g}-1" / baseline))

    def tune(self, name: str, trunk: int, rate: float, kind: str = "glue") -> None:
        data = ("--data", self.output / "glue-data", "--drop-overlap")
        self.glue(kind, name, trunk, "--tasks", ",".join(TUNED), *data, "--learning-rate", rate, "--epochs", 3)

    def report(self) -> None:
        """Print the table and write it."""
        rows = {name: self.row(name) for name in self.args.rows}
        text = table(rows)
        (self.output / "table.md").write_text(text, encoding="utf-8")
        settings = {"size": asdict(self.size), "trunks": self.args.trunks}
        found = {"settings": settings, "recipes": {name: RECIPES[name].flags for name in rows}, "rows": rows}
        storage.write_json(str(self.output / "table.json"), found)
        print(text)
        print(json.dumps(found))

    def row(self, name: str) -> dict[str, dict[int, float]]:
        """Each measure of a recipe, by trunk."""
        found: dict[str, dict[int, float]] = {}
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
                found.setdefault(measure, {})[trunk] = value
        return found


def mean_score(directory: Path) -> float:
    """Mean of the scores in a directory of glue/run.py, in percent."""
    scores = []
    for file in sorted(directory.rglob("*.json")):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and {"metrics", "score"} <= result.keys():
            scores.append(result["score"])
    return float(np.mean(scores))


def table(rows: dict[str, dict[str, dict[int, float]]]) -> str:
    """The rows as Markdown: a baseline's measures, and the differences of the others to their baseline."""
    measures = {"loss": "held-out loss", "easiest": "surest tenth", "hardest": "least sure tenth"}
    measures |= {"hard_three": "least sure three tenths", "blimp": "BLiMP", "glue": "GLUE"}
    measured = {name: with_parts(row) for name, row in rows.items()}
    shown = [measure for measure in measures if measure in measured[next(iter(rows))]]
    lines = [
        f"| recipe | minus | n | {' | '.join(measures[each] for each in shown)} | FLOPs, with scores |",
        f"|---|---|---:|{'---:|' * (len(shown) + 1)}",
    ]
    for name, row in measured.items():
        minus, baseline, cells = RECIPES[name].baseline, measured[RECIPES[name].baseline], []
        for measure in shown:
            if name == minus:
                cells.append(f"{np.mean(list(row[measure].values())):.3f}")
            else:
                cells.append(interval(difference(row[measure], baseline[measure])) if measure in row else "")
        base = np.mean(list(baseline["flops"].values()))
        flops = ", ".join(f"{np.mean(list(row[each].values())) / base:.2f}" for each in ("training_flops", "flops"))
        minus = "" if name == minus else minus
        lines.append(f"| {name} | {minus} | {len(row['loss'])} | {' | '.join(cells)} | {flops} |")
    return "\n".join(lines) + "\n"


def with_parts(row: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The measures, and those of some deciles of the reference's entropy."""
    if f"decile_{DECILES}" not in row:
        return row
    last = [row[f"decile_{decile}"] for decile in range(DECILES - 2, DECILES + 1)]
    hard = {trunk: float(np.mean([losses[trunk] for losses in last])) for trunk in row["loss"]}
    return row | {"easiest": row["decile_1"], "hardest": row[f"decile_{DECILES}"], "hard_three": hard}


def difference(values: dict[int, float], baseline: dict[int, float]) -> Estimate | None:
    """Paired by trunk."""
    return paired_difference({k: {0: v} for k, v in values.items()}, {k: {0: v} for k, v in baseline.items()})


def interval(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def shuffle_scores(source: str, target: str) -> None:
    """A shard directory with the tokens of another and its scores shuffled within each row: a control."""
    manifest = read_manifest(source)
    fingerprint = manifest.fingerprint | {"shuffled": manifest.fingerprint_hash}
    hashed = storage.sha256_json(fingerprint)
    hashes = {"fingerprint": fingerprint, "fingerprint_hash": hashed}
    empty = {"uri": target, "top_k": 0, "temperatures": [], "shards": [], "totals": {}}
    copy = manifest.model_copy(update=empty | hashes)
    commit.begin_run(target, Run(fingerprint=fingerprint, shards=copy.planned_shards))
    records = commit.done_records(target, copy.planned_shards, hashed)
    originals = commit.read_records(source)
    commit.save_tokenizer(load_tokenizer(source), target)
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
    commit.write_manifest(copy, records, {})


if __name__ == "__main__":
    console.run(main)
