"""Text in any common form → documents → sequences: nothing lost or doubled by cutting, rejects listed by line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SCORE, refused
from transformers import AutoTokenizer

from entropy_masking import storage
from entropy_masking.commands import docstrings
from entropy_masking.errors import UsageError
from entropy_masking.shards.commit import differences
from pipeline.corpus import readers
from pipeline.corpus.formats import FileRange
from pipeline.corpus.packing import pack, text_tokenizer, tokenize
from pipeline.corpus.plan import Corpus, plan_corpus
from pipeline.corpus.readers import Rejects, read_documents

TEXTS = [f"document {number}: " + "wörd naïve 語 " * (number % 7 + 1) + "." for number in range(60)]


def texts_of(corpus: Corpus, rejects: Rejects | None = None) -> list[str]:
    rejects = rejects or Rejects()
    return [document.text for ranges in corpus.shards for document in read_documents(ranges, "text", rejects)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_forms(root: Path) -> dict[str, Path]:
    """The same documents in every form: in plain text as paragraphs, some of several lines."""
    lines = "\n \n\n".join(text.replace(" wörd", "\n   wörd") for text in TEXTS).encode()
    bom, array = b"\xef\xbb\xbf", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    data = {"a.txt": lines, "a.md": bom + lines, "cr.txt": lines.replace(b"\n", b"\r"), "a.jsonl": bom + jsonl(TEXTS)}
    data |= {"a.json": jsonl(TEXTS), "array.json": bom + array}
    forms = {name: root / name for name in (*data, "a.txt.gz", "a.jsonl.zst")}
    for name, content in data.items():
        forms[name].write_bytes(content)
    forms["a.txt.gz"].write_bytes(gzip.compress(lines))
    forms["a.jsonl.zst"].write_bytes(pa.compress(jsonl(TEXTS), codec="zstd", asbytes=True))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(root / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *(["1", text] for text in TEXTS)])
        forms[name] = root / name
    texts = pa.array(TEXTS)
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())]
    for kind in kinds:
        forms[f"{kind}"] = root / f"{kind.id}.parquet"
        table = pa.table({"text": texts.cast(kind), "id": list(range(60))})
        pq.write_table(table, forms[f"{kind}"], row_group_size=7)
    forms["a.parquet"] = (root / f"{kinds[0].id}.parquet").rename(root / "a.parquet")
    del forms["string"]
    return forms


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
    lines = ["\ufefffirst", "é", "", "two words", "", " \t", "x" * 20, "\xff", "", "語"]
    data = (ending.join(lines) + last).encode().replace("\xff".encode(), b"\xff")
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    expected = ["first", "é", "two words", "x" * 20, "語"] if unit == "line" else ["first é", "two words", "語"]
    for cut in range(1, len(data)):
        rejects = Rejects()
        ranges = [FileRange(str(path), unit, 0, cut), FileRange(str(path), unit, cut, len(data))]
        found = [document.text for document in read_documents(ranges, "text", rejects)]
        assert found == expected, cut
        assert rejects.documents == len(expected) + 1, "blank lines are no documents"
        bad = {"line": 8, "paragraph": 7}[unit]
        assert rejects.listed == [{"file": str(path), "line": bad, "reason": "bad UTF-8"}], cut


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
        18: (b"", "empty text"),
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(bad[line][0] if line in bad else good for line in range(1, 21)) + b"\n")
    for shard_tokens in (1, 10, 1 << 20):
        rejects = Rejects()
        assert texts_of(plan_corpus(str(path), shard_tokens=shard_tokens), rejects) == ["fine"] * 10
        assert {entry["line"]: entry["reason"] for entry in rejects.listed} == {n: why for n, (_, why) in bad.items()}
        assert rejects.documents == 20 and rejects.report()["count"] == len(bad)


def test_far_into_a_file_rejects_are_numbered_from_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To number a line those before it are counted: not all of a huge file for each of its thousands of shards."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\0\ntwo\nthree\n\0\nfour\n")
    monkeypatch.setattr(readers, "COUNTED_BYTES", 4)
    rejects = Rejects()
    ranges = [FileRange(str(path), "line", 0, 5), FileRange(str(path), "line", 6)]
    assert len(list(read_documents(ranges, "text", rejects))) == 4
    near, far = rejects.listed
    assert near == {"file": str(path), "line": 2, "reason": "NUL characters (UTF-16?)"}
    assert far == {"file": str(path), "from_byte": 6, "line": 3, "reason": "NUL characters (UTF-16?)"}


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
    found = [document.text for document in read_documents(corpus.shards[0], corpus.text_column, Rejects())]
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
        ('[{"text": "x"},\n{"text": ]', "broken JSON from line 2 on"),
        ('[{"text": "x"}', "broken JSON from line 1 on"),
        ('[{"text": "x"}]\n[]', "more after its JSON array, from line 1"),
        ('[{"body": "x"}]', "no column 'text'"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        plan_corpus(str(tmp_path / "a.json"))


def test_rejects_of_an_array_have_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n[\n{"text": "one"},\n\n7, {"text": "two",\n"x": 1},\n{"text": null}\n]\n')
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path / "a.json")), rejects) == ["one", "two"]
    found = [(entry["line"], entry["reason"]) for entry in rejects.listed]
    assert found == [(5, "not a JSON object"), (7, "null text")]


def test_directories_globs_and_lists(tmp_path: Path) -> None:
    for name, text in {
        "b/two.txt": "two",
        "a/one.txt": "one",
        "c.txt": "three",
        ".hidden.txt": "no",
        "x.bin": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts_of(plan_corpus(str(tmp_path))) == ["one", "two", "three"]
    assert texts_of(plan_corpus(f"{tmp_path}/*/*.txt")) == ["one", "two"]
    assert texts_of(plan_corpus(f"{tmp_path}/**/*.txt")) == ["one", "two", "three"]
    assert texts_of(plan_corpus(f"{tmp_path}/c.txt,{tmp_path}/a")) == ["three", "one"]


def test_links_names_and_wildcards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link is followed, but not for ever. An existing path is not a pattern. Unknown files are named."""
    for name in ("a[1]*", "a1x", "b,c"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.txt").write_text(name)
        (tmp_path / name / "sub" / "up").symlink_to("..")
        (tmp_path / name / "other").symlink_to(tmp_path / name / "sub")
        (tmp_path / name / "notes.pdf").write_text("?")
    for spec, expected in {
        "a[1]*": ["a[1]*"] * 2,
        "a[1]*/**/*.txt": ["a[1]*"] * 2,
        "a[1]*/*/x.txt": ["a[1]*"] * 2,
        "a[1]?/*/x.txt": ["a1x"] * 2,
        "b,c": ["b,c"] * 2,
    }.items():
        assert texts_of(plan_corpus(f"{tmp_path}/{spec}")) == expected, spec
    assert "note: notes.pdf not read: unknown endings" in capsys.readouterr().err
    (tmp_path / "a1x" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"cannot read .*gone"):
        plan_corpus(f"{tmp_path}/a1x")
    (tmp_path / "b,c" / "\udcff.txt").write_text("x")
    with pytest.raises(UsageError, match="is not UTF-8; rename it"):
        plan_corpus(f"{tmp_path}/b,c")


@pytest.mark.parametrize("spec", ["{}", "{}/*/*", "{}/**/*.parquet", "{}/a.txt,{}/../texts"])
def test_an_output_within_its_corpus_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "sub/c.parquet"):
        (tmp_path / "texts" / name).write_text("one")
    spec = spec.format(*[tmp_path / "texts"] * 2)
    with pytest.raises(UsageError, match="is within the corpus"):
        plan_corpus(spec, output=f"{tmp_path}/texts/scored")
    plan_corpus(f"{tmp_path}/texts/*.txt", output=f"{tmp_path}/texts/scored")
    plan_corpus(f"{tmp_path}/texts/sub/b.txt", output=f"{tmp_path}/text")


