"""The flags of glue/run.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from glue.blimp import FORMS
from glue.protocols import PROTOCOLS
from glue.tasks import PROBES, TASKS, ZERO_SHOT, Task, choose


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The flags, checked as far as they can be by themselves.

    Returns:
        them, with ``models`` (paths by name), ``tasks``, ``seeds`` and ``limit_train`` (rows by task) parsed.

    Raises:
        UsageError: one makes no sense.
    """
    parser = argparse.ArgumentParser(
        prog="glue/run.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]MODEL",
        help="pretrained masked LM with its tokenizer, by path or Hub id; several are told apart by name",
    )
    add(
        "--tasks",
        required=True,
        help="comma-separated; glue and probes stand for all of theirs; blimp needs no fine-tuning",
    )
    add("--data", help="directory with TASK/train.parquet|tsv|jsonl and dev.…, or hub")
    add("--seeds", default="1", help="comma-separated (default: 1)")
    add("--protocol", choices=PROTOCOLS, default="cramming", help="(default: cramming)")
    add(
        "--output",
        required=True,
        help="directory of the results, one JSON a task and seed; of named models OUTPUT/NAME",
    )
    add(
        "--num-workers",
        type=console.positive,
        default=1,
        help="Ray workers, each with a GPU or a core (default: 1, no Ray)",
    )
    add("--gpus-per-worker", type=share, default=1.0, help="less than 1: several workers share a GPU (default: 1)")
    add("--learning-rate", type=console.positive_float, help="instead of the protocol's")
    add("--epochs", type=console.positive, help="instead of the protocol's")
    add("--batch-size", type=console.positive, help="instead of the protocol's")
    add("--max-length", type=console.positive, help="tokens of a text or pair (default: 128)")
    add("--limit-train", help="at most so many training rows, the same for every seed; or by task, as in sst2=10000")
    add(
        "--pll",
        choices=FORMS,
        help="blimp: mask the later pieces of a word too when a piece is scored, or it alone (default: within-word)",
    )
    add(
        "--limit-pairs",
        type=console.positive,
        help="blimp: the first N pairs of each phenomenon (default: all)",
    )
    add("--drop-overlap", action="store_true", help="do not train on rows that are evaluated on too")
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bfloat16 where the hardware has it",
    )
    add("--overwrite", action="store_true", help="do results again that are there already")
    args = parser.parse_args(argv)
    args.tasks = choose(args.tasks)
    args.models = named_models(args.model)
    args.seeds = parse_seeds(args.seeds)
    args.limit_train = parse_limits(args.limit_train, args.tasks)
    if args.data and all(task.name in PROBES for task in args.tasks):
        raise UsageError("the probes are made from installed packages; leave out --data")
    zero_shot = any(task.name in ZERO_SHOT for task in args.tasks)
    if flag := next((flag for flag in ("pll", "limit_pairs") if getattr(args, flag) and not zero_shot), None):
        raise UsageError(f"--{flag.replace('_', '-')} is of the task blimp alone; add it to --tasks, or leave it out")
    args.pll = args.pll or FORMS[0]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and storage.absolute(args.output) != args.output:
        raise UsageError(f"--output {args.output} would be lost with the job's directory; name an absolute path")
    return args


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1: fine-tuning takes one GPU")
    return value


def named_models(texts: list[str]) -> dict[str, str]:
    """Models by name: NAME of NAME=MODEL, else the last part of its path; "" for a single one without a name."""
    pairs = []
    for text in texts:
        name, equals, path = text.partition("=")
        named = bool(equals) and "/" not in name and not Path(text).exists()
        if named and not (name and path):
            raise UsageError(f"--model {text} is no NAME=MODEL, as in random=runs/random")
        own = Path(text).absolute().name if len(texts) > 1 else ""
        pairs.append((name, path) if named else (own, text))
    if twice := [name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1]:
        raise UsageError(f"two models have the name {twice[0]}; name them, as in --model a=PATH b=PATH")
    return dict(pairs)


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text} is no list of whole numbers, as in --seeds 1,2,3") from None
    if wrong := [seed for seed in seeds if not 0 <= seed < 1 << 32]:
        raise UsageError(f"--seeds {wrong[0]} is not between 0 and {(1 << 32) - 1}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text} names a seed twice; each makes one result")
    return seeds


def parse_limits(text: str | None, tasks: list[Task]) -> dict[str, int]:
    """Training rows by task of ``10000``, which is for all of them, or of ``sst2=10000,qnli=5000``."""
    limits: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, equals, number = part.strip().rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (not equals and part != text):
            raise UsageError(f"--limit-train {text} is no number of rows, nor one a task as in sst2=10000,qnli=5000")
        if equals and name not in TASKS.keys() - ZERO_SHOT.keys():
            raise UsageError(f"--limit-train {text}: there is no task {name!r} to train on")
        limits |= dict.fromkeys([name] if equals else [task.name for task in tasks], int(number))
    return limits
