"""The tasks as data, and their readers: GLUE's nine from files or the Hub, two probes, and BLiMP."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import polars as pl

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from glue import probes

HUB_NAME = "nyu-mll/glue"
HIGHEST_SIMILARITY = 5  # of STS-B, the only regression


@dataclass(frozen=True)
class Task:
    """A classification or regression task on one text or a pair.

    Attributes:
        columns: names of the text columns, as in nyu-mll/glue.
        labels: names of the classes, in the order of their ids; none for a regression.
        metrics: names of ``glue.metrics``.
        evaluations: suffixes of the evaluation files and of their metrics; MNLI has two.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[str, ...] = ("",)

    @property
    def directory(self) -> str:
        """Directory of the task's files, and its name on the Hub."""
        return self.name.removesuffix("_matched")

    @property
    def metric_names(self) -> set[str]:
        """The names in a result: each metric of each evaluation."""
        return {metric + suffix for metric in self.metrics for suffix in self.evaluations}


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
GLUE = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("stsb", PAIR, (), ("pearson", "spearman")),
        Task("mnli", ("premise", "hypothesis"), MNLI, evaluations=("_matched", "_mismatched")),
        Task("qnli", ("question", "sentence"), ENTAILMENT),
        Task("rte", PAIR, ENTAILMENT),
        Task("wnli", PAIR, ("not_entailment", "entailment")),
    )
}
PROBES = {
    "package": Task("package", ("text",), probes.PACKAGES),
    "adjacent": Task("adjacent", PAIR, ("apart", "adjacent")),
}
# scored without fine-tuning (glue.blimp): no labels, no seeds
ZERO_SHOT = {"blimp": Task("blimp", ("sentence_good", "sentence_bad"), ())}
# MNLI without its mismatched evaluation
MATCHED = {"mnli_matched": replace(GLUE["mnli"], name="mnli_matched", evaluations=("_matched",))}
TASKS = GLUE | MATCHED | PROBES | ZERO_SHOT
GROUPS = {"glue": tuple(GLUE), "probes": tuple(PROBES)}


@dataclass(frozen=True)
class TaskData:
    """A task's training rows and its evaluations by suffix; ``train_split`` names the file of the training rows.

    Rows have the texts of the task's columns and a ``label``: the number of a class, or a float for a regression.
    """

    task: Task
    train: pl.DataFrame
    evaluations: dict[str, pl.DataFrame]
    train_split: str

    @cached_property
    def hash(self) -> str:
        """Hash of all texts and labels."""
        splits = {"train": self.train, **{f"dev{suffix}": rows for suffix, rows in self.evaluations.items()}}
        columns = {name: [column.to_list() for column in rows] for name, rows in splits.items()}
        return storage.sha256_json({name: [texts, labels] for name, (*texts, labels) in columns.items()})

    @cached_property
    def overlap(self) -> int:
        """Number of evaluation rows whose texts are in the training rows too."""
        return sum(len(rows.join(self.train, self.task.columns, how="semi")) for rows in self.evaluations.values())

    def without_overlap(self) -> TaskData:
        """Without the training rows whose texts are also evaluation rows. Raises UsageError if no row is left."""
        evaluated = pl.concat(self.evaluations.values())
        kept = self.train.join(evaluated, self.task.columns, how="anti", maintain_order="left")
        if not len(kept):
            raise UsageError(f"all training rows of {self.task.name} are also evaluation rows; check its files")
        return replace(self, train=kept)


def choose(names: str) -> list[Task]:
    """Tasks by comma-separated names of tasks or ``GROUPS``. Raises UsageError for an unknown name."""
    chosen = [task for name in names.split(",") for task in GROUPS.get(name.strip(), (name.strip(),))]
    if unknown := [name for name in chosen if name not in TASKS]:
        raise UsageError(f"there is no task {unknown[0]!r}; the tasks are {', '.join([*GROUPS, *TASKS])}")
    return [TASKS[name] for name in dict.fromkeys(chosen)]


