"""The tasks as data, and reading them: nine of GLUE from files or the Hub, two probes of our own, and BLiMP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from entropy_masking import storage
from entropy_masking.errors import UsageError
from glue import probes

HUB_NAME = "nyu-mll/glue"
MOST_ALIKE = 5  # the highest label of the regression, STS-B


@dataclass(frozen=True)
class Task:
    """A classification or regression task on one text or a pair.

    Attributes:
        columns: the text columns, as named in nyu-mll/glue.
        labels: the names of the classes in the order of their ids, never inferred; none for a regression.
        metrics: names of ``glue.metrics``.
        evaluations: suffix of each evaluation file and metric: MNLI has two.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[str, ...] = ("",)

    @property
    def directory(self) -> str:
        """Of its files, and its name on the Hub."""
        return self.name.removesuffix("_matched")


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("stsb", PAIR, (), ("pearson", "spearman")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            evaluations=("_matched", "_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), ENTAILMENT),
        Task("rte", PAIR, ENTAILMENT),
        Task("wnli", PAIR, ("not_entailment", "entailment")),
    )
}
PROBES = {
    "package": Task("package", ("text",), probes.PACKAGES),
    "adjacent": Task("adjacent", PAIR, ("apart", "adjacent")),
}
# scored without fine-tuning (glue.blimp), so neither labels nor seeds play a part
ZERO_SHOT = {"blimp": Task("blimp", ("sentence_good", "sentence_bad"), ())}
# MNLI where its mismatched evaluation is not at hand
MATCHED = {"mnli_matched": replace(GLUE["mnli"], name="mnli_matched", evaluations=("_matched",))}
TASKS = GLUE | MATCHED | PROBES | ZERO_SHOT
GROUPS = {"glue": tuple(GLUE), "probes": tuple(PROBES)}


@dataclass(frozen=True)
class Split:
    """Rows of a task: texts as one list a text column, labels [N] int64 (float64 for a regression)."""

    texts: list[list[str]]
    labels: np.ndarray

    def rows(self) -> Iterator[tuple[str, ...]]:
        return zip(*self.texts, strict=True)


@dataclass(frozen=True)
class TaskData:
    """A task's training rows and its evaluations by suffix; ``train_split`` names what was trained on."""

    task: Task
    train: Split
    evaluations: dict[str, Split]
    train_split: str

    @cached_property
    def hash(self) -> str:
        """Hash of all texts and labels."""
        splits = {"train": self.train, **{f"dev{suffix}": split for suffix, split in self.evaluations.items()}}
        return storage.sha256_json({name: [split.texts, split.labels.tolist()] for name, split in splits.items()})

    @cached_property
    def overlap(self) -> int:
        """How many rows of the evaluations have texts of training rows: their scores measure memory."""
        trained = set(self.train.rows())
        return sum(row in trained for split in self.evaluations.values() for row in split.rows())

    def without_overlap(self) -> TaskData:
        """The same evaluations, and the training rows whose texts are in none of them.

        Raises:
            UsageError: no row would be left.
        """
        evaluated = {row for split in self.evaluations.values() for row in split.rows()}
        kept = [number for number, row in enumerate(self.train.rows()) if row not in evaluated]
        if not kept:
            raise UsageError(f"all training rows of {self.task.name} are evaluated on too; check its files")
        texts = [[column[number] for number in kept] for column in self.train.texts]
        return replace(self, train=Split(texts, self.train.labels[kept]))


def choose(names: str) -> list[Task]:
    """Tasks by comma-separated names; ``glue`` and ``probes`` stand for all of theirs.

    Raises:
        UsageError: an unknown name.
    """
    chosen = [task for name in names.split(",") for task in GROUPS.get(name.strip(), (name.strip(),))]
    if unknown := [name for name in chosen if name not in TASKS]:
        raise UsageError(f"there is no task {unknown[0]!r}; the tasks are {', '.join([*GROUPS, *TASKS])}")
    return [TASKS[name] for name in dict.fromkeys(chosen)]


