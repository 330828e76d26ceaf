"""Self-masking by kept scores: the memory against a slow reference, what is kept and used again, and the export."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from harness import refused
from scipy.stats import spearmanr
from test_train import SMALL, TRAIN, train_here

import pipeline.verify
import train.run
from pipeline.cli import UsageError
from pipeline.manifests import read_manifest
from train.masking import IGNORED
from train.selfmask import MOST_COUNTED, SHARE_RATE, ScoreMemory, Visited, turns
from train.trainer import MaskedLMTrainer
from train.watch import mask_overlap, rank_correlation

ROWS, L, V, EVERY = 6, 12, 9, 4
LAGGED = ["--entropy-source", "self", "--self-refresh", "lagged", "--self-refresh-every", EVERY]


class SlowMemory:
    """The same in Python's numbers, a score at a time."""

    def __init__(self) -> None:
        self.rest: dict[tuple[int, int], float] = {}
        self.mean, self.count = defaultdict(float), defaultdict(float)
        self.level, self.both, self.before = math.nan, 0.0, 0.0

    def update(self, scored: list[tuple[int, int, int, float]]) -> None:
        self.level = sum(score for *_, score in scored) / len(scored)
        for token in {token for _, _, token, _ in scored}:
            own = [score - self.level for _, _, t, score in scored if t == token]
            weight = self.count[token] + len(own)
            self.mean[token] = (self.mean[token] * self.count[token] + sum(own)) / weight
            self.count[token] = min(weight, MOST_COUNTED)
        both = before = 0.0
        for row, position, token, score in scored:
            rest = score - self.level - self.mean[token]
            if (row, position) in self.rest:
                both += self.rest[row, position] * rest
                before += self.rest[row, position] ** 2
            self.rest[row, position] = float(np.float16(rest))
        self.both = (1 - SHARE_RATE) * self.both + both
        self.before = (1 - SHARE_RATE) * self.before + before

    def estimate(self, row: int, position: int, token: int) -> float:
        share = min(1.0, max(0.0, self.both / self.before)) if self.before else 1.0
        return self.level + self.mean[token] + share * self.rest.get((row, position), 0.0)


def test_the_memory_does_what_its_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_NL = torch.randint(V, (ROWS, L), generator=generator)
    memory, slow = ScoreMemory(ROWS, L, V, EVERY), SlowMemory()
    for visit in range(9):
        row_B = torch.randperm(ROWS, generator=generator)[:4].sort().values
        scored_BR = turns(row_B, torch.full((4,), visit), L, EVERY)
        scored_BR[visit % 4, 0] = IGNORED
        score_BR = 3 * torch.rand(scored_BR.shape, generator=generator) + 0.2 * ids_NL[row_B][:, : scored_BR.shape[1]]
        memory.update(row_B, ids_NL[row_B], scored_BR, score_BR)
        where = (scored_BR != IGNORED).nonzero().tolist()
        rows, positions, scores = row_B.tolist(), scored_BR.tolist(), score_BR.tolist()
        slow.update([(rows[b], p := positions[b][r], int(ids_NL[rows[b], p]), scores[b][r]) for b, r in where])
        found_NL = memory.estimate(torch.arange(ROWS), ids_NL)
        expected = [[slow.estimate(row, p, int(ids_NL[row, p])) for p in range(L)] for row in range(ROWS)]
        torch.testing.assert_close(found_NL.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-3, rtol=0)
    kept_NL = memory.kept(torch.arange(ROWS), ids_NL)
    assert {tuple(at) for at in (~kept_NL.isnan()).nonzero().tolist()} == slow.rest.keys()


def test_every_position_has_its_turn_once_in_so_many_visits() -> None:
    ids_B = torch.tensor([5, 1 << 33, (7 << 32) + 3])
    for length in (12, 13):
        seen = torch.cat([turns(ids_B, torch.full((3,), visit), length, EVERY) for visit in range(10, 10 + EVERY)], 1)
        for row in seen.tolist():
            assert sorted(p for p in row if p != IGNORED) == list(range(length))


