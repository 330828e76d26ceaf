"""GLUE's nine tasks with made rows, in every form and under every name that a file may have."""

from pathlib import Path

import numpy as np
import polars as pl

from glue.tasks import GLUE, Task

FORMS = {
    "cola": ("train.parquet", "dev.parquet"),
    "sst2": ("train.tsv", "dev.tsv"),
    "mrpc": ("train.jsonl", "dev.jsonl"),
    "qqp": ("train.parquet", "validation.tsv"),
    "stsb": ("train.tsv", "dev.jsonl"),
    "mnli": ("train.jsonl", "dev_matched.tsv", "dev_mismatched.parquet"),
    "qnli": ("train_subset.parquet", "dev.parquet"),
    "rte": ("train.tsv", "dev.tsv"),
    "wnli": ("train.parquet", "dev.jsonl"),
}


def make_rows(task: Task, words: list[str], count: int, seed: int) -> pl.DataFrame:
    """Texts whose label is which of the first words stands at the start of the first text."""
    rng = np.random.default_rng([seed, len(task.name)])
    kinds = rng.permutation(np.arange(count) % max(2, len(task.labels)))
    columns = {name: [" ".join(rng.choice(words[9:], 6)) for _ in kinds] for name in task.columns}
    first = task.columns[0]
    columns[first] = [f"{words[kind]} {words[kind]} {text}" for kind, text in zip(kinds, columns[first], strict=True)]
    return pl.DataFrame(columns | {"label": kinds if task.labels else kinds * 4.0 + rng.random(count)})


def write_rows(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path, separator="\t", quote_style="never")


def write_glue(root: Path, words: list[str]) -> None:
    for name, (train, *evaluations) in FORMS.items():
        write_rows(make_rows(GLUE[name], words, 64, 1), root / name / train)
        for number, file in enumerate(evaluations):
            write_rows(make_rows(GLUE[name], words, 24, 2 + number), root / name / file)
