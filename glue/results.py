"""The results of glue/run.py, read back: one model's, a regime's, and whether regimes may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from entropy_masking.shards.commit import differences
from glue.tasks import TASKS, ZERO_SHOT

# what a result must have, besides the metrics of its task
FIELDS = {
    **{"task": str, "seed": int, "protocol": str, "metrics": dict, "score": float | int, "collapsed": bool},
    **{"constant_score": float | int, "train_split": str, "train_rows": int, "eval_rows": int, "key": dict},
    **{"overlap": int, "seconds": float | int, "training": dict | None},
}


@dataclass(frozen=True)
class Run:
    """The results of one pretrained model.

    Attributes:
        seed: of its pretraining; 0 where it was not trained by train/run.py, or its summary does not say.
        results: by task, by fine-tuning seed.
        training: its own ``summary.json``, if it has one.
    """

    directory: str
    seed: int
    results: dict[str, dict[int, dict[str, Any]]]
    training: dict[str, Any] | None


Regimes = dict[str, list[Run]]  # by name, a run a pretraining seed


def read_regimes(directories: dict[str, list[str]]) -> Regimes:
    """All runs, checked.

    Raises:
        UsageError: a directory holds no results, or those of several models; or not all of it can be compared.
    """
    regimes = {name: [read_run(name, directory) for directory in those] for name, those in directories.items()}
    for name, runs in regimes.items():
        check_regime(name, runs)
    check_comparable(regimes)
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in regimes.items()}


def read_run(name: str, directory: str) -> Run:
    """The result files of one model.

    Raises:
        UsageError: there are none, one cannot be read, or they are of different models.
    """
    files = [info.base_name for info in storage.list_files(directory) if info.base_name.endswith(".json")]
    results: dict[str, dict[int, dict[str, Any]]] = {}
    models, training = set(), None
    for file in files:
        try:
            result = storage.read_json(storage.join(directory, file))
            check_result(result)
            results.setdefault(result["task"], {})[result["seed"]] = result
            models.add(result["key"]["model_hash"])
            training = result["training"]
            seed = int((training or {}).get("seed") or 0)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{storage.join(directory, file)} is no result of this glue/run.py (missing or wrong: "
                f"{one_line(error)}); remove it, and make it again"
            ) from None
    if not results:
        raise UsageError(f"{directory} ({name}) holds no results; make them with glue/run.py --output {directory}")
    if len(models) > 1:
        raise UsageError(f"{directory} ({name}) holds results of {len(models)} models; keep one directory a model")
    return Run(directory, seed, results, training)


def check_result(result: Any) -> None:
    """Raises KeyError, TypeError or ValueError if a result is not whole: see ``FIELDS``."""
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(result[name], kind)]:
        raise ValueError(f"{wrong[0]} is {result[wrong[0]]!r}")
    task = TASKS[result["task"]]
    for name in (metric + suffix for metric in task.metrics for suffix in task.evaluations):
        float(result["metrics"][name])


def check_regime(name: str, runs: list[Run]) -> None:
    """Refuse to average what is not the same but for its pretraining seed.

    Raises:
        UsageError: says what differs between which two directories.
    """
    first, *others = runs
    if others and (lacking := [run.directory for run in runs if run.training is None]):
        raise UsageError(
            f"{lacking[0]} ({name}) does not say how its model was pretrained, so it cannot be one seed of several; "
            "give it a name of its own"
        )
    by_seed: dict[int, Run] = {}
    for run in runs:
        if (same := by_seed.setdefault(run.seed, run)) is not run:
            raise UsageError(
                f"{same.directory} and {run.directory} ({name}) are both of pretraining seed {run.seed}; "
                "a regime has one directory a seed, another regime another name"
            )
        if differing := differences(pretraining(first), pretraining(run)):
            raise UsageError(
                f"{first.directory} and {run.directory} were pretrained differently ({'; '.join(differing)}), and both "
                f"are named {name}; give each regime its own name"
            )
        for task in sorted(first.results.keys() | run.results.keys()):
            seeds = [sorted(each.results.get(task, {})) for each in (first, run)]
            if seeds[0] != seeds[1]:
                listed = [", ".join(map(str, each)) or "none" for each in seeds]
                raise UsageError(
                    f"{task} has seeds {listed[0]} in {first.directory} but {listed[1]} in {run.directory}; "
                    "run the same"
                )


def pretraining(run: Run) -> dict[str, Any]:
    """What decides a regime: all flags of its summary but seeds; of the model, which may be made anew for each seed,
    what a step of it costs, and of the targets how their masks were drawn.
    """
    training = run.training or {}
    flags, targets = training.get("flags"), training.get("targets")
    kept = flags if isinstance(flags, dict) else {}
    found = {name: value for name, value in kept.items() if "seed" not in name and name not in ("targets", "model")}
    if isinstance(targets, dict):
        policy = targets.get("policy") or {}
        found["targets"] = {name: targets.get(name) for name in ("source", "variants")}
        found["targets"] |= {name: value for name, value in policy.items() if name != "seed"}
    return found | {"training_flops": training.get("training_flops")}


def set_apart(run: Run, baseline: Run) -> list[str] | None:
    """How a regime was pretrained otherwise than the baseline; None if one of them does not say."""
    own, other = run.training, baseline.training
    if not (own and other):
        return None
    new, old = pretraining(run), pretraining(baseline)
    targets = new.pop("targets", None)
    differing = [name for name in new if new[name] != old.get(name) and name not in ("shards", "training_flops")]
    found = [f"--{name.replace('_', '-')} {new[name]}" for name in differing]
    if targets:
        found.append(f"targets of {targets['variants']} variants of {targets['source']} masks")
    shards, others = (each.get("shards") or {} for each in (own, other))
    if new.get("shards") != old.get("shards"):
        found.append(f"shards of context {shards.get('context')}")
    if shards.get("sequences_hash") != others.get("sequences_hash"):
        found.append("other texts")
    models = [(each.get("flags") or {}).get("model") for each in (own, other)]
    if run.seed == baseline.seed and models[0] != models[1]:
        found.append(f"--model {own.get('model')}")
    return found


def evaluated_on(training: dict[str, Any]) -> tuple[Any, Any]:
    """What a run's held-out loss is on: the text, and the share of it that is held out."""
    flags, own = training.get("flags"), training.get("eval_shards")
    text = own or training.get("shards") or {}
    fraction = flags.get("eval_fraction") if isinstance(flags, dict) and not own else None
    return text.get("sequences_hash"), fraction


