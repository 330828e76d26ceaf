"""A run that is killed and started again logs the losses and gradient norms of one that was never interrupted."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import SCORE, TOP_K, run
from processes import Run, history
from transformers import BertConfig

from entropy_masking.shards.manifests import read_manifest

STEPS, SAVE, BATCH = 8, 3, 8


class Cell(NamedTuple):
    source: str
    workers: int
    accumulation: int
    distil: bool
    ranks: int


VALUES = Cell(("random", "parquet", "targets", "step", "means"), (0, 2, 8), (1, 4), (False, True), (1, 2))
MATRIX = [cell for cell in map(Cell._make, itertools.product(*VALUES)) if cell.distil or cell.source != "targets"]
CELLS = [
    Cell("random", 0, 1, False, 1),
    Cell("random", 2, 4, True, 2),
    Cell("random", 8, 4, False, 1),
    Cell("parquet", 0, 4, True, 2),
    Cell("parquet", 2, 1, False, 1),
    Cell("parquet", 8, 1, True, 1),
    Cell("targets", 0, 1, True, 2),
    Cell("targets", 2, 4, True, 1),
    Cell("targets", 8, 4, True, 1),
    Cell("step", 0, 4, False, 1),
    Cell("step", 2, 1, True, 1),
    Cell("step", 8, 1, False, 2),
    Cell("means", 0, 1, True, 1),
    Cell("means", 2, 4, False, 2),
    Cell("means", 8, 4, True, 1),
]


def pairs(cells: list[Cell]) -> set[object]:
    named = [list(cell._asdict().items()) for cell in cells]
    return {pair for items in named for pair in itertools.combinations(items, 2)}


def test_the_cells_cover_every_pair_of_settings() -> None:
    assert pairs(CELLS) == pairs(MATRIX) and set(CELLS) <= set(MATRIX)


@pytest.fixture(scope="module")
def student(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with dropout, whose random numbers have to be restored too."""
    directory = tmp_path_factory.mktemp("student")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=read_manifest(str(scored)).vocab_size, **sizes).save_pretrained(directory)
    return directory / "config.json"


@pytest.fixture(scope="module")
def targets(work: Path, scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("targets") / "targets"
    flags = ["--corpus", scored, "--teacher", work / "teacher", "--output", output, "--top-k", TOP_K]
    masks = ["--mask-source", "parquet", "--mask-temperature", 1, "--variants", 2]
    run(*SCORE, *flags, *masks, "--dtype", "float32", "--backend", "local")
    return output


@pytest.fixture(scope="module")
def flags(student: Path, scored: Path, targets: Path) -> dict[str, list[object]]:
    """By source; the step is the same 8 sequences, however it is split."""
    common = ["--shards", scored, "--model", student, "--max-steps", STEPS, "--save-steps", SAVE, "--logging-steps", 1]
    common += ["--eval-fraction", 0, "--bf16", "false", "--learning-rate", 1e-3, "--save-total-limit", 9]
    rising = ["--mask-warmup", 0.3, "--mask-ramp", 0.6, "--hard-share", 0.8]
    own = ["--entropy-source", "self", *rising, "--self-refresh"]
    return {
        "random": [*common, "--entropy-source", "random", "--optim", "muon"],  # the others have AdamW
        "parquet": [*common, "--entropy-source", "parquet", *rising],
        "targets": [*common, "--entropy-source", "parquet", "--targets", targets],
        **{form: [*common, *own, form] for form in ("step", "means")},
    }


@pytest.fixture(scope="module")
def whole(flags: dict[str, list[object]], tmp_path_factory: pytest.TempPathFactory):
    """Uninterrupted runs, one for all numbers of loader workers."""
    done: dict[Cell, dict[int, tuple[float, float]]] = {}

    def logged(cell: Cell) -> dict[int, tuple[float, float]]:
        cell = cell._replace(workers=0)
        if cell not in done:
            root = tmp_path_factory.mktemp("whole")
            train_ = Run(root / "log", *command(flags, cell, root / "out"), ranks=cell.ranks)
            assert train_.end() == [0] * cell.ranks, train_.output()
            done[cell] = history(root / "out", STEPS)
        return done[cell]

    return logged


def command(flags: dict[str, list[object]], cell: Cell, output: Path) -> list[object]:
    split = ["--per-device-train-batch-size", BATCH // cell.accumulation // cell.ranks]
    split += ["--gradient-accumulation-steps", cell.accumulation, "--dataloader-num-workers", cell.workers]
    distil = ["--distill-weight", 0.5] if cell.distil else []
    return [*flags[cell.source], *split, *distil, "--output-dir", output]


@pytest.mark.parametrize(
    "cell",
    [*CELLS, *(pytest.param(cell, marks=pytest.mark.exhaustive) for cell in MATRIX if cell not in CELLS)],
    ids=lambda cell: "-".join(str(value) for value in cell),
)
def test_killed_and_started_again(cell: Cell, flags: dict[str, list[object]], whole, tmp_path: Path) -> None:
    argv = command(flags, cell, tmp_path / "out")
    kill_at = 4 + MATRIX.index(cell) % 4  # 4 to 7: after a checkpoint, at one, before it is written
    killed = Run(tmp_path / "log", *argv, ranks=cell.ranks, kill_at=kill_at)
    codes = killed.end()
    assert codes[-1] == -9 and set(codes[:-1]) <= {1}, killed.output()
    again = Run(tmp_path / "again", *argv, ranks=cell.ranks)
    assert again.end() == [0] * cell.ranks, again.output()
    assert f"resuming from {tmp_path}/out/checkpoint-{(kill_at - 1) // SAVE * SAVE}" in again.output()
    assert list(whole(cell)) == list(range(1, STEPS + 1))
    assert history(tmp_path / "out", STEPS) == whole(cell)
    assert "Traceback" not in killed.output() + again.output()