def test_a_shard_directory_of_any_name(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens,*[1]").symlink_to(tokens)
    assert plan_corpus(f"{tmp_path}/tokens,*[1]").from_shards


def test_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond line")
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    rejects = Rejects()
    assert texts_of(plan_corpus(str(tmp_path), document="file"), rejects) == ["first line\nsecond line"]
    assert rejects.report()["reasons"] == {"bad UTF-8": 1}


def test_limit_documents_counts_across_files_and_forms(tmp_path: Path) -> None:
    write_forms(tmp_path)
    for limit in (1, 59, 60, 61, 130):
        for shard_tokens in (10, 1 << 20):
            corpus = plan_corpus(
                f"{tmp_path}/a.jsonl,{tmp_path}/a.parquet,{tmp_path}/a.csv",
                shard_tokens=shard_tokens,
                limit_documents=limit,
            )
            assert texts_of(corpus) == (TEXTS * 3)[:limit]


def test_a_dataset_that_the_datasets_library_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MASKING_CACHE", str(tmp_path / "cache"))
    for split, part in (("train", TEXTS[:40]), ("test", TEXTS[40:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": part}).to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert texts_of(plan_corpus(f"hf:{tmp_path}/data")) == TEXTS[:40]
    assert texts_of(plan_corpus(f"hf:{tmp_path}/data::test")) == TEXTS[40:]
    with pytest.raises(UsageError, match="cannot load the dataset"):
        plan_corpus(f"hf:{tmp_path}/nothing")


@pytest.mark.parametrize(
    "name, data, sentence",
    [
        ("a.parquet", b"PAR1 nothing", "cannot read .*a.parquet as Parquet"),
        ("a.jsonl", b'{"body": "x"}\n', "no column 'text'; name one of .'body'. with --text-column"),
        ("a.csv", b"id,body\n1,x\n", "--text-column"),
        ("a.txt", b"", "is empty"),
        ("a.doc", b"x", "known endings"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
    ],
)
def test_corpora_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=sentence):
        plan_corpus(str(tmp_path / name))


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="is int64, not text"):
        plan_corpus(str(tmp_path / "a.parquet"))
    with pytest.raises(UsageError, match="does not exist"):
        plan_corpus(str(tmp_path / "b.parquet"))


def test_a_gzip_that_ends_early_is_an_error_not_a_shorter_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    rng = np.random.default_rng(0)
    noise = "\n".join(rng.bytes(60).hex() for _ in range(20_000))
    path.write_bytes(gzip.compress(noise.encode())[:-100_000])
    with pytest.raises(UsageError, match="to its end"):
        texts_of(plan_corpus(str(path), document="line"))


def test_identity_is_the_content_not_the_place(tmp_path: Path) -> None:
    for directory, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "x.txt").write_text(text)
    identities = [plan_corpus(str(tmp_path / name)).identity for name in ("a", "b", "c")]
    assert identities[0] == identities[1] != identities[2]


def test_identity_knows_the_order_of_files_and_those_of_the_same_name(tmp_path: Path) -> None:
    for name in ("A/x.txt", "B/x.txt", "B/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    a, b, y = (str(tmp_path / name) for name in ("A/x.txt", "B/x.txt", "B/y.txt"))
    identities = [plan_corpus(spec).identity for spec in (f"{a},{b}", f"{b},{a}", b, f"{b},{y}", f"{y},{b}")]
    assert len({storage.sha256_json(identity) for identity in identities}) == 5
    assert all(name.startswith("files.") for name in differences(identities[3], identities[4]))
    assert any("files.1 x.txt: " in name for name in differences(identities[3], identities[4]))


@pytest.mark.parametrize("spec", ["", " ", "{},", ",{}", "{},,{}"])
def test_an_empty_part_of_a_list_is_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="empty part"):
        plan_corpus(spec.format("a.txt", "a.txt"))


def test_options_that_say_nothing_of_a_corpus(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["two"]))
    cases: list[tuple[Path, dict[str, Any]]] = [
        *((scored, option) for option in ({"text_column": "text"}, {"document": "line"}, {"shard_tokens": 7})),
        (scored, {"limit_documents": 1}),
        (tmp_path / "a.jsonl", {"document": "file"}),
        (tmp_path / "a.txt", {"text_column": "text"}),
    ]
    for path, option in cases:
        with pytest.raises(UsageError, match=f"leave out --{next(iter(option)).replace('_', '-')}"):
            plan_corpus(str(path), **option)
    assert len(plan_corpus(str(tmp_path), document="file", text_column="text").shards) == 1
    flags = ["--corpus", scored, "--teacher", "none", "--output", tmp_path / "out", "--document", "line"]
    assert "leave out --document" in refused(*SCORE, *flags)


def slow_pack(documents: list[list[int]], length: int) -> list[list[int]]:
    stream = [token for number, ids in enumerate(documents) for token in ([] if number == 0 else [2]) + ids]
    blocks = [stream[i : i + length - 2] for i in range(0, len(stream), length - 2)]
    return [[1, *block, 2] + [0] * (length - 2 - len(block)) for block in blocks]


@pytest.mark.parametrize("length", [8, 9, 32])
def test_packing(length: int) -> None:
    rng = np.random.default_rng(length)
    for _ in range(50):
        documents = [rng.integers(5, 99, rng.integers(1, 40)).tolist() for _ in range(rng.integers(1, 12))]
        ids_NL = pack((np.array(ids, np.uint32) for ids in documents), length, cls_id=1, sep_id=2, pad_id=0)
        assert ids_NL.tolist() == slow_pack(documents, length)
    assert pack([], length, 1, 2, 0).shape == (0, length)


def test_special_tokens_written_out_in_a_text_are_text(work: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    (tmp_path / "a.txt").write_text("abcde [MASK] fghab [SEP]\n\nabcde\n")
    rejects = Rejects()
    documents = read_documents(plan_corpus(str(tmp_path / "a.txt")).shards[0], "text", rejects)
    backend = text_tokenizer(tokenizer)
    backend.enable_truncation(99)
    first, second = tokenize(documents, backend, rejects)
    assert backend.truncation, "another thread may be encoding, so the options stay as they are"
    assert not set(first.tolist()) & ({tokenizer.mask_token_id, tokenizer.sep_token_id})
    assert len(first) > len(second) > 0


def test_docstrings_are_parsed_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts that share no file and no text, the same each time, short and repeated ones left out."""
    package = tmp_path / "site" / "demo_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for number in range(40):
        body = f'"""Module {number}. {"What it does is told at some length. " * 5}"""\n'
        body += f'def f():\n    """Function of {number}. {"Its use is explained here in full. " * 5}"""\n'
        body += 'def g():\n    """Short."""\n'
        body += f'def h():\n    """{"The same in every file, so kept only once. " * 5}"""\n'
        (package / f"m{number}.py").write_text(body)
    (package / "broken.py").write_text("def (")
    (package / "tests").mkdir()
    (package / "tests" / "t.py").write_text(f'"""{"Tests are left out of the corpus. " * 9}"""')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(docstrings, "PACKAGES", ("demo_package", "not_installed"))
    monkeypatch.setattr(docstrings, "packages_distributions", lambda: {name: [name] for name in docstrings.PACKAGES})
    monkeypatch.setattr(docstrings, "version", lambda distribution: "1")
    results = []
    for cache in ("one", "two"):
        monkeypatch.setenv("ENTROPY_MASKING_CACHE", str(tmp_path / cache))
        results.append({part: path.read_bytes() for part, path in docstrings.materialise().items()})
    assert results[0] == results[1]
    parts = {part: pq.read_table(path).to_pylist() for part, path in docstrings.materialise().items()}
    texts = {part: {row["text"] for row in rows} for part, rows in parts.items()}
    assert len(texts["pretrain"] | texts["probes"]) == len(parts["pretrain"]) + len(parts["probes"]) == 81
    assert parts["probes"] and not texts["pretrain"] & texts["probes"]
    assert not [text for text in texts["pretrain"] | texts["probes"] if "Tests are left" in text or "Short" in text]
    for number in range(40):
        homes = {part for part in texts for text in texts[part] if text.split(".")[0].endswith(f" {number}")}
        assert len(homes) == 1, "a file's docstrings are in one part"
    assert {row["package"] for row in parts["pretrain"]} == {"demo_package"}
    assert len(texts_of(plan_corpus("docstrings"))) == len(parts["pretrain"])


def test_docstrings_without_a_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ENTROPY_MASKING_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(docstrings, "PACKAGES", ())
    with pytest.raises(UsageError, match=r"Not a directory; set ENTROPY_MASKING_CACHE"):
        docstrings.materialise()
