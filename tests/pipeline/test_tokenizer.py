"""tokenizer.py as its users run it."""

import errno
import sys
import tracemalloc
from pathlib import Path

import pytest
from harness import ROOT, SCORE, refused, run
from transformers import AutoTokenizer, BertTokenizer

import train.options
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.masking.collator import EntropyMaskingCollator
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.models.checkpoints import load_tokenizer
from entropy_masking.shards import manifests
from pipeline import tokenizer as command
from pipeline.corpus.plan import plan_corpus
from pipeline.tokenizer import KINDS, main, parse

COMMAND = [sys.executable, ROOT / "pipeline" / "tokenizer.py"]


def test_it_loads_and_is_reproducible(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--corpus", str(work / "corpus.jsonl"), "--lowercase", "--vocab-size", "250"]
    assert "250 tokens from 400 documents" in run(*COMMAND, *flags, "--output", tmp_path / "one")
    main([*flags, "--output", str(tmp_path / "two")])
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.is_fast and len(tokenizer) == 250
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    encoded = tokenizer("ABCDE", "fgh").input_ids
    assert encoded[0] == 2 and encoded.count(3) == 2 and encoded[-1] == 3
    assert tokenizer.decode(tokenizer("Abcde fghab").input_ids, skip_special_tokens=True) == "abcde fghab"

    main([*flags, "--output", str(tmp_path / "one")])
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="with other settings"):
        main([*flags[:-1], "260", "--output", str(tmp_path / "one")])


