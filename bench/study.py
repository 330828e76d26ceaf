#!/usr/bin/env python3
"""The study of docs/RESULTS.md: when does entropy masking pay, from which source, and what does it cost?

    python bench/study.py --articles articles.parquet --held-out ids.txt --glue GLUE --output runs/study
    python bench/study.py --articles articles.parquet --held-out ids.txt --glue GLUE --output runs/study --dry-run
    python bench/study.py … --scale gpu --output runs/study-gpu

It splits the articles and writes the models' config.json; every other step is a command of this project, written to
OUTPUT/commands.sh; what it prints goes to OUTPUT/logs. What is done is skipped by the command itself, so the same line
goes on after a break. It ends with OUTPUT/comparison and OUTPUT/comparison-faster, made by glue/compare.py, and
OUTPUT/results.md, the tables that are not in there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import polars as pl

from bench.commands import Commands
from bench.regimes import REGIMES, SCALES, Regime, Scale, architecture
from bench.report import decile_differences, deciles, findings
from glue.metrics import tasks_of
from glue.tasks import choose, load
from pipeline import cli, storage
from pipeline.cli import RunError, UsageError
from pipeline.commit import differences
from pipeline.manifests import load_tokenizer, read_manifest
from train.flops import forward_flops, training_flops
from train.masking import MaskPolicy
from train.student import build_student

AVERAGE = "local6"
FASTER = 3e-4  # learning rate of the second fine-tuning: models of a few million weights want more than the protocol's


def main() -> None:
    args = parse()
    study = Study(args, SCALES[args.scale])
    print(f"{len(study.students())} students", file=sys.stderr)
    if not args.dry_run:
        study.split_articles()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for line in study.preparation():
            study.commands.run(*line)
            if line[0] == "tokenizer" and not args.dry_run:
                study.write_models()
        students, failed = study.students(), []
        for step in (study.train_and_tune, study.tune_faster):
            errors = list(pool.map(partial(study.attempt, step), students))
            failed += [error for error in errors if error]
            students = [student for student, error in zip(students, errors, strict=True) if not error]
        if failed:
            raise RunError(f"not every student is finished: {'; '.join(failed)}; the same command tries again")
        for tuned in ("", "-faster"):
            study.commands.run(f"comparison{tuned}", "glue/compare.py", *study.comparison(tuned))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        study.commands.stop()
    if not args.dry_run:
        (study.output / "results.md").write_text(study.report())
        print(f"written to {study.output}: results.md, comparison/, comparison-faster/, commands.sh")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--articles", required=True, help="Parquet file of the texts, with the columns id and text")
    add("--held-out", required=True, help="file of the ids, one a line, that nothing is trained on")
    add("--glue", required=True, help="directory of the GLUE tasks, as for glue/run.py --data")
    add("--output", required=True, help="directory of all that is made")
    add("--scale", choices=SCALES, default="cpu", help="(default: cpu)")
    add("--jobs", type=cli.positive, default=1, help="students that are trained and fine-tuned at once (default: 1)")
    add("--dry-run", action="store_true", help="print the commands and stop")
    return parser.parse_args()


class Study:
    """What a study runs, in the order in which it can be run."""

    def __init__(self, args: argparse.Namespace, scale: Scale) -> None:
        self.scale, self.dry_run = scale, args.dry_run
        self.output, self.glue = Path(args.output).absolute(), Path(args.glue).absolute()
        self.articles, self.held_out = Path(args.articles), Path(args.held_out)
        self.commands = Commands(self.output, args.dry_run)

    def split_articles(self) -> None:
        """Write the texts to train on, and those held out, after all that the study reads has been looked at.

        Raises:
            UsageError: names what cannot be read, or is not what this study began with.
        """
        for task in choose(",".join(tasks_of(AVERAGE))):
            load(task, str(self.glue))
        try:
            articles = pl.read_parquet(self.articles, columns=["id", "text"])
            held_out = self.held_out.read_text().split()
        except (OSError, UnicodeError, pl.exceptions.PolarsError) as error:
            raise UsageError(f"--articles or --held-out cannot be read: {cli.one_line(error)}") from None
        articles = articles.with_columns(pl.col("id").cast(pl.String))
        if missing := sorted(set(held_out) - set(articles["id"])):
            raise UsageError(f"--held-out names {missing[0]!r}, which is no id in --articles")
        if not 0 < len(held_out) < len(articles):
            raise UsageError("--held-out has to name some of the articles, and not all")
        hashes = {"articles": storage.sha256(str(self.articles)), "held_out": storage.sha256_json(sorted(held_out))}
        self.claim(hashes | {"scale": asdict(self.scale)})
        is_held_out = pl.col("id").is_in(held_out)
        for name, part in (("heldout", articles.filter(is_held_out)), ("articles", articles.filter(~is_held_out))):
            if not (path := self.output / f"{name}.jsonl").exists():
                part.write_ndjson(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)  # whole, or not there

    def claim(self, inputs: dict[str, Any]) -> None:
        """Bind the output directory to what the study is made from.

        Raises:
            UsageError: it was made from something else.
        """
        inputs = json.loads(json.dumps(inputs))
        path = self.output / "inputs.json"
        if path.exists() and (differing := differences(json.loads(path.read_text()), inputs)):
            raise UsageError(f"{self.output} was begun with others ({'; '.join(differing)}); choose a new --output")
        storage.write_json(str(path), inputs)

    def preparation(self) -> list[tuple[object, ...]]:
        """All that the students read: tokenizer, reference, its scores, and the targets of the planned masks."""
        of, scale = self.output.joinpath, self.scale
        score = ("pipeline/score.py", "--backend", "local", "--cpus-per-worker", 1)
        few = ("--limit-documents", scale.documents) if scale.documents else ()
        texts = ("--corpus", of("articles.jsonl"))
        teacher, read = ("--teacher", of("reference")), (*texts, *few)
        reference = ("--shards", of("tokens"), "--entropy-source", "random", *self.model("reference"), "--seed", 1)
        reference += ("--num-train-epochs", scale.reference_epochs, "--eval-strategy", "steps", "--eval-steps", 0.1)
        vocabulary = ("--vocab-size", scale.vocab_size, "--output", of("tokenizer"))
        lines: list[tuple[object, ...]] = [("tokenizer", "pipeline/tokenizer.py", *texts, *vocabulary)]
        tokens = (*texts, "--teacher", "none", "--tokenizer", of("tokenizer"), "--output", of("tokens"))
        lines.append(("tokens", *score[:3], *tokens))
        lines.append(("reference", "train/run.py", *reference, "--output-dir", of("reference")))
        lines.append(("heldout", *score, "--corpus", of("heldout.jsonl"), *teacher, "--output", of("heldout")))
        lines.append(("scored", *score, *read, *teacher, "--output", of("scored")))
        full = (*read, *teacher, "--context", "full", "--output", of("scored-full"))
        lines.append(("scored-full", *score, *full))
        for source, variants in (("random", scale.epochs), ("parquet", 1)):
            # the seed of the first students, whose masks these are
            plan = ("--shards", of("scored"), "--entropy-source", source, "--variants", variants, "--seed", 1)
            lines.append((f"plan-{source}", "train/plan.py", *plan, "--output", of(f"plan-{source}")))
            masks = ("--corpus", of("scored"), *teacher, "--masks", of(f"plan-{source}"))
            lines.append((f"targets-{source}", *score, *masks, "--output", of(f"targets-{source}")))
        return lines

    def write_models(self) -> None:
        tokenizer = load_tokenizer(str(self.output))
        for name, size in (("reference", self.scale.reference), ("student", self.scale.student)):
            config = architecture(*size, self.scale.vocab_size, tokenizer)
            config.save_pretrained(self.output / "models" / name)

    def model(self, name: str) -> tuple[object, ...]:
        """Flags of train/run.py that say what is trained, and how fast."""
        rate = ("--per-device-train-batch-size", self.scale.batch, "--learning-rate", self.scale.learning_rate)
        return ("--model", self.output / "models" / name / "config.json", *rate)

    def students(self) -> list[tuple[Regime, int]]:
        """(regime, pretraining seed), those with most steps last."""
        every = [(regime, seed) for regime in REGIMES for seed in self.seeds(regime)]
        return sorted(every, key=lambda each: each[0].equal_cost)

    def seeds(self, regime: Regime) -> tuple[int, ...]:
        """Of pretraining; what is not fine-tuned has one."""
        of = self.scale.seeds if regime.replicated else self.scale.others
        return of if regime.glue else of[:1]

    def attempt(self, step: Callable[[Regime, int], None], student: tuple[Regime, int]) -> str | None:
        """A step of a student; what went wrong is said at once, and the others go on."""
        try:
            step(*student)
        except RunError as error:
            if not self.commands.stopped:
                print(f"failed: {error}", file=sys.stderr, flush=True)
            return str(error)
        return None

    def train_and_tune(self, regime: Regime, seed: int) -> None:
        """Pretrain a student, and fine-tune it by the protocol."""
        name, of = f"{regime.name}-{seed}", self.output.joinpath
        train = ["--shards", of(regime.shards), *regime.flags.split(), *self.model("student"), "--seed", seed]
        train += ["--targets", of(f"targets-{regime.targets}")] if regime.targets else []
        if regime.equal_cost:
            train += ["--max-steps", self.equal_cost_steps()]
        elif "--max-steps" not in regime.flags:
            train += ["--num-train-epochs", self.scale.epochs]
        train += ["--eval-shards", of("heldout"), "--eval-strategy", "steps", "--eval-steps", 0.15]
        self.commands.run(name, "train/run.py", *train, "--output-dir", of("students", name))
        if regime.glue:
            self.tune(name, "", "--seeds", "1,2" if len(self.seeds(regime)) > 1 else "1")

    def tune_faster(self, regime: Regime, seed: int) -> None:
        """Fine-tune a student once more, at a learning rate for models as small."""
        if regime.glue:
            self.tune(f"{regime.name}-{seed}", "-faster", "--seeds", "1", "--learning-rate", FASTER)

    def tune(self, name: str, tuned: str, *flags: object) -> None:
        tasks = ("--tasks", ",".join(tasks_of(AVERAGE)), "--data", self.glue, "--drop-overlap")
        protocol = ("--protocol", "cramming", "--limit-train", "sst2=10000")
        where = ("--model", self.output / "students" / name, "--output", self.output / f"glue{tuned}" / name)
        self.commands.run(f"glue{tuned}-{name}", "glue/run.py", *where, *tasks, *protocol, *flags)

    def equal_cost_steps(self) -> int | str:
        """Steps with random masks that take the FLOPs of a student of parquet+kd, with all that it reads."""
        if self.dry_run:
            return "…"
        scored = read_manifest(str(self.output / "scored"))
        targets = read_manifest(str(self.output / "targets-parquet"), kind="targets")
        batch = self.scale.batch
        steps = math.ceil(self.scale.epochs * scored.totals["sequences"] / batch)
        student = build_student(str(self.output / "models" / "student" / "config.json"), scored, seed=1)
        masked = MaskPolicy().positions(scored.sequence_length)
        forward = forward_flops(student, scored.sequence_length)
        step = training_flops(*forward, sequences=batch, masked=masked)
        return steps + round((scored.totals["flops"] + targets.totals["flops"]) / step)

    def comparison(self, tuned: str) -> list[object]:
        found = [
            f"{regime.name}={self.output / f'glue{tuned}' / f'{regime.name}-{seed}'}"
            for regime, seed in self.students()
            if regime.glue
        ]
        order = [regime.name for regime in REGIMES]
        found.sort(key=lambda text: order.index(text.partition("=")[0]))
        flags = ["--baseline", "random", "--average", AVERAGE, "--teacher", self.output / "reference"]
        return [*found, *flags, "--output", self.output / f"comparison{tuned}"]

    def report(self) -> str:
        """The tables of bench/report.py."""
        tables = [
            json.loads((self.output / f"comparison{each}" / "table.json").read_text()) for each in ("", "-faster")
        ]
        summaries: dict[str, list[dict[str, Any]]] = {regime.name: [] for regime in REGIMES}
        for regime, seed in self.students():
            file = self.output / "students" / f"{regime.name}-{seed}" / "summary.json"
            summaries[regime.name].append(json.loads(file.read_text()))
        made = {name: found for name, found in summaries.items() if found}  # a trial has the main ones alone
        by_decile = (deciles(made), decile_differences(made, "random"))
        return "\n".join([*(findings(table, AVERAGE) for table in tables), *by_decile])


if __name__ == "__main__":
    cli.run(main)
