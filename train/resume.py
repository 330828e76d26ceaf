"""Runs that go on by themselves: an output directory belongs to one set of flags, its checkpoints with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.cli import UsageError
from pipeline.commit import differences

FLAGS, SUMMARY = "run.json", "summary.json"
# flags of TrainingArguments that do not decide what is learned, by prefix
FREE = (
    *("output_dir", "logging_", "log_", "save_", "eval_", "report_to", "run_name", "project", "trackio", "hub_"),
    *("push_to_hub", "dataloader_", "disable_tqdm", "do_", "per_device_eval", "skip_memory", "include_"),
    *("torch_empty_cache", "restore_callback", "num_train_epochs", "prediction_loss", "batch_eval", "max_steps"),
    # the global batch counts, not how it is split
    *("per_device_train", "gradient_accumulation", "local_rank", "ddp_", "parallelism", "accelerator_config"),
)


def deciding(arguments: dict[str, Any]) -> dict[str, Any]:
    """The flags among those of TrainingArguments that decide what is learned."""
    return {name: value for name, value in arguments.items() if not name.startswith(FREE)}


def claim(directory: Path, flags: dict[str, Any], overwrite: bool) -> bool:
    """Bind an output directory to the flags of a run; False if that run is finished already.

    A run that has no checkpoint yet gives way to any other: nothing would be lost.

    Args:
        overwrite: drop the run that is there, its checkpoints included, where the flags differ or it is finished.

    Raises:
        UsageError: it belongs to a run with other flags (says which), or holds files of no run.
    """
    flags = json.loads(json.dumps(flags, default=str))
    try:
        previous = storage.read_json(str(directory / FLAGS))
    except FileNotFoundError:
        if directory.exists() and any(directory.iterdir()) and not overwrite:
            raise UsageError(
                f"{directory} holds files but no training run; choose another --output-dir, or pass --overwrite"
            ) from None
        previous = None
    except ValueError:
        raise UsageError(f"{directory / FLAGS} is not readable JSON; choose another --output-dir") from None
    finished = (directory / SUMMARY).exists()
    # a flag that a library has added or removed since is no other flag
    shared = {name: previous[name] for name in flags if name in previous} if previous else {}
    differing = differences(shared, {name: flags[name] for name in shared})
    if differing and not overwrite and (finished or last_checkpoint(directory)):
        raise UsageError(
            f"{directory} holds a run with other flags ({'; '.join(differing)}); "
            "choose another --output-dir, or pass --overwrite to start afresh"
        )
    if overwrite:
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (directory / SUMMARY).unlink(missing_ok=True)
    elif finished:
        return False
    storage.write_json(str(directory / FLAGS), flags)
    return True


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes ``trainer_state.json`` last, so one without it was cut short."""
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(checkpoints) if _complete(path)), None)


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