def check_comparable(regimes: Regimes) -> None:
    """Refuse to compare different tasks, settings or data, or what shares no fine-tuning seed.

    Raises:
        UsageError: says what differs between which two.
    """
    (first, (reference, *_)), *others = regimes.items()
    for name, (run, *_) in others:
        for task in sorted(reference.results.keys() ^ run.results.keys()):
            has, lacks = (first, name) if task in reference.results else (name, first)
            raise UsageError(f"{has} has the task {task}, {lacks} has not; run it there, or compare without it")
        for task in run.results:
            seeds = [sorted(each.results[task]) for each in (reference, run)]
            if not set(seeds[0]) & set(seeds[1]):
                listed = [", ".join(map(str, each)) for each in seeds]
                raise UsageError(f"{task} has seeds {listed[0]} in {first} but {listed[1]} in {name}; run the same")
    for name, runs in regimes.items():
        for result in (result for run in runs for by in run.results.values() for result in by.values()):
            task = result["task"]
            expected = next(iter(reference.results[task].values()))
            old, new = ({**each["key"], "model_hash": "", "seed": ""} for each in (expected, result))
            if differing := differences(old, new):
                how = "scored" if task in ZERO_SHOT else "fine-tuned"
                raise UsageError(
                    f"{task} was {how} differently in {first} and {name} ({'; '.join(differing)}); run both alike"
                )
