"""Flags: a dataclass as flags, values of a YAML file, and the help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from entropy_masking.commands.flags import Parser, option, positive
from entropy_masking.errors import UsageError


@dataclass(kw_only=True)
class Options:
    output: str | None = option("where")
    steps: int | None = option("how many")
    rate: float = option("how fast (default: 0.5)", 0.5)
    kind: Literal["a", "b"] | None = option("which")
    bf16: bool | None = option("whether")


def new_parser() -> Parser:
    parser = Parser("some/command.py", "What it does:\n    exactly", {"main flags": "steps models"})
    parser.add_fields(Options)
    parser.add_argument("--models", nargs="+", action="extend", help="several")
    parser.add_argument("--task", action="append", help="again and again")
    parser.add_argument("--dry-run", action="store_true", help="stop early")
    parser.add_argument("--workers", type=positive, help="how many workers")
    return parser


def parsed(*texts: str) -> dict[str, object]:
    return vars(new_parser().parse_args(texts))


def test_flags_of_a_dataclass() -> None:
    given = parsed("--steps", "3", "--kind=b", "--bf16", "--workers", "2")
    nothing = {"output": None, "steps": None, "rate": 0.5, "kind": None, "bf16": None}
    assert given == nothing | {
        "steps": 3,
        "kind": "b",
        "bf16": True,
        "models": None,
        "task": None,
        "dry_run": False,
        "workers": 2,
    }
    assert parsed("--bf16", "false", "--dry-run")["bf16"] is False


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--step", "3"], "--step is not a flag of some/command.py; the nearest is --steps, and --help-all lists all"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--steps="], "--steps is empty; give it a value"),
        (["--models", "s3://me:pass@bucket/x"], "--models is a URI with a password, a key or a signature; give"),
        (["--models=x", "s3://bucket/x?region=a&secret_key=pass"], "--models is a URI with a password"),
        (["--output", "https://host/x?X-Amz-Signature=pass"], "--output is a URI with a password"),
        (["--output", "abfs://box@account.net/x?sig=pass"], "--output is a URI with a password"),
        (["--bf16", "maybe"], "argument --bf16: 'maybe' is neither true nor false"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["--workers", "0"], "argument --workers: '0' is not a whole number above 0"),
    ],
)
def test_wrong_flags(flags: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*flags)
    assert str(caught.value).startswith(sentence)


def test_a_file_of_flags_and_the_command_line_which_wins(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("steps: 7\nrate: 1e-3\nbf16: false\ndry-run: true\nmodels: [x, y]\ntask: [a b, c]\nkind: b\n")
    given = parsed("--config", str(file), "--steps", "9", "--models", "z")
    assert given["steps"] == 9 and given["rate"] == 1e-3 and given["bf16"] is False and given["dry_run"] is True
    assert given["models"] == ["x", "y", "z"] and given["task"] == ["a b", "c"]
    assert given["kind"] == "b" and "config" not in given
    file.write_text("dry_run: false\n")
    assert parsed(f"--config={file}")["dry_run"] is False


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("stepps: 1", "--stepps is not a flag of some/command.py; the nearest is --steps"),
        ("- steps", "is not a mapping of flags to values"),
        ("steps: {a: 1}", "steps is not a value"),
        ("steps: [1, 2]", "steps is not a value"),
        ("models: [[a]]", "models is not a list of values"),
        ("steps: [", "cannot be read: "),
        ("steps: ''", "--steps is empty"),
        ("dry-run: maybe", "dry-run is 'maybe'; use true or false"),
        ("config: other.yaml", "--config is not a flag of some/command.py"),
    ],
)
def test_wrong_files_of_flags(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parsed("--config", str(file))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_flags_of_a_run_as_a_file_that_repeats_it(tmp_path: Path) -> None:
    texts = ["--steps", "3", "--rate=0.25", "--bf16", "--dry-run", "--output=~/x", "--kind", "a", "--steps=4"]
    texts += ["--models", "x", "y", "--models=z", "--task", "a b", "--task=c"]
    parser = new_parser()
    first = parser.parse_args(texts)
    file = tmp_path / "flags.yaml"
    file.write_text(parser.to_yaml())
    assert vars(first) == parsed("--config", str(file))


def test_help_shows_the_main_flags_and_help_all_the_others_too(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exited:
            parsed(flag)
        assert exited.value.code == 0
        shown[flag] = capsys.readouterr().out
    assert "What it does:\n    exactly\n" in shown["--help"] and "main flags:\n  --steps N" in shown["--help"]
    assert "--config FILE" in shown["--help"] and "--workers" not in shown["--help"]
    for name in ("steps", "rate", "models", "workers", "dry-run", "help-all"):
        assert shown["--help-all"].count(f"  --{name} ") == 1
