"""The tasks as data, and how their rows are read: GLUE's nine, minimal pairs, and tasks of one's own."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import polars as pl

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from glue import metrics
from glue.files import FORMATS, check_table, find_file, read_file

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
        files: the training and the dev file of a task of one's own. They decide its columns, its labels and, unless
            given, its metrics.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[str, ...] = ("",)
    files: tuple[Path, ...] = ()

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
# scored without fine-tuning (glue.blimp): no labels, no seeds
ZERO_SHOT = {name: Task(name, ("sentence_good", "sentence_bad"), ()) for name in ("blimp", "pairs")}
# MNLI without its mismatched evaluation
MATCHED = {"mnli_matched": replace(GLUE["mnli"], name="mnli_matched", evaluations=("_matched",))}
TASKS = GLUE | MATCHED | ZERO_SHOT
# the text columns of a task of one's own
TEXTS = (("text",), ("sentence",), ("text_a", "text_b"), PAIR)


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
    """Tasks by comma-separated names; ``glue`` names all of GLUE. Raises UsageError for an unknown name."""
    chosen = [task for name in names.split(",") for task in (GLUE if name.strip() == "glue" else [name.strip()])]
    if unknown := [name for name in chosen if name not in TASKS]:
        raise UsageError(f"there is no task {unknown[0]!r}; the tasks are glue, {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(chosen)]


def load(task: Task, data: str | None) -> TaskData:
    """The rows of a task from ``data``: ``hub``, or a directory with ``TASK/train.*`` and ``TASK/dev.*``.

    A task of one's own has its files, and comes back with the columns, labels and metrics that they decide.

    Raises UsageError for a file, column, text or label that is missing or wrong, and names it.
    """
    train_split = "train"
    if task.files:
        tables = [(read_file(path), str(path)) for path in task.files]
        task = _completed(task, *tables[0])
    elif data is None:
        raise UsageError(
            f"the task {task.name} needs --data: hub, or a directory with {task.directory}/train.* and "
            f"{task.directory}/dev{task.evaluations[0]}.* as {FORMATS}"
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
    if task.files and not task.labels:
        train, *evaluations = _standardised(train, *evaluations)
    return TaskData(task, train, dict(zip(task.evaluations, evaluations, strict=True)), train_split)


def _hub(task: Task, split: str) -> pl.DataFrame:
    import datasets

    try:
        return datasets.load_dataset(HUB_NAME, task.directory, split=split).to_polars()
    except Exception as error:  # datasets raises anything from OSError to its own classes
        raise UsageError(f"cannot load {HUB_NAME} {task.directory} ({split}) from the Hub: {one_line(error)}") from None


def _completed(task: Task, train: pl.DataFrame, where: str) -> Task:
    """A task of one's own with the columns, classes and metrics that its training rows decide."""
    found = [columns for columns in TEXTS if set(columns) <= set(train.columns)]
    if len(found) != 1:
        raise UsageError(
            f"{where} needs one text column (text or sentence) or one pair of them (text_a and text_b, or sentence1 "
            f"and sentence2), but has {', '.join(train.columns)}"
        )
    check_table(train, (*found[0], "label"), where)
    names = _names(train["label"], where)
    numbers = names.cast(pl.Float64, strict=False)
    fractions = numbers.is_finite().fill_null(False).all() and bool((numbers % 1 != 0).any())
    scores = task.metrics or (metrics.OF_NUMBERS if fractions else ("accuracy",))
    labels = () if scores[0] in metrics.OF_NUMBERS else tuple(sorted(set(names) - {""}))
    if names.n_unique() == 1:
        raise UsageError(f"all rows of {where} have the label {names[0]!r}; training needs several labels")
    if "f1" in scores and len(labels) > 2:
        raise UsageError(f"{where} has {len(labels)} labels, but f1 needs two; name another metric, such as accuracy")
    return replace(task, columns=found[0], labels=labels, metrics=scores)


def _standardised(train: pl.DataFrame, *others: pl.DataFrame) -> list[pl.DataFrame]:
    """Labels with the mean 0 and the deviation 1 in training, which any scale allows and no correlation notices."""
    mean, deviation = statistics.fmean(train["label"]), statistics.pstdev(train["label"])
    return [rows.with_columns((pl.col("label") - mean) / deviation) for rows in (train, *others)]


def _split(task: Task, frame: pl.DataFrame, where: str) -> pl.DataFrame:
    check_table(frame, (*task.columns, "label"), where)
    for name in task.columns:
        if frame[name].dtype not in (pl.String, pl.Categorical, pl.Enum):
            raise UsageError(f"the column {name} of {where} is {frame[name].dtype}, not text; convert it to text")
    labels = _labels(task, frame["label"], where)
    return frame.select(pl.col(task.columns).cast(pl.String), labels.alias("label"))


def _names(column: pl.Series, where: str) -> pl.Series:
    """Labels as text. A whole number is the same label with and without a decimal point."""
    if column.dtype.is_nested() or column.dtype == pl.Binary:
        raise UsageError(f"the column label of {where} is {column.dtype}; use text or numbers")
    return column.cast(pl.String).str.replace(r"^(-?\d+)\.0+$", "$1")


def _labels(task: Task, column: pl.Series, where: str) -> pl.Series:
    names = _names(column, where)
    if not task.files and (unlabelled := names == "-1").any():
        row = 1 + (unlabelled.arg_max() or 0)
        raise UsageError(f"{where} has the label -1 in row {row}: labels of a test split are not public; use dev")
    if task.labels:
        known = ", ".join(task.labels)
        ids = {} if task.files else {str(number): number for number in range(len(task.labels))}
        ids |= {name: number for number, name in enumerate(task.labels)}
        labels = names.replace_strict(ids, default=None, return_dtype=pl.Int64)
    else:
        known = "numbers" if task.files else f"numbers from 0 to {HIGHEST_SIMILARITY}"
        labels = names.cast(pl.Float64, strict=False)
        fits = labels.is_finite() if task.files else labels.is_between(0, HIGHEST_SIMILARITY)
        labels = labels.set(~fits, None)
    if (unknown := labels.is_null()).any():
        row = unknown.arg_max() or 0
        source = f"{task.files[0]} has" if task.files and task.labels else "the labels are"
        raise UsageError(f"{where} has the label {column[row]!r} in row {row + 1}; {source} {known}")
    return labels
