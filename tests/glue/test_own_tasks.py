"""Tasks of a user's own: files, labels and metrics; and what every form of a file has in common."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from made_glue import make_rows, write_rows
from made_results import compare_here

import glue.run
from entropy_masking.errors import UsageError
from glue.files import read_file
from glue.options import own_tasks
from glue.tasks import GLUE, TaskData, load

QUICK = ["--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--max-length", 32, "--dtype", "float32"]


def glue_here(output: Path, *flags: object) -> dict[str, dict[str, Any]]:
    """run.py's main in this process; returns the results by file."""
    glue.run.main([str(flag) for flag in ("--output", output, *flags)])
    return {path.stem: json.loads(path.read_text()) for path in sorted(output.glob("**/*.json"))}


def written(root: Path, ending: str, train: pl.DataFrame, dev: pl.DataFrame) -> str:
    """``TRAIN,DEV`` of --task-file."""
    write_rows(train, root / f"train.{ending}")
    write_rows(dev, root / f"dev.{ending}")
    return f"{root / 'train'}.{ending},{root / 'dev'}.{ending}"


def read(root: Path, train: list[object], dev: list[object], metric: str = "") -> TaskData:
    """The rows of a task with these labels."""
    frames = [pl.DataFrame({"text": ["a"] * len(own), "label": own}, strict=False) for own in (train, dev)]
    (task,) = own_tasks([f"own={written(root, 'jsonl', *frames)}{metric}"])
    return load(task, None)