def load(task: Task, data: str | None) -> TaskData:
    """The rows of a task from ``data``: ``hub``, or a directory with ``TASK/train.*`` and ``TASK/dev.*``.

    Raises UsageError for a file, column, text or label that is missing or wrong, and names it.
    """
    train_split = "train"
    if task.name in PROBES:
        frames = probes.make(task.name)
        tables = [(frames[part], task.name) for part in ("train", "dev")]
    elif data is None:
        raise UsageError(
            f"the task {task.name} needs --data: hub, or a directory with {task.directory}/train.* and "
            f"{task.directory}/dev{task.evaluations[0]}.* as .parquet, .tsv or .jsonl"
        )
    elif data == "hub":
        splits = ["train", *(f"validation{suffix}" for suffix in task.evaluations)]
        tables = [(_hub(task, split), f"{HUB_NAME} {task.directory}") for split in splits]
    else:
        directory = Path(data) / task.directory
        if not directory.is_dir():
            raise UsageError(f"there is no directory {directory}; --data needs a directory for each task")
        paths = [find_file(directory, "train", "train_subset")]
        paths += [find_file(directory, f"dev{suffix}", f"validation{suffix}") for suffix in task.evaluations]
        tables = [(read_file(path), str(path)) for path in paths]
        train_split = paths[0].stem
    train, *evaluations = (_split(task, frame, where) for frame, where in tables)
    return TaskData(task, train, dict(zip(task.evaluations, evaluations, strict=True)), train_split)


def find_file(directory: Path, *stems: str) -> Path:
    """The first existing file of these names, in any format. Raises UsageError if there is none."""
    paths = [directory / f"{stem}.{ending}" for stem in stems for ending in ("parquet", "tsv", "jsonl")]
    if existing := [path for path in paths if path.exists()]:
        return existing[0]
    raise UsageError(f"{directory} has no {' or '.join(stems)} as .parquet, .tsv or .jsonl")


def read_file(path: Path) -> pl.DataFrame:
    """The table of a file. Raises UsageError if it cannot be read."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # polars would take some names for patterns
        if path.suffix == ".parquet":
            return pl.read_parquet(data)
        if path.suffix == ".jsonl":
            return pl.read_ndjson(data, infer_schema_length=None)
        # GLUE's own files are not quoted: a quotation mark is a character, and an empty field is an empty text
        return pl.read_csv(data, separator="\t", quote_char=None, infer_schema=False).fill_null("")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from None


def check_table(frame: pl.DataFrame, columns: Sequence[str], where: object) -> None:
    """Raises UsageError if one of the columns is missing or has a gap, or if there are no rows."""
    if missing := [name for name in columns if name not in frame.columns]:
        raise UsageError(f"{where} has no column {missing[0]!r}, only {', '.join(frame.columns)}")
    if not len(frame):
        raise UsageError(f"{where} has no rows")
    for name in columns:
        if (gaps := frame[name].is_null()).any():
            raise UsageError(f"{where} has no {name} in row {gaps.arg_max()}; fill in or drop the row")


def _hub(task: Task, split: str) -> pl.DataFrame:
    import datasets

    try:
        return datasets.load_dataset(HUB_NAME, task.directory, split=split).to_polars()
    except Exception as error:  # datasets raises anything from OSError to its own classes
        raise UsageError(f"cannot load {HUB_NAME} {task.directory} ({split}) from the Hub: {one_line(error)}") from None


def _split(task: Task, frame: pl.DataFrame, where: str) -> pl.DataFrame:
    check_table(frame, (*task.columns, "label"), where)
    for name in task.columns:
        if frame[name].dtype not in (pl.String, pl.Categorical, pl.Enum):
            raise UsageError(f"the column {name} of {where} is {frame[name].dtype}, not text; convert it to text")
    labels = _labels(task, frame["label"], where)
    return frame.select(pl.col(task.columns).cast(pl.String), labels.alias("label"))


def _labels(task: Task, column: pl.Series, where: str) -> pl.Series:
    names = column.cast(pl.String)
    if (unlabelled := names.is_in(["-1", "-1.0"])).any():
        raise UsageError(
            f"{where} has the label -1 in row {unlabelled.arg_max()}: labels of a test split are not public; use dev"
        )
    if task.labels:
        known = ", ".join(task.labels)
        ids = {str(number): number for number in range(len(task.labels))}
        ids |= {name: number for number, name in enumerate(task.labels)}
        labels = names.replace_strict(ids, default=None, return_dtype=pl.Int64)
    else:
        known = f"numbers from 0 to {HIGHEST_SIMILARITY}"
        labels = column.cast(pl.Float64, strict=False)
        labels = labels.set(~labels.is_between(0, HIGHEST_SIMILARITY), None)
    if (unknown := labels.is_null()).any():
        row = unknown.arg_max() or 0
        raise UsageError(f"{where} has the label {column[row]!r} in row {row}; known are {known}")
    return labels
