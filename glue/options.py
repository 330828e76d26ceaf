"""The flags of glue/run.py."""

import argparse
import re
from pathlib import Path

from entropy_masking.commands import ray_cluster
from entropy_masking.commands.flags import Parser, Rule, check_rules, positive, positive_float
from entropy_masking.errors import UsageError
from glue import metrics
from glue.files import FORMATS
from glue.protocols import FORMS, PROTOCOLS
from glue.tasks import TASKS, ZERO_SHOT, Task, choose

# what --help shows; --help-all shows the other flags too
GROUPS_OF_FLAGS = {
    "models and tasks": "model tasks task_file data seeds output overwrite",
    "fine-tuning": "protocol learning_rate epochs batch_size max_length limit_train drop_overlap dtype",
    "blimp and pairs": "pll limit_pairs",
    "workers": "num_workers gpus_per_worker",
}
# flags that only change fine-tuning, each with its value if it is not given
TUNING: dict[str, object] = dict.fromkeys(("learning_rate", "epochs", "batch_size", "max_length", "limit_train"))
TUNING |= {"drop_overlap": False, "protocol": "cramming", "dtype": "auto"}


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The flags, with ``models`` (paths by name), ``tasks`` and ``seeds`` parsed.

    Raises UsageError if a flag is wrong, or flags contradict each other.
    """
    parser = Parser("glue/run.py", description, GROUPS_OF_FLAGS)
    parser.usage = "%(prog)s --model MODEL … --tasks TASKS --data DATA --output DIR …"
    add = parser.add_argument
    models = "pretrained masked LM with its tokenizer, by path or Hub id, with an optional name"
    add("--model", required=True, nargs="+", action="extend", metavar="[NAME=]MODEL", help=models)
    add("--tasks", help="comma-separated names, glue (all nine), blimp, or pairs (made from docstrings)")
    own = "a task of your own: two files with the columns text, or text_a and text_b, and label; see docs/glue.md"
    add("--task-file", action="append", default=[], metavar="NAME=TRAIN,DEV[,METRIC]", help=own)
    add("--data", help=f"hub, or a directory with TASK/train and TASK/dev as {FORMATS}")
    add("--seeds", default="1", help="comma-separated seeds (default: 1)")
    add("--protocol", choices=PROTOCOLS, default="cramming", help="settings of fine-tuning (default: cramming)")
    add("--output", required=True, help="directory of the result files; those of named models go to OUTPUT/NAME")
    add("--num-workers", type=positive, default=1, help="Ray workers, each with a GPU or a core (default: 1, no Ray)")
    add("--gpus-per-worker", type=share, help="a fraction lets several workers share a GPU (default: 1)")
    add("--learning-rate", type=positive_float, help="learning rate (default: that of the protocol)")
    add("--epochs", type=positive, help="epochs (default: those of the protocol)")
    add("--batch-size", type=positive, help="rows per batch (default: that of the protocol)")
    add("--max-length", type=positive, help="tokens of a text or pair (default: 128)")
    add("--limit-train", type=positive, help="maximum number of training rows of a task, the same for every seed")
    add(
        "--pll",
        choices=FORMS,
        help="mask only the scored token (original), or also the rest of its word (within-word, default)",
    )
    add("--limit-pairs", type=positive, help="the first N pairs of each phenomenon (default: all)")
    add("--drop-overlap", action="store_true", help="do not train on rows that are also evaluation rows")
    dtypes = ["auto", "bfloat16", "float32"]
    add("--dtype", choices=dtypes, default="auto", help="auto (default): bfloat16 if the hardware has it")
    add("--trust-remote-code", action="store_true", help="run model code from the checkpoints")
    add("--overwrite", action="store_true", help="replace existing results")
    args = parser.parse_args(argv)
    args.as_yaml = parser.to_yaml()
    if not (args.tasks or args.task_file):
        raise UsageError("there is nothing to do; name tasks with --tasks, or a task of your own with --task-file")
    args.tasks = (choose(args.tasks) if args.tasks else []) + own_tasks(args.task_file)
    args.models = named_models(args.model)
    args.seeds = parse_seeds(args.seeds)
    if args.data and all(task.name == "pairs" or task.files for task in args.tasks):
        raise UsageError("no task of this run reads --data; leave it out")
    tuned = [task.name for task in args.tasks if task.name not in ZERO_SHOT]
    of_pairs = "{flag} only applies to the tasks blimp and pairs; add one to --tasks, or leave the flag out"
    of_tuning = "{flag} has no effect on blimp and pairs, which are scored without fine-tuning; leave it out"
    of_workers = "{flag} needs several workers; set --num-workers above 1, or leave it out"
    rules: list[Rule] = [
        (len(tuned) == len(args.tasks), {"pll": None, "limit_pairs": None}, of_pairs),
        (not tuned, TUNING, of_tuning),
        (args.num_workers == 1, {"gpus_per_worker": None}, of_workers),
    ]
    check_rules(vars(args), rules)
    args.pll = args.pll or FORMS[0]
    ray_cluster.check_kept("--output", args.output)
    return args


def share(text: str) -> float:
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; use more than 0 and at most 1: a trial uses one GPU")
    return value


def own_tasks(texts: list[str]) -> list[Task]:
    """Tasks of ``NAME=TRAIN,DEV[,METRIC[+METRIC]]``; their columns and labels are not known before they are read."""
    tasks: dict[str, Task] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        train, dev, *named = rest.split(",") if rest.count(",") in (1, 2) else ("", "")
        if not (re.fullmatch(r"\w[\w.-]*", name) and train and dev):
            raise UsageError(
                f"--task-file {text} is not NAME=TRAIN,DEV or NAME=TRAIN,DEV,METRIC, such as mood=train.tsv,dev.tsv,f1"
            )
        if name in tasks or name in ("glue", *TASKS, *metrics.AVERAGES):
            raise UsageError(f"--task-file {text}: there is another task or average {name}; choose another name")
        scores = tuple(dict.fromkeys(named[0].split("+"))) if named else ()
        kinds = (metrics.OF_CLASSES, metrics.OF_NUMBERS)
        if not any(set(scores) <= set(kind) for kind in kinds):
            known = "{} for classes, or {} for numbers".format(*map(", ".join, kinds))
            raise UsageError(f"--task-file {text}: {named[0]} is no metric; use {known}")
        tasks[name] = Task(name, (), (), scores, files=(Path(train), Path(dev)))
    return list(tasks.values())


def named_models(texts: list[str]) -> dict[str, str]:
    """Models by name: NAME of NAME=MODEL, else the last part of its path; "" for a single one without a name."""
    models: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = (Path(text).absolute().name if len(texts) > 1 else ""), text
        elif not (name and path):
            raise UsageError(f"--model {text} is not NAME=MODEL, such as random=runs/random")
        if name in models:
            raise UsageError(f"two models have the name {name}; give them names, as in --model a=PATH b=PATH")
        models[name] = path
    return models


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text} is not a list of whole numbers such as 1,2,3") from None
    if wrong := [seed for seed in seeds if not 0 <= seed < 1 << 32]:
        raise UsageError(f"--seeds {wrong[0]} is not between 0 and {(1 << 32) - 1}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text} has a seed twice; remove one")
    return seeds
