"""What must not change to the bit when code is moved: shards, masks, losses, targets and a comparison.

``GOLDEN=write python -m pytest tests/test_golden.py`` writes golden.json anew; the commit says what changed and why.
Whole numbers are the same on every machine. Numbers of a model depend on the processor in their last digits, so on
another one than that of golden.json losses are compared within 2 %, and hashes of a model's numbers are not.
"""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from harness import LENGTH
from in_process import score_here, train_here
from made_results import summary, write_results

import glue.compare
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.manifests import read_manifest
from train.data import TrainingSequences, whole_batch
from train.split import all_rows

FILE = Path(__file__).with_name("golden.json")
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
STEPS = 20
MILD = {"ratio": 0.15, "hard_share": 0.3, "temperature": 1.0}
POLICIES = {
    "random": MaskPolicy.random(ratio=0.15, seed=1),
    "default": MaskPolicy(seed=1),
    "mild": MaskPolicy(**MILD, seed=1),
    "paper": MaskPolicy.paper(seed=2),
    "rising": MaskPolicy(ratio=0.3, hard_share=0.5, temperature=0.2, warmup=0.2, ramp=0.5),
    "words": MaskPolicy(**MILD, unit="word", by="surprisal", corruption="mask-only"),
    "predicted": MaskPolicy(**MILD | {"ratio": 0.4}, predict_ratio=0.2, predict_by="entropy"),
}
R15, R30 = ["--mask-ratio", 0.15], ["--mask-ratio", 0.3]
H30 = ["--hard-share", 0.3, "--mask-temperature", 1]
SOURCES = {
    "random": ["--entropy-source", "random", *R15],
    "parquet": ["--entropy-source", "parquet", *R15, *H30],
    "paper": ["--entropy-source", "parquet", "--recipe", "paper"],
    "self": ["--entropy-source", "self", "--mask-warmup", 0.1, *R15, *H30],
    "step": ["--entropy-source", "self", "--self-refresh", "step", "--mask-warmup", 0.1, *R15, *H30],
    "excess": ["--entropy-source", "parquet", *R30, *H30, "--predict-ratio", 0.15, "--predict-by", "excess"],
}


def machine() -> str:
    """What decides the last digits of a model's numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    cpu = sorted({line for line in lines if line.startswith(wanted)})
    return f"{platform.machine()} cpu {digest(*(line.encode() for line in cpu))} torch {torch.__version__}"


def same(name: str, found: Any) -> None:
    """Compare with golden.json, or write it there."""
    if os.environ.get("GOLDEN") == "write":
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(kept | {"machine": machine(), name: found}, indent=1) + "\n")
    else:
        assert found == GOLDEN[name], f"{name} changed"


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def contents(directory: Path, names: tuple[str, ...]) -> list[str]:
    """Hash of each shard's columns."""
    tables = [pq.read_table(path, columns=list(names)) for path in sorted(directory.glob("part-*.parquet"))]
    return [digest(*(str(column.to_pylist()).encode() for column in table.columns)) for table in tables]


own_machine = pytest.mark.skipif(GOLDEN.get("machine", machine()) != machine(), reason="golden.json is of another one")


@own_machine
def test_shards(scored: Path) -> None:
    same("shards", {path.name: digest(path.read_bytes()) for path in sorted(scored.glob("part-*.parquet"))})


@pytest.mark.parametrize("name", POLICIES)
def test_masks(name: str) -> None:
    B, V = 64, 500
    generator = torch.Generator().manual_seed(7)
    ids_BL = torch.randint(3, V, (B, LENGTH), generator=generator)
    ids_BL[:, 0], ids_BL[:, -1], ids_BL[5, 20:] = 1, 2, 0
    batch = {"input_ids": ids_BL, "sequence_id": torch.arange(B) * 977, "epoch": torch.arange(B) % 3}
    batch |= {score: torch.randint(0, 40, (B, LENGTH), generator=generator) / 8 for score in ("entropy", "surprisal")}
    batch["progress"] = torch.arange(B) / B
    continues_V = torch.arange(V) % 4 == 3
    masker = Masker(vocab_size=V, special_token_ids=[0, 1, 2, 3], mask_id=3, pad_id=0, continues_V=continues_V)
    masked = masker(batch, POLICIES[name])
    parts = (masked["positions_BP"], masked["labels_BP"], masked["input_ids"])
    same(f"masks {name}", digest(*(part.to(torch.int64).numpy().tobytes() for part in parts)))


def test_order(scored: Path) -> None:
    manifest = read_manifest(str(scored))
    size = 3 * manifest.totals["sequences"]
    data = TrainingSequences(manifest, all_rows(manifest), [], size=size, batch=24, seed=5, prepare=whole_batch)
    same("order", digest(data.__getitems__(list(range(size)))["sequence_id"].numpy().tobytes()))


@pytest.mark.parametrize("distilled", [False, True], ids=["", "kd"])
@pytest.mark.parametrize("source", SOURCES)
def test_losses_and_gradient_norms(source: str, distilled: bool, scored: Path, tmp_path: Path) -> None:
    kd = ["--distill-weight", 0.5] if distilled else []
    steps = ["--max-steps", STEPS, "--logging-steps", 1, "--save-steps", STEPS, "--eval-strategy", "no"]
    train_here(scored, tmp_path, *SOURCES[source], *kd, *steps)
    log = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    found = [[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry]
    assert len(found) == STEPS
    name = f"losses {source}{'+kd' if distilled else ''}"
    if GOLDEN.get("machine", machine()) == machine():
        same(name, found)
    else:
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in GOLDEN[name]], rel=0.02)


@own_machine
def test_targets(work: Path, scored: Path, tmp_path: Path) -> None:
    masks = ["--mask-source", "parquet", *R15, *H30, "--variants", 2, "--mask-seed", 3]
    score_here(scored, work / "teacher", tmp_path / "targets", *masks, "--top-k", 4)
    names = ("sequence_id", "variant", "positions", "topk_ids", "topk_logprobs", "input_crc32")
    assert len(read_manifest(str(tmp_path / "targets"), kind="targets").shards) > 1
    same("targets", contents(tmp_path / "targets", names))


def test_comparison(tmp_path: Path) -> None:
    """Of made results: regimes of different numbers of seeds, with their training."""
    runs = []
    for regime, shift in (("random", 0.0), ("parquet", 0.04), ("parquet+kd", 0.07), ("self", -0.03)):
        for seed in (1, 2, 3):
            scores = {task: {1: 0.5 + shift + seed / 100, 2: 0.52 + shift} for task in ("cola", "sst2", "rte")}
            directory = tmp_path / regime / str(seed)
            write_results(directory, scores, summary(regime, seed, 4.0 - shift))
            runs.append(f"{regime}={directory}")
    glue.compare.main([*runs, "--output", str(tmp_path / "out")])
    same("comparison", {name: (tmp_path / "out" / name).read_text() for name in ("table.md", "table.csv")})
