"""Runs that go on by themselves: an output directory belongs to one set of flags, its checkpoints with it."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
        overwrite: drop the run that is there, its checkpoints included; files of no run are never dropped.

    Raises:
        UsageError: it belongs to a run with other flags (says which), or holds files of no run.
    """
    flags = json.loads(json.dumps(flags, default=str))
    try:
        previous = storage.read_json(str(directory / FLAGS))
    except FileNotFoundError:
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f"{directory} holds files but no training run; choose another --output-dir") from None
        previous = {}
    except ValueError:
        previous = None
    if not isinstance(previous, dict):
        raise UsageError(f"{directory / FLAGS} does not hold the flags of a run; choose another --output-dir")
    finished = (directory / SUMMARY).exists()
    # a flag that a library has added or removed since is no other flag
    shared = {name: previous[name] for name in flags if name in previous}
    differing = differences(shared, {name: flags[name] for name in shared})
    if differing and not overwrite and (finished or last_checkpoint(directory)):
        raise UsageError(
            f"{directory} holds a run with other flags ({'; '.join(differing)}); "
            "choose another --output-dir, or pass --overwrite to start afresh"
        )
    if overwrite:
        for checkpoint in checkpoints(directory):
            shutil.rmtree(checkpoint)
        (directory / SUMMARY).unlink(missing_ok=True)
    elif finished:
        return False
    storage.write_json(str(directory / FLAGS), flags)
    return True


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((path for path in reversed(checkpoints(directory)) if _complete(path)), None)


def _complete(checkpoint: Path) -> bool:
    """Whether the state, which Trainer writes last, is there, and neither weights nor the rest were cut short."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    others = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return bool(weights) and all(zipfile.is_zipfile(file) for file in others)