def visit_of(sequences: list[int], epoch: int, seed: int) -> dict[str, torch.Tensor]:
    """What each sequence says of itself, whoever it comes with."""
    sequence_id = torch.tensor(sequences)
    of_row = [torch.Generator().manual_seed(seed + sequence) for sequence in sequences]
    epoch_B = torch.full((len(sequences),), epoch)
    scored_BR = turns(sequence_id, epoch_B, L, EVERY)
    return {
        "sequence_id": sequence_id,
        "epoch": epoch_B,
        "input_ids": torch.stack([torch.randint(V, (L,), generator=g) for g in of_row]),
        "positions_BK": torch.stack([torch.randperm(L, generator=g)[:2] for g in of_row]),
        "scored_BR": scored_BR,
        "score_BR": torch.stack([torch.rand(scored_BR.shape[1], generator=g) for g in of_row]),
    }


def test_what_is_kept_does_not_depend_on_how_a_batch_is_split(scored: Path) -> None:
    entries = read_manifest(str(scored)).shards[:2]
    one, other = (Visited(entries, 2, ScoreMemory(sum(e.rows for e in entries), L, V, EVERY)) for _ in range(2))
    second = 1 << 32
    for step in range(5):
        one.note(step, visit_of([0, 3, 2, second + 1], step, step))
        for part in ([2], [second + 1, 0], [3]):
            other.note(step, visit_of(part, step, step))
    for visited in (one, other):
        visited.absorb(before=4)
    assert one.memory and one.memory.level == other.memory.level  # type: ignore[union-attr]
    ours, theirs = one.state(), other.state()
    for name, value in ours.items():
        assert torch.equal(value.nan_to_num(nan=-9.0), theirs[name].nan_to_num(nan=-9.0)), name


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(5, (8, 20), generator=generator).float()
    second = torch.randn(8, 20, generator=generator) + first
    second[3, 4], where = torch.nan, torch.rand(8, 20, generator=generator) < 0.7
    where[7] = False
    rho, known = rank_correlation(first, second, where)
    assert known.tolist() == [True] * 7 + [False]
    for row in range(7):
        here = where[row] & ~second[row].isnan()
        assert rho[row].item() == pytest.approx(spearmanr(first[row][here], second[row][here]).statistic)
    share, known = mask_overlap(torch.tensor([[1, 2, IGNORED], [4, 5, 6]]), torch.tensor([[2, 3, 9], [IGNORED] * 3]))
    assert share[0] == 0.5 and known.tolist() == [True, False]