def test_names_as_labels(work: Path, words: list[str], tmp_path: Path) -> None:
    """From a CSV as a spreadsheet writes it: with a mark, semicolons, quotation marks and CRLF."""
    for split, count in (("train", 64), ("dev", 24)):
        rows = make_rows(GLUE["sst2"], words, count, count).iter_rows()
        lines = [f'"{text}; ""ja"", sagt\n sie";{("süß", "bitter")[label]}' for text, label in rows]
        text = "text;label\r\n" + "".join(line + "\r\n" for line in lines)
        (tmp_path / f"{split}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    own = f"taste={tmp_path / 'train.csv'},{tmp_path / 'dev.csv'},f1+accuracy"
    flags = ["--model", work / "teacher", "--task-file", own, *QUICK]
    (result,) = glue_here(tmp_path / "out", *flags).values()
    assert list(result["metrics"]) == ["f1", "accuracy"] and (result["train_rows"], result["eval_rows"]) == (64, 24)
    assert result["constant_score"] == pytest.approx((50 + 200 / 3) / 2)
    assert result["key"]["labels"] == ["bitter", "süß"]


def test_the_scale_of_numbers_does_not_matter(work: Path, words: list[str], tmp_path: Path) -> None:
    names = {"sentence1": "text_a", "sentence2": "text_b"}
    rows = [make_rows(GLUE["stsb"], words, count, 1).rename(names) for count in (64, 24)]
    large = [own.with_columns(1e6 + 1e4 * pl.col("label")) for own in rows]
    flags = ["--model", work / "teacher", "--task-file", f"small={written(tmp_path / 'small', 'parquet', *rows)}"]
    flags += ["--task-file", f"large={written(tmp_path / 'large', 'parquet', *large)}"]
    large_result, small_result = glue_here(tmp_path / "out", *flags, *QUICK).values()
    assert list(large_result["metrics"]) == ["pearson", "spearman"]
    assert large_result["metrics"] == pytest.approx(small_result["metrics"], abs=1e-3)


def test_an_own_task_is_run_and_compared_as_those_of_glue(
    work: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the rows of RTE it has the numbers of RTE; no average has it."""
    files = f"{data / 'rte' / 'train.tsv'},{data / 'rte' / 'dev.tsv'}"
    flags = ["--model", f"a={work / 'teacher'}", f"b={work / 'teacher'}", "--seeds", "1,2", *QUICK]
    flags += ["--tasks", "rte", "--data", data, "--task-file", f"Ähnlich={files}", "--limit-train", 32]
    found = glue_here(tmp_path / "out", *flags)
    assert "Ähnlich: 2 classes (0, 1), by accuracy" in capfd.readouterr().err
    glue.run.main(["--config", str(tmp_path / "out" / "flags.yaml")])
    assert "8 of 8 results exist already" in capfd.readouterr().err
    for seed in (1, 2):
        own, rte = found[f"Ähnlich-seed{seed}"], found[f"rte-seed{seed}"]
        for name in ("metrics", "score", "constant_score", "train_rows", "eval_rows", "train_split", "collapsed"):
            assert own[name] == rte[name]
    glue_here(tmp_path / "out", *flags)
    assert "8 of 8 results exist already" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"has other settings .metrics: "):
        glue_here(tmp_path / "out", *(f"{flag},f1" if str(flag).startswith("Ähnlich=") else flag for flag in flags))

    table = compare_here(tmp_path / "compared", *(f"{name}={tmp_path / 'out' / name}" for name in "ab"))
    assert list(table["tasks"]) == ["rte", "Ähnlich"] and not table["averages"]
    assert table["tasks"]["Ähnlich"]["scores"] == table["tasks"]["rte"]["scores"]
    assert "| cramming | rte | Ähnlich |" in (tmp_path / "compared" / "table.md").read_text()


def test_rows_that_are_also_evaluation_rows_are_dropped(work: Path, words: list[str], tmp_path: Path) -> None:
    train, dev = (make_rows(GLUE["cola"], words, count, count) for count in (64, 24))
    own = f"own={written(tmp_path, 'jsonl', train, pl.concat([train[:6], dev]))},matthews"
    flags = ["--model", work / "teacher", "--task-file", own, *QUICK]
    (result,) = glue_here(tmp_path / "out", *flags, "--drop-overlap").values()
    assert (result["train_rows"], result["eval_rows"], list(result["metrics"])) == (58, 30, ["matthews"])


@pytest.mark.parametrize(
    ("labels", "metric", "classes", "numbers"),
    [
        (["no", "yes", "no"], "", ("no", "yes"), [0, 1, 0]),
        ([-1, 1, 0], "", ("-1", "0", "1"), [0, 2, 1]),
        ([1.0, 3.0, 1.0], "", ("1", "3"), [0, 1, 0]),
        (["2.0", "1.0", "1.0"], "", ("1", "2"), [1, 0, 0]),
        ([True, False, False], "", ("false", "true"), [1, 0, 0]),
        ([0, 1.5, 3], "", (), [-1.5, 0, 1.5]),
        ([0, 2, 4], ",pearson", (), [-2, 0, 2]),
    ],
)
def test_labels(tmp_path: Path, labels: list[object], metric: str, classes: tuple[str], numbers: list[float]) -> None:
    found = read(tmp_path, labels, labels[:2], metric)
    assert found.task.labels == classes
    assert found.task.metrics == (("pearson",) if metric else ("accuracy",) if classes else ("pearson", "spearman"))
    scale = 1.0 if classes else float(pl.Series(numbers).std(ddof=0))  # type: ignore[arg-type]
    assert found.train["label"].to_list() == pytest.approx([number / scale for number in numbers])
    assert found.evaluations[""]["label"].to_list() == found.train["label"].to_list()[:2]


@pytest.mark.parametrize(
    ("train", "dev", "metric", "sentence"),
    [
        (["a", "b"], ["a", "c"], "", r"dev.jsonl has the label 'c' in row 2; .*train.jsonl has a, b$"),
        ([1, 2], [0, 1], "", r"has the label 0 in row 1; .*train.jsonl has 1, 2$"),
        (["a", "a"], ["a"], "", r"all rows of .*train.jsonl have the label 'a'; training needs several labels"),
        (["a", "b", "c"], ["a"], ",f1", r"has 3 labels, but f1 needs two; name another metric, such as accuracy"),
        (["a", "b"], ["a"], ",pearson", r"train.jsonl has the label 'a' in row 1; the labels are numbers"),
        ([0.5, 1.5], [float("nan")], "", r"dev.jsonl has no label in row 1; fill in or drop the row"),
        (["a", "b", None], ["a"], "", r"train.jsonl has no label in row 3"),
        (["a", "b", ""], ["a"], "", r"train.jsonl has the label '' in row 3"),
        ([[1], [2]], [[1]], "", r"the column label of .*train.jsonl is List.*; use text or numbers"),
    ],
)
def test_wrong_labels(tmp_path: Path, train: list[object], dev: list[object], metric: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path, train, dev, metric)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("own", "is not NAME=TRAIN,DEV or NAME=TRAIN,DEV,METRIC, such as mood="),
        ("own=train.tsv", "is not NAME=TRAIN,DEV"),
        ("a/b=train.tsv,dev.tsv", "is not NAME=TRAIN,DEV"),
        ("rte=train.tsv,dev.tsv", "there is another task or average rte; choose another name"),
        ("glue8=train.tsv,dev.tsv", "there is another task or average glue8"),
        ("own=train.tsv,dev.tsv,bleu", "bleu is no metric; use accuracy, f1, matthews for classes, or pearson, spear"),
        ("own=train.tsv,dev.tsv,f1+pearson", r"f1\+pearson is no metric"),
    ],
)
def test_wrong_flags(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        own_tasks([text])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("own.tsv", "text\tlabel\na\tb\na\tb\tc\n", r"own.tsv: CSV parse error: Row #3: Expected 2 columns, got 3"),
        ("own.tsv", "text\tlabel\na\n", r"own.tsv: CSV parse error: Row #2: Expected 2 columns, got 1"),
        ("own.csv", 'text,label\n"a\nb",c\n"a"\n', r"own.csv: CSV parse error: Row #3: Expected 2 columns, got 1"),
        ("own.csv", "text,label,text\na,b,c\n", r"own.csv: .*names must be unique.*text"),
        ("own.jsonl", '{"text": "a"}\n\n{"text": "b"\n', r"own.jsonl has no JSON object in line 3; mend or remove"),
        ("own.jsonl", "[1]\n", r"own.jsonl has no JSON object in line 1"),
        ("own.tsv", "", r"own.tsv: Empty CSV file"),
        ("own.xlsx", "", r"its name does not end in .parquet, .tsv, .csv or .jsonl"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_file(tmp_path / name)


def test_a_table_without_its_columns(tmp_path: Path) -> None:
    for columns in ("text_a\tlabel", "text\ttext_a\ttext_b\tlabel", "satz\tlabel"):
        (tmp_path / "own.tsv").write_text(f"{columns}\n")
        (task,) = own_tasks([f"own={tmp_path / 'own.tsv'},{tmp_path / 'own.tsv'}"])
        with pytest.raises(UsageError, match=rf"needs one text column .* but has {', '.join(columns.split())}"):
            load(task, None)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_a_mark_and_crlf_are_no_part_of_the_text(tmp_path: Path, ending: str) -> None:
    lines = ['{"text": "ä", "label": "1.0"}'] if ending == "jsonl" else ["text\tlabel", "ä\t1.0", ""]
    text = "\r\n".join(lines).replace("\t", "," if ending == "csv" else "\t")
    (tmp_path / f"own.{ending}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_file(tmp_path / f"own.{ending}").rows() == [("ä", "1.0")]
    (tmp_path / f"own.{ending}").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=rf"cannot read .*own.{ending}: .*(UTF8|utf-8)"):
        read_file(tmp_path / f"own.{ending}")
