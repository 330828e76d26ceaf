"""What --corpus names: files, directories, links and wildcards; their order, identity and faults."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SCORE, refused
from texts import TEXTS, jsonl, texts_of, write_forms

from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards.commit import differences
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.readers import Rejects


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
