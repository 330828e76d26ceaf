"""One small world for all tests: a corpus, a tokenizer, two teachers with made weights, and the scored corpus."""

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# neither the machine's Ray cluster, nor one that a test beside this one starts, is to be joined
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")  # short: sockets lie below it
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # 15, the default, starves beside another test
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from browser import Browser
from harness import LENGTH, ROOT, command, run, save_bert
from in_process import MASKS, TOP_8, score_here, tokenize_here
from made_glue import write_glue
from made_results import names_of, write_regimes
from transformers import AutoTokenizer, BertForMaskedLM


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, set before any fixture runs: another number of threads rounds sums differently.

    Scoring in a test's own process takes all cores.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 400 documents, a tokenizer trained on it, and a random-weight BERT over that vocabulary."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)])
    lines = [{"text": " ".join(rng.choice(words, rng.integers(5, 60)))} for _ in range(400)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = ["--corpus", root / "corpus.jsonl", "--vocab-size", 300, "--output", root / "tokenizer"]
    run(sys.executable, ROOT / "pipeline" / "tokenizer.py", *tokenizer, "--lowercase")
    save_bert(root / "teacher", AutoTokenizer.from_pretrained(root / "tokenizer"))
    return root


@pytest.fixture(scope="session")
def scored(work: Path) -> Path:
    """Its shards with entropies and top-k log-probabilities; not to be changed."""
    run(*command(work, work / "scored", "--backend", "local"))
    return work / "scored"


@pytest.fixture(scope="session")
def tokens(work: Path) -> Path:
    """Its shards without scores; not to be changed."""
    sizes = ["--sequence-length", LENGTH, "--shard-tokens", 5000]
    return tokenize_here(work / "corpus.jsonl", work / "tokenizer", work / "token-shards", *sizes)


@pytest.fixture(scope="session")
def sharp_teacher(work: Path) -> Path:
    """A teacher that is surer of some tokens than of others; with random weights all are about as likely."""
    directory = work / "sharp teacher"
    shutil.copytree(work / "teacher", directory)
    model = BertForMaskedLM.from_pretrained(directory)
    model.cls.predictions.transform.LayerNorm.weight.data.mul_(20)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sharp(work: Path, sharp_teacher: Path) -> Path:
    """Shards with the scores of the sharp teacher, in two passes, with a temperature; not to be changed."""
    sizes = ["--limit-documents", 170, "--shard-tokens", 800, "--sequence-length", LENGTH, "--passes", 2]
    return score_here(work / "corpus.jsonl", sharp_teacher, work / "sharp", *sizes, *TOP_8)


@pytest.fixture(scope="session")
def sharp_targets(work: Path, sharp: Path, sharp_teacher: Path) -> Path:
    """Targets for these shards; not to be changed."""
    return score_here(sharp, sharp_teacher, work / "sharp targets", *MASKS, *TOP_8)


@pytest.fixture(scope="session")
def words(work: Path) -> list[str]:
    """A hundred different words of the corpus."""
    text = (work / "corpus.jsonl").read_text()
    return list(dict.fromkeys(word for word in text.replace('"', " ").split() if len(word) == 5))[:100]


@pytest.fixture(scope="session")
def data(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of GLUE's nine tasks; not to be changed."""
    root = tmp_path_factory.mktemp("glue")
    write_glue(root, words)
    return root


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of four regimes; not to be changed."""
    return write_regimes(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def compared(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their comparison by the command; not to be changed."""
    output = tmp_path_factory.mktemp("comparison")
    printed = run(sys.executable, ROOT / "glue" / "compare.py", *names_of(results), "--output", output)
    assert (output / "table.md").read_text() in printed
    return output


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab; for tests that are marked ``needs_browser``."""
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
