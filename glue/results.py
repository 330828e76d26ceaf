"""Reads the results of glue/run.py by model and regime, and checks that regimes can be compared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from entropy_masking import storage
from entropy_masking.commands.flags import flag
from entropy_masking.errors import UsageError
from entropy_masking.shards.commit import differences
from entropy_masking.shards.fields import Count, Seconds, first_fault, valid
from entropy_masking.summary import Directory, Seed, Summary, Tolerant
from glue.tasks import TASKS, ZERO_SHOT

# with room for rounding
Metric = Annotated[float, Field(ge=-1.001, le=1.001)]
Percent = Annotated[float, Field(ge=-100.1, le=100.1)]


class Result(Tolerant):
    """The fields of a result file that a comparison needs."""

    task: str
    seed: Seed
    protocol: str
    settings: dict[str, object] = Field({})
    metrics: Annotated[dict[str, Metric], Field(min_length=1)]
    score: Percent
    fields: dict[str, Metric] = Field({})
    collapsed: bool
    constant_score: Percent
    train_split: str
    train_rows: Count
    eval_rows: Count
    overlap: Count
    seconds: Seconds
    training: Summary | None
    key: dict[str, object]

    @model_validator(mode="after")
    def has_the_metrics_of_its_task(self) -> Self:
        # the key of a task of one's own names its metrics
        wanted = TASKS[self.task].metric_names if self.task in TASKS else self.key.get("metrics")
        if not (wanted and isinstance(wanted, set | list) and all(name in self.metrics for name in map(str, wanted))):
            raise ValueError(f"{self.task} is not a task, or lacks metrics")
        if self.task in ZERO_SHOT:
            valid(PairSettings, self.settings)
        return self


class PairSettings(Tolerant):
    """How minimal pairs were scored."""

    pll: str
    limit_pairs: Count | None


@dataclass(frozen=True)
class Run:
    """The results of one pretrained model.

    Attributes:
        seed: of its pretraining; 0 if its summary is missing or lacks it.
        results: by task, by fine-tuning seed.
        training: its own ``summary.json``, if it has one.
    """

    directory: str
    seed: int
    results: dict[str, dict[int, Result]]
    training: Summary | None

    def __iter__(self) -> Iterator[Result]:
        return (result for by_seed in self.results.values() for result in by_seed.values())

    def seeds(self, task: str) -> list[int]:
        """The fine-tuning seeds of a task."""
        return sorted(self.results.get(task, {}))

    def source(self) -> dict[str, object]:
        """The entry of the run in table.json."""
        seeds = {task: self.seeds(task) for task in self.results}
        return {"directory": self.directory, "pretraining_seed": self.seed, "fine_tuning_seeds": seeds}


Regimes = dict[str, list[Run]]  # by name, a run for each pretraining seed


def read_result(file: str) -> Result:
    """A result file. Raises FileNotFoundError, or ValueError if it is not a complete result."""
    try:
        return Result.model_validate(storage.read_json(file))
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def read_regimes(directories: Mapping[str, list[str]]) -> Regimes:
    """All runs. Raises UsageError if a directory cannot be read, or cannot be compared with the others."""
    regimes = {name: [read_run(name, directory) for directory in own] for name, own in directories.items()}
    for name, runs in regimes.items():
        check_regime(name, runs)
    check_comparable(regimes)
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in regimes.items()}


def read_run(name: str, directory: str) -> Run:
    """The result files of one model. Raises UsageError if one cannot be read, or there are none or several models."""
    results: dict[str, dict[int, Result]] = {}
    models, training = set(), None
    for file in (storage.join(directory, info.base_name) for info in storage.list_files(directory)):
        if not file.endswith(".json"):
            continue
        try:
            result = read_result(file)
        except ValueError as error:
            raise UsageError(
                f"{file} is not a result of this glue/run.py ({error}); delete it, and make it again"
            ) from None
        results.setdefault(result.task, {})[result.seed] = result
        models.add(str(result.key.get("model_hash")))
        training = result.training
    if not results:
        raise UsageError(f"{directory} ({name}) holds no results; make them with glue/run.py --output {directory}")
    if len(models) > 1:
        raise UsageError(f"{directory} ({name}) holds results of {len(models)} models; keep one directory per model")
    return Run(directory, (training or Summary()).seed or 0, results, training)


def check_regime(name: str, runs: list[Run]) -> None:
    """Raises UsageError if runs of a regime differ in more than their pretraining seed, and names two directories."""
    first = runs[0]
    by_seed: dict[int, Run] = {}
    for run in runs:
        if (same := by_seed.setdefault(run.seed, run)) is not run:
            raise UsageError(
                f"{same.directory} and {run.directory} ({name}) are both of pretraining seed {run.seed}, or do not say "
                "how their models were pretrained; name one directory per seed, and give another regime another name"
            )
        if differing := differences(pretraining(first), pretraining(run)):
            raise UsageError(
                f"{first.directory} and {run.directory} were pretrained differently ({'; '.join(differing)}), and both "
                f"are named {name}; give each regime its own name"
            )
        for task in sorted(first.results.keys() | run.results.keys()):
            if first.seeds(task) != run.seeds(task):
                raise different_seeds(task, first, first.directory, run, run.directory)


def check_comparable(regimes: Regimes) -> None:
    """Raises UsageError if two regimes have different tasks, settings or data, or no common seed, and names them."""
    (first, (reference, *_)), *others = regimes.items()
    for name, (run, *_) in others:
        for task in sorted(reference.results.keys() ^ run.results.keys()):
            has, lacks = (first, name) if task in reference.results else (name, first)
            raise UsageError(f"{has} has the task {task}, but {lacks} does not; run it there, or compare without it")
        for task in run.results:
            if not set(reference.seeds(task)) & set(run.seeds(task)):
                raise different_seeds(task, reference, first, run, name)
    for name, runs in regimes.items():
        for result in (result for run in runs for result in run):
            expected = next(iter(reference.results[result.task].values()))
            old, new = (one.key | {"model_hash": "", "seed": ""} for one in (expected, result))
            if differing := differences(old, new):
                how = "scored" if result.task in ZERO_SHOT else "fine-tuned"
                raise UsageError(
                    f"{result.task} was {how} differently in {first} and {name} ({'; '.join(differing)}); "
                    "run both in the same way"
                )


def different_seeds(task: str, one: Run, first: str, other: Run, second: str) -> UsageError:
    """The error for two runs, given by name, with different fine-tuning seeds of a task."""
    seeds = [", ".join(map(str, run.seeds(task))) or "none" for run in (one, other)]
    return UsageError(f"{task} has seeds {seeds[0]} in {first} but {seeds[1]} in {second}; run the same seeds in both")


def pretraining(run: Run) -> dict[str, object]:
    """Everything that determines a regime: the flags of its summary without seeds, and the masks of its targets.

    Each seed may have its own model, so only the FLOPs of training represent the model.
    """
    training = run.training or Summary()
    flags = training.flags or {}
    decisive = {name: value for name, value in flags.items() if "seed" not in name and name not in ("targets", "model")}
    if targets := training.targets:
        policy = {name: value for name, value in (targets.policy or {}).items() if name != "seed"}
        decisive["targets"] = {"source": targets.source, "variants": targets.variants, **policy}
    return decisive | {"training_flops": training.training_flops}


def set_apart(run: Run, baseline: Run) -> list[str] | None:
    """The pretraining settings that differ from the baseline's; None if one of the two has no summary."""
    own, other = run.training, baseline.training
    if not (own and other):
        return None
    new, old = pretraining(run), pretraining(baseline)
    separate = ("shards", "targets", "training_flops")
    differing = [name for name in new if new[name] != old.get(name) and name not in separate]
    # entries of a summary's flags that are no flags of train/run.py
    words = {"steps": "steps", "global_batch": "global batch", "muon": "Muon", "held_out_by": "held out by"}
    words |= {"ordered_by": "data ordered by"}
    apart = [f"{words.get(name, flag(name))} {new[name]}" for name in differing]
    if targets := own.targets:
        apart.append(f"targets of {targets.variants} variants of {targets.source} masks")
    shards, others = own.shards or Directory(), other.shards or Directory()
    if new.get("shards") != old.get("shards"):
        apart.append(f"shards of context {shards.context}")
    if shards.sequences_hash != others.sequences_hash:
        apart.append("other texts")
    if run.seed == baseline.seed and (own.flags or {}).get("model") != (other.flags or {}).get("model"):
        apart.append(f"--model {own.model}")
    return apart


def evaluated_on(training: Summary) -> tuple[str | None, object]:
    """The text of a run's held-out loss, and its share of the shards and how it was chosen."""
    if training.eval_shards:
        return training.eval_shards.sequences_hash, None
    flags = training.flags or {}
    share = str((flags.get("eval_fraction"), flags.get("held_out_by")))  # a summary of others may have a list there
    return (training.shards or Directory()).sequences_hash, share
