"""Files that somebody else wrote, with values to do harm: each is refused in one sentence that names the file."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import PARQUET
from made_results import compare_here, summary, write_results
from made_shards import LENGTH, ROWS, VOCAB, write_shards

import pipeline.status
import pipeline.verify
import train.explore
import train.run
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, manifests
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.parquet import TOP_K_COLUMNS
from entropy_masking.shards.read import read_rows
from entropy_masking.text import inline, printable
from glue.tables import when

ESCAPE = "\x1b[31m\x9b2J\u202e\nx"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound directory, not to be changed."""
    return write_shards(tmp_path_factory.mktemp("made") / "shards")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit(path: Path, change: Edit) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def sentence(call: Callable[[], object]) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises((UsageError, RunError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- manifests -------------------------------------------------------------------------------------------------------

MANIFESTS: dict[str, Edit] = {
    "vocabulary too small": lambda m: m.update(vocab_size=4),
    "vocabulary too large": lambda m: m.update(vocab_size=1 << 40),
    "mask token outside": lambda m: m["special_ids"].update(mask=10**6),
    "negative token": lambda m: m["special_token_ids"].append(-1),
    "all tokens special": lambda m: m.update(special_token_ids=list(range(VOCAB))),
    "mask token maskable": lambda m: m["special_token_ids"].remove(4),
    "length 0": lambda m: m.update(sequence_length=0),
    "another length": lambda m: m.update(sequence_length=9),
    "negative top k": lambda m: m.update(top_k=-1),
    "text for a number": lambda m: m.update(top_k="2"),
    "infinite temperature": lambda m: m.update(temperatures=[float("inf")]),
    "planned by the billion": lambda m: m.update(planned_shards=10**9),
    "planned beyond all": lambda m: m.update(planned_shards=10**400),
    "fewer planned": lambda m: m.update(planned_shards=1),
    "failed and listed": lambda m: m["failed"].update({"part-00001.parquet": "lost"}),
    "failed elsewhere": lambda m: m["failed"].update({"../x": "lost"}),
    "negative index": lambda m: m["shards"][0].update(index=-1),
    "one shard twice": lambda m: m["shards"].append(m["shards"][1]),
    "not in order": lambda m: m["shards"].reverse(),
    "a file elsewhere": lambda m: m["shards"][0].update(file="../part-00000.parquet"),
    "rows by the billion": lambda m: m["shards"][0].update(rows=10**15),
    "more tokens than rows": lambda m: m["shards"][0].update(tokens=ROWS * LENGTH + 1),
    "infinite entropies": lambda m: m["shards"][0].update(entropy_sum=1e999),
    "no rows": lambda m: [entry.update(rows=0, tokens=0, scored_tokens=0, entropy_sum=0.0) for entry in m["shards"]],
    "no totals": lambda m: m.update(totals={}),
    "other totals": lambda m: m["totals"].update(tokens=1),
    "negative seconds": lambda m: m["totals"].update(worker_seconds=-1.0),
    "another context": lambda m: m.update(context="full"),
    "another fingerprint": lambda m: m["fingerprint"].update(passes=3),
    "corpus without files": lambda m: m["fingerprint"].update(corpus={"files": [1]}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_is_checked_by_value(copy: Path, change: Edit) -> None:
    edit(copy / "manifest.json", change)
    text = sentence(lambda: manifests.read_manifest(str(copy)))
    assert str(copy / "manifest.json") in text and "is not a shard manifest" in text


COMMANDS: dict[str, Callable[[Path], object]] = {
    "verify": lambda path: pipeline.verify.main([str(path)]),
    "status": lambda path: pipeline.status.main([str(path)]),
    "explore": lambda path: train.explore.main([str(path)]),
    "train": lambda path: train.run.main(
        ["--shards", str(path), *PARQUET, "--output-dir", str(path.parent / "out"), "--max-steps", "1"]
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_all_commands_check_alike(copy: Path, command: Callable[[Path], object]) -> None:
    sound = (copy / "manifest.json").read_text()
    for change in (MANIFESTS["no totals"], MANIFESTS["planned by the billion"], MANIFESTS["rows by the billion"]):
        edit(copy / "manifest.json", change)
        assert "manifest.json" in sentence(lambda: command(copy))
        (copy / "manifest.json").write_text(sound)
    for broken in ("[" * 100_000, '{"kind": "\\ud800"}', "1" * 5000):
        (copy / "manifest.json").write_text(broken)
        assert "manifest.json" in sentence(lambda: command(copy))
    assert not (copy.parent / "out").exists()


# --- records ---------------------------------------------------------------------------------------------------------

RECORDS: dict[str, Edit] = {
    "time as a number": lambda r: r.update(finished_at=5),
    "no time": lambda r: r.update(finished_at="yesterday"),
    "infinite seconds": lambda r: r.update(seconds=float("inf")),
    "FLOPs beyond all": lambda r: r.update(flops=10**400),
    "too many tokens": lambda r: r.update(tokens=10**6),
    "another file": lambda r: r.update(file="part-00001.parquet"),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS.keys())
def test_a_shard_with_a_wrong_record_is_not_done(copy: Path, change: Edit) -> None:
    run = manifests.read_json_file(commit.Run, manifests.run_uri(str(copy)))
    assert run and len(commit.done_records(str(copy), run)) == 2
    edit(copy / "_records" / "part-00000.json", change)
    assert list(commit.done_records(str(copy), run)) == [1]
    assert commit.done_record(str(copy), 0, run) is None
    (copy / "manifest.json").unlink()
    assert pipeline.status.status(str(copy), 0.0)["done"] == 1


def test_an_unfinished_run_may_plan_any_number_of_shards(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "manifest.json").unlink()
    edit(copy / "_records" / "run.json", lambda run: run.update(shards=1 << 30))
    pipeline.status.main([str(copy)])
    assert "unfinished, 2 of 1,073,741,824 shards" in capsys.readouterr().out
    edit(copy / "_records" / "run.json", lambda run: run.update(shards=10**12))
    for command in (pipeline.status.main, pipeline.verify.main):
        assert "run.json" in sentence(lambda command=command: command([str(copy)]))


# --- shards ----------------------------------------------------------------------------------------------------------


def beyond(row: int, shape: tuple[int, ...]) -> np.ndarray:
    ids = np.full(shape, 5)
    ids[row] = VOCAB
    return ids


@pytest.mark.parametrize("name", ["input_ids", "topk_ids"])
def test_token_ids_outside_the_vocabulary_reach_no_model(tmp_path: Path, name: str) -> None:
    shape = (ROWS, LENGTH) if name == "input_ids" else (ROWS, LENGTH, 2)
    first = manifests.read_manifest(str(write_shards(tmp_path / "first", **{name: beyond(0, shape)})))
    assert "part-00001.parquet has token ids outside the vocabulary" in sentence(lambda: check_shards(first))
    # a later row group is checked when it is read
    later = manifests.read_manifest(str(write_shards(tmp_path / "later", **{name: beyond(ROWS - 1, shape)})))
    check_shards(later)
    columns = TOP_K_COLUMNS
    text = sentence(lambda: read_rows(later, later.shards[1], columns, [1]))
    assert "part-00001.parquet does not match its manifest (it has the token id 24" in text


# --- tables and the terminal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [ESCAPE, "a|b\n\n# heading <img src=x>", "![x](http://host)\r\n| 1 | 2 |", "=1+1,\n'\"", "\ud800"]
)
def test_tables_stay_tables(tmp_path: Path, name: str) -> None:
    training = summary("parquet", 1) | {"regime": name, "model": name, "warnings": [name]}
    training["flags"] |= {"note": name}
    write_results(tmp_path / "a", {"cola": {1: 0.5}}, summary("random", 1))
    write_results(tmp_path / "b", {"cola": {1: 0.6}}, training)
    arguments = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    if "\ud800" in name:
        assert "cola-seed1.json" in sentence(lambda: compare_here(tmp_path / "out", *arguments))
        return
    compare_here(tmp_path / "out", *arguments)
    markdown = (tmp_path / "out" / "table.md").read_text()
    lines = markdown.splitlines()
    assert "<img" not in markdown and "](" not in markdown and "\x1b" not in markdown
    assert not [line for line in lines if line.startswith("#") and not line.startswith("### ")]
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 5  # a heading, two rows for two regimes


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(ESCAPE) == "\\x1b[31m\\x9b2J\\u202e\nx" and printable("\ud800é עִ\t") == "\\ud800é עִ\t"
    assert inline(ESCAPE + "<b>[x](y)") == "\\x1b[31m\\x9b2J\\u202e x&lt;b>[x] (y)"

    def main() -> None:
        print(ESCAPE)
        console.note(ESCAPE)
        raise UsageError(ESCAPE)

    with pytest.raises(SystemExit):
        console.run(main)
    shown = "".join(capsys.readouterr())
    assert shown.count("\\x1b[31m") == 3 and not {"\x1b", "\x9b", "\u202e"} & set(shown)


def test_names_in_a_manifest_are_shown_without_control_characters(copy: Path) -> None:
    edit(copy / "manifest.json", lambda m: m.update(teacher=f"a{ESCAPE}"))
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        console.run(lambda: train.explore.main([str(copy)]))
    assert "entropies by a\\x1b[31m" in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_costs_beyond_all_numbers_never_pay_off() -> None:
    assert when({"tokens": 1.0, "students": float("inf"), "epochs": float("inf")}, "students") == "never"