def test_the_same_command_goes_on_after_a_kill(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--corpus", str(work / "corpus.jsonl"), "--vocab-size", "250", "--output", str(tmp_path / "out")]

    def killed(_: object, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.tokenizer.commit.save_tokenizer", killed)
        main(flags)
    main(flags)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 250


def test_the_corpus_is_not_held_in_memory(tmp_path: Path) -> None:
    size = 6_000_000
    (tmp_path / "a.txt").write_text(("some words of a text " * 50 + "\n\n") * (size // 1052))
    texts = command.Texts(plan_corpus(str(tmp_path / "a.txt")))
    tracemalloc.start()
    tokenizer = command.train(texts, 270, "bpe")
    command.print_coverage(tokenizer, texts)
    assert tracemalloc.get_traced_memory()[1] < size / 2
    tracemalloc.stop()


def test_sizes_that_do_not_fit_the_corpus(work: Path, tmp_path: Path) -> None:
    flags = ["--corpus", str(work / "corpus.jsonl"), "--output", str(tmp_path / "out"), "--vocab-size"]
    with pytest.raises(UsageError, match="too small"):
        main([*flags, "10"])
    with pytest.raises(UsageError, match="choose at most") as refusal:
        main([*flags, "1000000"])
    main([*flags, str(refusal.value).rpartition("choose at most ")[2]])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_without_a_word(kind: str) -> None:
    """Case, accents and vowel signs stay unless a flag asks to remove them; a decomposed character is composed."""
    texts = ["Some Café cafe\u0301 हिन्दी में किताब ที่นี่มีข้าว 語"] * 20
    text = "Cafe\u0301 CAFÉ हिन्दी มีข้าว"
    for flags, expected in {
        (): "Café CAFÉ हिन्दी มีข้าว",
        (True,): "café café हिन्दी มีข้าว",
        (True, True): "cafe cafe हिनदी มขาว",
    }.items():
        tokenizer = command.train(texts, most(texts, kind, *flags), kind, *flags)
        assert tokenizer.backend_tokenizer.normalizer.normalize_str(text) == expected
        if kind == "bpe":
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == expected


def most(texts: list[str], kind: str, *names: bool) -> int:
    """The largest vocabulary that texts give."""
    with pytest.raises(UsageError) as refusal:
        command.train(texts, 10_000, kind, *names)
    return int(str(refusal.value).rpartition("choose at most ")[2])


def test_a_bpe_tokenizer_has_no_unknown_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rare = "".join(chr(0x4E00 + number) for number in range(1500))
    (tmp_path / "a.txt").write_text(f"some words in any case, {rare}\n\n" * 3)
    flags = ["--corpus", str(tmp_path / "a.txt"), "--vocab-size"]
    main([*flags, "1015", "--output", str(tmp_path / "wordpiece")])
    printed = capsys.readouterr()
    assert "tokens per word" in printed.out and "use --kind bpe" in printed.err
    for name in ("bpe", "again"):
        main([*flags, "300", "--kind", "bpe", "--output", str(tmp_path / name)])
    printed = capsys.readouterr()
    assert "0.00% of the tokens are [UNK]" in printed.out and "warning" not in printed.err
    assert (tmp_path / "bpe/tokenizer.json").read_bytes() == (tmp_path / "again/tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    ids = tokenizer("words in", "any case").input_ids
    assert tokenizer.decode(ids) == "[CLS] words in[SEP] any case[SEP]" and sorted(tokenizer.all_special_ids) == [
        0,
        1,
        2,
        3,
    ]
    heads = [tokenizer.decode([token]) for token in ids if not continuing_tokens(tokenizer, 300)[token]]
    assert len(heads) == 7, "four words and three special tokens"


def test_the_first_rejected_document_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' + '{"text": "some words and a line"}\n' * 9)
    main(["--corpus", str(tmp_path / "a.jsonl"), "--vocab-size", "30", "--output", str(tmp_path / "out")])
    assert "1 rejected, the first in " in (printed := capsys.readouterr().out) and "a.jsonl, line 1: empty" in printed


def test_home_and_file_uris_are_understood_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = parse(["--corpus", "~/a,file:///b%20c,d~", "--output=~/out"])
    assert flags.corpus == f"{tmp_path}/a,/b c,d~" and flags.output == tmp_path / "out"
    run_flags = ["--shards=file:///tokens", "--entropy-source", "random", "--output-dir", "~/run"]
    options, training = train.options.parse(run_flags, None)
    assert options.shards == "/tokens" and training.output_dir == f"{tmp_path}/run"
    with pytest.raises(UsageError, match="names the host elsewhere"):
        parse(["--corpus", "file://elsewhere/a", "--output", "x"])


def test_ids_with_a_gap(work: Path, tmp_path: Path) -> None:
    """A token that vocab.txt has twice has the second number, so the greatest number is the number of tokens."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "twice", "twice", "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 7 and manifests.from_tokenizer(tokenizer)["vocab_size"] == 8
    assert len(continuing_tokens(tokenizer, manifests.vocabulary_size(tokenizer))) == 8
    row = {"input_ids": [2, 7, 6, 7, 3], "entropy": [0.0, 1.0, 1.0, 1.0, 0.0], "sequence_id": 0}
    assert EntropyMaskingCollator(tokenizer, MaskPolicy(ratio=0.5))([row])["input_ids"].shape == (1, 5)


def test_what_is_no_tokenizer(work: Path, tmp_path: Path) -> None:
    """From config.json alone AutoTokenizer would make one of five tokens, to which every text is [UNK]."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((work / "teacher" / "config.json").read_bytes())
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path / "bare"))
    with pytest.raises(UsageError, match="argument --vocab-size: 'x' is not a whole number above 0"):
        parse(["--corpus", "x", "--output", "x", "--vocab-size", "x"])
    with pytest.raises(UsageError, match="--output is empty"):
        parse(["--corpus", "x", "--output", ""])
    with pytest.raises(UsageError, match="argument --vocab-size: '-5' is not a whole number above 0"):
        parse(["--corpus=x", "--output=y", "--vocab-size=-5"])


def test_files_and_directories_that_cannot_be_used(work: Path, tmp_path: Path) -> None:
    """One sentence that names the file, whether Python or Arrow finds the fault."""
    (tmp_path / "file").write_text("x")
    corpus = ["--corpus", work / "corpus.jsonl"]
    flags = [*corpus, "--vocab-size", 250, "--output"]
    assert "file" in refused(*COMMAND, *flags, tmp_path / "file")
    assert "file/below" in refused(*COMMAND, *flags, tmp_path / "file" / "below")
    tokens = ["--teacher", "none", "--tokenizer", work / "tokenizer", "--backend", "local", "--output"]
    assert "file" in refused(*SCORE, *corpus, *tokens, tmp_path / "file")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "made_from.json").write_text("{")
    assert "with other settings" in refused(*COMMAND, *flags, tmp_path / "half")


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            2,
            "error: /a/b: Permission denied; give this user permission",
        ),
        (
            OSError(errno.EROFS, "Failed to open '/a/b'.\n Detail: read-only"),
            2,
            "error: Failed to open '/a/b'. Detail: ",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "failed: /a/b: No space left on device\n"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), 1, "failed: Connection reset\n"),
    ],
)
def test_file_errors_are_one_sentence(
    capsys: pytest.CaptureFixture[str], error: OSError, code: int, sentence: str
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        console.run(main)
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(sentence)