def load(task: Task, data: str | None) -> TaskData:
    """The rows of a task.

    Args:
        data: ``hub``, or a directory with ``TASK/train.*`` and ``TASK/dev.*``; not used by the probes.

    Raises:
        UsageError: a file, column or label is missing or wrong; names it.
    """
    if task.name in PROBES:
        frames = probes.make(task.name)
        return TaskData(
            task, _split(task, frames["train"], task.name), {"": _split(task, frames["dev"], task.name)}, "train"
        )
    if data is None:
        raise UsageError(
            f"the task {task.name} needs --data: a directory with {task.directory}/train.parquet …, or hub"
        )
    if data == "hub":
        train, where = _hub(task, "train"), f"{HUB_NAME} {task.directory}"
        frames = {suffix: _hub(task, f"validation{suffix}") for suffix in task.evaluations}
        evaluations = {suffix: _split(task, frame, where) for suffix, frame in frames.items()}
        return TaskData(task, _split(task, train, where), evaluations, "train")
    directory = Path(data) / task.directory
    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory}; --data needs one a task, named {task.directory} …")
    path = find_file(directory, "train", "train_subset")
    evaluations = {}
    for suffix in task.evaluations:
        found = find_file(directory, f"dev{suffix}", f"validation{suffix}")
        evaluations[suffix] = _split(task, read_file(found), str(found))
    return TaskData(task, _split(task, read_file(path), str(path)), evaluations, path.name.split(".")[0])


def find_file(directory: Path, *stems: str) -> Path:
    """The first file of these names, in any form. Raises UsageError if there is none."""
    candidates = [directory / f"{stem}.{ending}" for stem in stems for ending in ("parquet", "tsv", "jsonl")]
    for path in candidates:
        if path.exists():
            return path
    raise UsageError(f"{directory} has no {' or '.join(stems)} as .parquet, .tsv or .jsonl")


def read_file(path: Path) -> pl.DataFrame:
    """Its table. Raises UsageError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        if path.suffix == ".jsonl":
            return pl.read_ndjson(path, infer_schema_length=None)
        # GLUE's own files are not quoted: a quotation mark is a character, and an empty field an empty text
        return pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False).fill_null("")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def _hub(task: Task, split: str) -> pl.DataFrame:
    import datasets

    try:
        return datasets.load_dataset(HUB_NAME, task.directory, split=split).to_polars()
    except Exception as error:  # datasets raises anything from OSError to its own classes
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"cannot load {HUB_NAME} {task.directory} ({split}) from the Hub: {reason}") from None


def _split(task: Task, frame: pl.DataFrame, where: str) -> Split:
    if missing := [name for name in (*task.columns, "label") if name not in frame.columns]:
        raise UsageError(f"{where} has no column {missing[0]!r}, only {', '.join(frame.columns)}")
    if not len(frame):
        raise UsageError(f"{where} has no rows")
    texts = []
    for name in task.columns:
        column = frame[name]
        if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
            raise UsageError(f"{where} has no texts in {name}, but {column.dtype}; mend the column")
        column = column.cast(pl.String)
        if column.null_count():
            raise UsageError(f"{where} has no {name} in row {column.is_null().arg_max()}; mend or drop the row")
        texts.append(column.to_list())
    return Split(texts, _labels(task, frame["label"].to_list(), where))


def _labels(task: Task, values: list[Any], where: str) -> np.ndarray:
    ids = {name: number for number, name in enumerate(task.labels)}
    ids |= {str(number): number for number in range(len(task.labels))}
    labels = []
    for row, value in enumerate(values):
        if str(value) in ("-1", "-1.0"):
            raise UsageError(f"{where} has the label -1 in row {row}: a test split, whose labels are hidden; use dev")
        try:
            label = ids[str(value)] if task.labels else float(value)
        except (KeyError, TypeError, ValueError):
            label = np.nan
        if np.isnan(label) or (not task.labels and not 0 <= label <= MOST_ALIKE):
            known = ", ".join(task.labels) if task.labels else f"numbers from 0 to {MOST_ALIKE}"
            raise UsageError(f"{where} has the label {value!r} in row {row}; known are {known}")
        labels.append(label)
    return np.array(labels, np.int64 if task.labels else np.float64)