def test_two_epochs_use_what_was_kept_and_leave_a_map(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing whose turn it is gets masked; the map is read by everyone; the log says what was watched."""
    masked: list[dict[str, torch.Tensor]] = []
    original = MaskedLMTrainer.mask_by_student

    def spy(trainer: MaskedLMTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = original(trainer, batch)
        if trainer.state.global_step >= trainer.self_warmup_steps:
            masked.append(found | {"share": trainer.visited.memory.share()})  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(MaskedLMTrainer, "mask_by_student", spy)
    flags = [*LAGGED, "--num-train-epochs", EVERY + 2, "--per-device-train-batch-size", 64, "--logging-steps", 10]
    summary = train_here(scored, tmp_path / "out", *flags, "--export-entropies", tmp_path / "map")
    assert summary["flags"]["self_refresh_every"] == EVERY
    for batch in masked:
        scored_BR, positions_BK = batch["scored_BR"], batch["positions_BK"]
        assert not ((scored_BR[:, :, None] == positions_BK[:, None]) & (scored_BR != IGNORED)[:, :, None]).any()
    assert float(masked[-1]["share"]) < 1, "positions were scored twice"
    (state,) = tmp_path.glob("out/checkpoint-*/trainer_state.json")
    logged = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry][-1]
    assert 0 < logged["mask_overlap"] < 1 and -1 < logged["teacher_rank_correlation"] < 1
    assert 0 < logged["entropy"] <= logged["masked_entropy"] < math.log(read_manifest(str(scored)).vocab_size) + 0.5

    assert pipeline.verify.main([str(tmp_path / "map"), "--deep"]) == 0
    maps = [pl.read_parquet(directory / "part-*.parquet") for directory in (scored, tmp_path / "map")]
    assert maps[0]["sequence_id"].equals(maps[1]["sequence_id"]) and maps[0]["input_ids"].equals(maps[1]["input_ids"])
    assert read_manifest(str(tmp_path / "map")).context == "self"
    count = pl.col("entropy").list.eval(pl.element().is_not_nan()).list.sum()
    candidates, kept = (each.select(count)["entropy"].to_numpy() for each in maps)
    assert ((kept == 0) | (kept > 0.6 * candidates)).all() and (kept == candidates).mean() > 0.3
    again = train_here(tmp_path / "map", tmp_path / "parquet", "--entropy-source", "parquet", "--max-steps", 2)
    assert again["shards"]["context"] == "self"
    assert again["eval_loss"] and again["eval_loss_by_entropy_decile"] is None
    for more, sentence in ((["--mask-by", "surprisal"], "has no surprisals"), (["--eval-fraction", 0], "held it out")):
        with pytest.raises(UsageError, match=sentence):
            train_here(tmp_path / "map", tmp_path / "no", "--entropy-source", "parquet", "--max-steps", 2, *more)
    capsys.readouterr()
    same = ["--shards", scored, "--output-dir", tmp_path / "out", *SMALL, *flags, "--export-entropies"]
    train.run.main([str(flag) for flag in [*same, tmp_path / "map"]])
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has exported nothing there"):
        train.run.main([str(flag) for flag in [*same, tmp_path / "elsewhere"]])
    message = refused(*TRAIN, "--shards", scored, *SMALL, *LAGGED, "--max-steps", 3, "--output-dir", tmp_path / "b",
                      "--export-entropies", tmp_path / "map")  # fmt: skip
    assert "was made with other settings" in message and not (tmp_path / "b").exists()


def test_a_fresh_map_has_every_position(scored: Path, tmp_path: Path) -> None:
    flags = ["--entropy-source", "self", "--max-steps", 1, "--export-entropies", tmp_path / "map"]
    train_here(scored, tmp_path / "out", *flags)
    assert pipeline.verify.main([str(tmp_path / "map"), "--deep"]) == 0
    totals, expected = (read_manifest(str(each)).totals for each in (tmp_path / "map", scored))
    assert totals["scored_tokens"] == expected["scored_tokens"] and totals["sequences"] == expected["sequences"]


def test_a_resumed_run_is_the_same(scored: Path, tmp_path: Path) -> None:
    """Stopped between two checkpoints, at its last one: what was kept comes back with the weights."""
    flags = [*LAGGED, "--max-steps", 24, "--save-steps", 8, "--per-device-train-batch-size", 64, "--logging-steps", 3]
    flags += ["--save-total-limit", 5]
    train_here(scored, tmp_path / "out", *flags)
    whole = json.loads((tmp_path / "out" / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
    for path in (tmp_path / "out" / "summary.json", *(tmp_path / "out" / "checkpoint-24").iterdir()):
        path.unlink()
    train_here(scored, tmp_path / "out", *flags)
    again = json.loads((tmp_path / "out" / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
    assert [e for e in again if "loss" in e] == [e for e in whole if "loss" in e]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--entropy-source", "random", "--self-refresh", "lagged"], "--self-refresh only applies to --entropy-source"),
        (["--entropy-source", "self", "--self-refresh-every", 4], "only applies to --self-refresh lagged"),
        ([*LAGGED, "--mask-band", 0, 0.5], "--mask-band needs scores of every position"),
        (["--entropy-source", "parquet", "--export-entropies", "x"], "--export-entropies only applies to"),
        ([*LAGGED, "--self-refresh-every", 0], "--self-refresh-every 0 is out of range"),
    ],
)
def test_mistakes_are_one_sentence(scored: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        train_here(scored, tmp_path / "out", "--max-steps", 1, *flags)
