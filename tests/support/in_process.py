"""Scoring and training in the process of the test, with settings for the small world."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import pipeline.score
import train.explore
import train.run

SEED = 3
MASKS = ["--mask-source", "parquet", "--hard-share", 1, "--mask-temperature", 1, "--mask-seed", SEED]
TOP_8 = ["--top-k", 8, "--temperatures", "1,2"]
RANDOM, PARQUET, SELF = (["--entropy-source", source] for source in ("random", "parquet", "self"))
SMALL = ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--bf16", "false", "--seed", SEED]


def score_here(corpus: object, teacher: Path, output: Path, *flags: object) -> Path:
    """Run score.py's main; return its output directory."""
    named = ["--corpus", corpus, "--teacher", teacher, "--output", output, "--backend", "local", "--dtype", "float32"]
    pipeline.score.main([str(flag) for flag in (*named, "--batch-tokens", 2048, *flags)])
    torch.set_num_threads(1)  # scoring sets more, which make the small steps of training slow
    return output


def tokenize_here(corpus: object, tokenizer: Path, output: Path, *flags: object) -> Path:
    """Run score.py's main without a teacher; return its output directory."""
    named = ["--corpus", corpus, "--teacher", "none", "--tokenizer", tokenizer, "--output", output]
    pipeline.score.main([str(flag) for flag in (*named, "--backend", "local", *flags)])
    return output


def train_here(shards: Path, output: Path, *flags: object) -> dict[str, Any]:
    """Run run.py's main; return the summary."""
    train.run.main([str(flag) for flag in ("--shards", shards, "--output-dir", output, *SMALL, *flags)])
    return json.loads((output / "summary.json").read_text())


def weights(directory: Path) -> dict[str, Tensor]:
    """The parameters of a trained student by name."""
    return load_file(directory / "model.safetensors")


def explore_here(*arguments: object) -> None:
    """Run explore.py's main."""
    train.explore.main([str(argument) for argument in arguments])
