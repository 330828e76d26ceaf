"""Text in any common form → documents: nothing lost or doubled by cutting, rejects listed by line."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import TEXTS, jsonl, texts_of, write_forms

from entropy_masking.errors import UsageError
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.ranges import FileRange
from pipeline.corpus.readers import Reader, Rejects, read_documents


@pytest.mark.parametrize("shard_tokens", [10, 100, 1000, 1 << 20])
def test_every_form_gives_the_same_documents_however_it_is_cut(tmp_path: Path, shard_tokens: int) -> None:
    for name, path in write_forms(tmp_path).items():
        corpus = plan_corpus(str(path), shard_tokens=shard_tokens)
        assert texts_of(corpus) == TEXTS, name
        if shard_tokens <= 100 and name in ("a.txt", "a.jsonl", "a.parquet"):
            assert len(corpus.shards) > 5, name
        assert len(plan_corpus(str(path), shard_tokens=1 << 20).shards) == 1


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_any_cut_of_a_text_file_loses_and_doubles_nothing(tmp_path: Path, ending: str, last: str, unit: str) -> None:
    lines = ["\ufefffirst", "é", "", "two words", "", " \t\xa0", "x" * 20, "\xff", "", "語"]
    data = (ending.join(lines) + last).encode().replace("\xff".encode(), b"\xff")
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    expected = ["first", "é", "two words", "x" * 20, "語"] if unit == "line" else ["first é", "two words", "語"]
    for cut in range(1, len(data)):
        rejects = Rejects()
        ranges = [FileRange(str(path), unit, 0, cut), FileRange(str(path), unit, cut, len(data))]
        found = [document.text for document in read_documents(ranges, Reader(), rejects)]
        assert found == expected, cut
        assert rejects.documents == len(expected) + 1, "blank lines are no documents"
        bad = {"line": 8, "paragraph": 7}[unit]
        assert [(line_in_file(data, entry), entry["reason"]) for entry in rejects.listed] == [(bad, "bad UTF-8")], cut


def test_rejects_are_listed_with_their_line_in_the_file(tmp_path: Path) -> None:
    good = jsonl(["fine"]).rstrip()
    bad = {
        3: (b'{"text": "half', "broken JSON"),
        5: (b'{"text": "\xff"}', "bad UTF-8"),
        8: (b'{"text": null}', "null text"),
        9: (b'{"text": "  "}', "empty text"),
        12: (b'{"text": 7}', "text is not a string"),
        13: (b'{"body": "x"}', "no key 'text'"),
        14: (b"[1]", "not a JSON object"),
        15: (b'{"text": "\\ud800"}', "bad UTF-8"),
        17: (b"[" * 100_000, "broken JSON"),
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(bad[line][0] if line in bad else b" " * (line == 18) or good for line in range(1, 21)))
    for shard_tokens in (1, 10, 1 << 20):
        rejects = Rejects()
        assert texts_of(plan_corpus(str(path), shard_tokens=shard_tokens), rejects) == ["fine"] * 10, (
            "a blank line is no document"
        )
        found = {line_in_file(path.read_bytes(), entry): entry["reason"] for entry in rejects.listed}
        assert found == {line: why for line, (_, why) in bad.items()}
        assert rejects.documents == 19 and rejects.report()["count"] == len(bad)


def line_in_file(data: bytes, entry: dict[str, Any]) -> int:
    """The line of a rejected document in its file; ``line`` counts lines that begin at ``from_byte`` or later."""
    start = entry.get("from_byte", 0)
    return int(entry["line"]) + (data[: start - 1].count(b"\n") + 1 if start else 0)


def test_rejects_in_csv_and_parquet(tmp_path: Path) -> None:
    rows = ["id,text", '1,"two\nlines"', "2,", "3,a,b", "4,good", "5,\udcff", "6,last"]
    (tmp_path / "a.csv").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.csv")), rejects) == ["two\nlines", "good", "last"]
    found = [(entry["line"], entry["reason"]) for entry in rejects.listed]
    assert found == [(4, "empty text"), (5, "broken CSV row"), (7, "bad UTF-8")]

    invalid = pa.Array.from_buffers(pa.string(), 1, [*pa.array(["x" * 2]).buffers()[:2], pa.py_buffer(b"\xff\xfe")])
    column = pa.chunked_array([pa.array(["one", None, ""]), invalid, pa.array(["two"])])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.parquet"), shard_tokens=1), rejects) == ["one", "two"]
    found = [(entry["line"], entry["reason"]) for entry in rejects.listed]
    assert found == [(2, "null text"), (3, "empty text"), (4, "bad UTF-8")]


def test_a_stray_quotation_mark_costs_its_own_row_only(tmp_path: Path) -> None:
    rows = ["id,text", '1,"never closed', "2,two", '3,"three, 3"', '4,"four"x', '5,"two', 'lines"', '6,"six', "7,seven"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.csv")), rejects) == ["two", "three, 3", "two\nlines", "seven"]
    found = [(entry["line"], entry["reason"]) for entry in rejects.listed]
    assert found == [(line, "broken CSV row") for line in (2, 5, 8)] and rejects.documents == 7
    # in a TSV a quotation mark is a character
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"half\n2\ta "whole" one\n3\t"all"\n')
    assert texts_of(plan_corpus(str(tmp_path / "a.tsv"))) == ['"half', 'a "whole" one', '"all"']


def test_headers_are_read_as_rows_are(tmp_path: Path) -> None:
    (tmp_path / "cr.csv").write_bytes(b"id,text\r1,one\r2,two\r")
    (tmp_path / "header.csv").write_text('"first\ncolumn",text\n1,three\n')
    (tmp_path / "later.jsonl").write_text('{"meta": 1}\n' + '{"text": "four"}\n')
    names = ",".join(str(tmp_path / name) for name in ("cr.csv", "header.csv", "later.jsonl"))
    rejects = Rejects()
    assert texts_of(plan_corpus(names), rejects) == ["one", "two", "three", "four"]
    assert rejects.report()["reasons"] == {"no key 'text'": 1}


def test_names_of_parquet_columns(tmp_path: Path) -> None:
    table = pa.table({"a": [["x"]], "a.b": ["dotted"]})
    pq.write_table(table, tmp_path / "dot.parquet")
    corpus = plan_corpus(str(tmp_path / "dot.parquet"), text_column="a.b")
    found = [document.text for document in read_documents(corpus.shards[0], Reader(), Rejects())]
    assert found == ["dotted"]
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "twice.csv").write_text("text,text\nx,y\n")
    for name in ("twice.parquet", "twice.csv"):
        with pytest.raises(UsageError, match="several columns 'text'"):
            plan_corpus(str(tmp_path / name))


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ntwo\n".encode("utf-16"))
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.txt"), document="line"), rejects) == []
    assert rejects.report()["reasons"] == {"bad UTF-8": 1, "NUL characters (UTF-16?)": 2}


def test_a_document_in_each_line(tmp_path: Path) -> None:
    """Lines without blank lines would be one huge paragraph: this is refused until the user has chosen."""
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    assert texts_of(plan_corpus(str(path))) == ["one two"]
    assert texts_of(plan_corpus(str(path), document="line")) == ["one", "two"]
    path.write_text("a line\n" * 10_000)
    with pytest.raises(UsageError, match="pass --document line"):
        plan_corpus(str(path))
    assert len(texts_of(plan_corpus(str(path), document="line"))) == 10_000
    assert len(texts_of(plan_corpus(str(path), document="paragraph", shard_tokens=100))) == 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('[{"text": "x"},\n{"text": ]', "broken JSON .*: line 2 column 10"),
        ('[{"text": "x"}', "broken JSON .*: line 1 column 15"),
        ('[{"text": "x"}]\n[]', "broken JSON .Extra data: line 2"),
        ('[{"body": "x"}]', "no column 'text'"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        plan_corpus(str(tmp_path / "a.json"))


def test_rejects_of_an_array_have_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n[\n{"text": "one"},\n\n7, {"text": "two",\n"x": 1},\n{"text": null}\n]\n')
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.json")), rejects) == ["one", "two"]
    found = [(entry["line"], entry["reason"]) for entry in rejects.listed]
    assert found == [(2, "not a JSON object"), (4, "null text")]
