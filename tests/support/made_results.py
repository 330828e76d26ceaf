"""Results of glue/run.py as JSON files, made without a model, and their comparison."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import glue.compare
from glue.metrics import score
from glue.tasks import GLUE

LOCAL = ("cola", "sst2", "mrpc", "rte", "stsb", "qnli")
SEEDS = {"random": (1, 2, 3, 4, 5), "parquet": (2, 3, 5), "parquet+kd": (1, 2, 3), "self": (4,)}
LENGTH, SEQUENCES, PASSES = 128, 1000, 7
TOKENS = 4 * SEQUENCES * LENGTH  # four epochs
SCORING = {"parquet": 7_000_000_000, "parquet+kd": 11_000_000_000}  # FLOPs
TRAINING = {"random": 3e10, "parquet": 3e10, "parquet+kd": 3e10, "self": 4e10}


def metrics_of(task: str, value: float) -> dict[str, float]:
    kind = GLUE[task]
    return {metric + suffix: value for metric in kind.metrics for suffix in kind.evaluations}


def summary(regime: str, seed: int, loss: float = 4.0, **changes: Any) -> dict[str, Any]:
    """As train/run.py leaves it, in numbers that are easy to compute with."""
    targets = None
    if regime == "parquet+kd":
        targets = {"sequences": 4 * SEQUENCES, "sequence_length": LENGTH, "bytes": 1 << 19, "passes": None}
        targets |= {"flops": 4_000_000_000, "worker_seconds": 40.0, "variants": 4}
        targets |= {"source": "parquet", "policy": {"ratio": 0.15, "temperature": 0.0, "seed": seed}}
    steps, seconds = 1000, 100.0 + seed
    history = [
        {"step": step, "seconds": seconds * step / steps, "eval_loss": loss + 4 * np.exp(-step / 200)}
        for step in range(50, steps, 50)
    ]
    return {
        **{"regime": regime, "model": "tiny", "steps": steps, "tokens": TOKENS, "seconds": seconds, "seed": seed},
        **{"tokens_per_second": TOKENS / seconds, "training_flops": int(TRAINING[regime]), "eval_loss": loss},
        "scoring_flops": SCORING.get(regime, 0),
        "scoring_seconds": SCORING.get(regime, 0) / 1e8,
        "shards": {
            **{"sequences": SEQUENCES, "sequence_length": LENGTH, "bytes": 1 << 20, "passes": PASSES},
            **{"flops": 7_000_000_000, "worker_seconds": 70.0},
        },
        "targets": targets,
        "history": [*history, {"step": steps, "seconds": seconds, "eval_loss": loss}],
        "flags": {"seed": seed, "entropy_source": regime.partition("+")[0], "learning_rate": 1e-3, "mask_seed": seed},
        **changes,
    }


def write_results(
    directory: Path,
    scores: dict[str, dict[int, float]],
    training: dict[str, Any] | None,
    collapsed: tuple[str, ...] = (),
    **key: Any,
) -> Path:
    """One model's results.

    Args:
        scores: by task, by fine-tuning seed, in [0, 1]: all metrics of the task.
        key: changes to what decides the results.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for task, by_seed in scores.items():
        for seed, value in by_seed.items():
            metrics = metrics_of(task, value)
            result = {
                **{"task": task, "seed": seed, "protocol": "cramming", "metrics": metrics, "score": score(metrics)},
                **{"collapsed": task in collapsed, "constant_score": 50.0, "train_rows": 64, "eval_rows": 24},
                **{"overlap": 6 if task == "stsb" else 0},
                "seconds": 1.0,
                "train_split": "train_subset" if task == "qnli" else "train",
                "training": training,
                "key": {
                    **{"task": task, "seed": seed, "protocol": "cramming", "data_hash": task},
                    "settings": {"1": {"learning_rate": 4e-5, "epochs": 5}},
                    "model_hash": f"{directory.name} {training and training['seed']}",
                    **key,
                },
            }
            (directory / f"{task}-seed{seed}.json").write_text(json.dumps(result))
    return directory


def write_student(root: Path, regime: str, seed: int) -> None:
    """Results of one student on the tasks of local6, by chance."""
    rng = np.random.default_rng([seed, len(regime)])
    scores = {task: {1: 0.5 + rng.random() / 4, 2: 0.5 + rng.random() / 4} for task in LOCAL}
    loss = 4 + rng.random() / 10
    write_results(root / regime / str(seed), scores, summary(regime, seed, loss))


def write_regimes(root: Path) -> Path:
    """Four regimes of five, three, three seeds and one."""
    for regime, seeds in SEEDS.items():
        for seed in seeds:
            write_student(root, regime, seed)
    return root


def names_of(root: Path) -> list[str]:
    """These regimes as arguments of glue/compare.py."""
    return [f"{regime}={root / regime / str(seed)}" for regime, seeds in SEEDS.items() for seed in seeds]


def compare_here(output: Path, *arguments: object) -> dict[str, Any]:
    """Run glue/compare.py's main; return its table."""
    glue.compare.main([*map(str, arguments), "--output", str(output)])
    return json.loads((output / "table.json").read_text())
