"""The statistics and the sample of train/explore.py, against numpy and scipy."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.parquet import ROW_GROUP
from train.explorer import sample, statistics

N, L, V = 40, 150, 60


def made(seed: int) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """A frame of made-up tokens, and the arrays that it was made of."""
    rng = np.random.default_rng(seed)
    ids = np.random.default_rng(0).zipf(1.4, (N, L)).clip(1, V - 1)
    arrays = {"ids": ids, "masked": rng.random((N, L)) < 0.2}
    for name in statistics.MEASURES:
        arrays[name] = rng.gamma(1.0, 2.0, (N, L)).astype(np.float16).astype(np.float32) + ids / 20
        arrays[name][:, 0] = np.nan
        arrays[name][3, 50:] = np.nan
    scores = {name: arrays[name] for name in statistics.MEASURES}
    return statistics.tokens(ids, scores, arrays["masked"]), arrays


def by(result: pl.DataFrame, column: str = "label") -> dict[Any, dict[str, float]]:
    return {row[column]: row for row in result.iter_rows(named=True)}


def test_a_frames_statistics_are_those_of_its_arrays() -> None:
    frame, arrays = made(1)
    ids, entropy = arrays["ids"], arrays["entropy"].astype(np.float64)
    scored = ~np.isnan(entropy)

    result = statistics.spread(frame, "surprisal")
    values = arrays["surprisal"][scored].astype(np.float64)
    expected = dict(zip(("low", "median", "high"), np.quantile(values, [0.1, 0.5, 0.9]), strict=True))
    assert result == pytest.approx(expected | {"mean": values.mean()})
    assert statistics.spread(frame.with_columns(surprisal=pl.lit(None, pl.Float32)), "surprisal") == {}

    shares = np.array(statistics.histogram(frame, "entropy", 0.5, 12))
    counts = np.histogram(entropy[scored].clip(0, 5.9), bins=12, range=(0, 6))[0]
    assert np.allclose(shares, counts / counts.sum()) and shares[-1] > 0

    def check(row: dict[str, float], where: np.ndarray) -> None:
        assert row["count"] == (where & scored).sum() and row["share"] == pytest.approx(row["count"] / scored.sum())
        for name in statistics.MEASURES:
            assert row[name] == pytest.approx(arrays[name][where & scored].astype(np.float64).mean())

    counted = sorted(((np.sum((ids == t) & scored), -t) for t in range(V)), reverse=True)
    rank = {-t: place for place, (count, t) in enumerate(counted, 1) if count}
    result = by(statistics.by_frequency(frame))
    assert list(result) == ["1–10", "11–30", "31–100"]
    for label, row in result.items():
        low, high = map(int, label.split("–"))
        check(row, np.isin(ids, [t for t, place in rank.items() if low <= place <= high]))

    result = by(statistics.by_mask(frame))
    check(result["masked"], arrays["masked"])

    result = statistics.by_token(frame)
    assert result["entropy"].is_sorted(descending=True)
    assert set(result["label"]) == {t for t in range(V) if np.sum((ids == t) & scored) >= 10}
    for row in result.iter_rows(named=True):
        check(row, ids == row["label"])


def test_two_frames_are_compared_where_both_are_scored() -> None:
    (first, a), (second, b) = made(1), made(2)
    b["entropy"][5, 20:] = b["entropy"][7] = np.nan
    second = second.with_columns(entropy=pl.Series(b["entropy"].ravel()).fill_nan(None))
    both = ~np.isnan(a["entropy"]) & ~np.isnan(b["entropy"])
    result = by(statistics.agreement(first, second), "sequence")
    assert list(result) == list(range(N)) and result[7]["correlation"] is None
    for row in set(range(N)) - {7}:
        rho = spearmanr(a["entropy"][row][both[row]], b["entropy"][row][both[row]]).statistic
        assert result[row]["correlation"] == pytest.approx(rho)
        assert result[row]["overlap"] == pytest.approx((a["masked"] & b["masked"])[row].sum() / a["masked"][row].sum())


def test_a_sample_is_spread_over_row_groups_and_reads_few(scored: Path) -> None:
    manifest = read_manifest(str(scored))

    def holding(*rows: int) -> Manifest:
        first = manifest.shards[0]
        entries = [first.model_copy(update={"index": index, "rows": size}) for index, size in enumerate(rows)]
        return manifest.model_copy(update={"shards": entries})

    for rows, limit in (((1500, 10, 2048), 300), ((1500, 10, 2048), 9_999), ((3 * ROW_GROUP,) * 300, 1000), ((5,), 2)):
        picks = sample.pick([holding(*rows)], limit)
        chosen = {(index, block * ROW_GROUP + row) for index, block, places in picks for row in places.tolist()}
        assert len(chosen) == min(limit, sum(rows)) == sum(len(places) for *_, places in picks)
        assert all(row < rows[index] for index, row in chosen) and len(picks) <= sample.GROUPS
        assert picks == sorted(picks, key=lambda pick: pick[:2]) and picks[0][2].dtype.kind == "i"
    of_both = sample.pick([holding(20, 30, 40), holding(20, 31, 40)], 1000)
    assert {index for index, *_ in of_both} == {0, 2}, "shards that both have"
