"""What the tests share: running the entry points as a user does, and a small world to run them in."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

ROOT = Path(__file__).resolve().parents[2]
SCORE = [sys.executable, str(ROOT / "pipeline" / "score.py")]
TRAIN = [sys.executable, str(ROOT / "train" / "run.py")]
LENGTH, TOP_K = 32, 4


def run(*args: object, code: int = 0) -> str:
    """The output of a command, which must end with this exit code. A script runs in a fork without imports."""
    command = [str(arg) for arg in args]
    if command[0] == sys.executable and command[1].endswith(".py") and processes.has_same_environment():
        returned, printed = processes.run_script(command[1:], timeout=240)
    else:
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        returned, printed = result.returncode, result.stdout + result.stderr
    assert returned == code, f"exit code {returned}\n{printed}"
    return printed


def shell(command: str, directory: Path, code: int = 0, **environment: str) -> str:
    """Run a line of the documents in a shell, as after `source .venv/bin/activate`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == code, f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def refused(*args: object) -> str:
    """Run a command that must end with exit code 2 and one sentence, no traceback."""
    output = run(*args, code=2)
    assert "Traceback" not in output
    assert len([line for line in output.splitlines() if line.startswith("error: ")]) == 1, output
    return output


def save_bert(directory: Path, tokenizer: object, head: bool = True) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config) if head else BertModel(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_student_config(directory: Path, vocab_size: int) -> Path:
    """The configuration of a small BERT without dropout, for ``--model``."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertConfig(vocab_size=vocab_size, **sizes).save_pretrained(directory)
    return directory / "config.json"


def command(work: Path, output: Path, *more: str) -> list[str]:
    """Scoring the world's corpus, exactly and in many small shards."""
    flags = ["--corpus", work / "corpus.jsonl", "--teacher", work / "teacher", "--output", output]
    sizes = ["--sequence-length", LENGTH, "--top-k", TOP_K, "--shard-tokens", 1500, "--batch-tokens", 1024]
    return [*SCORE, *map(str, flags + sizes), "--dtype", "float32", *more]
