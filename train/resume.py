"""Runs that go on by themselves: an output directory belongs to one set of flags, its checkpoints with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import IO, Any

from pipeline import storage
from pipeline.cli import UsageError
from pipeline.commit import differences
from pipeline.manifests import Manifest

FLAGS, SUMMARY = "run.json", "summary.json"
UNFINISHED = ".unfinished"  # where a checkpoint grows until it is whole, and where one goes to be deleted
FILES = "files.json"  # written last into a checkpoint: size and CRC-32 of each of its files
LOCK = ".lock"
OVERWRITE = ".overwrite"  # while it is there, workers of a cluster have a run to drop
VISIBLE_SECONDS = 60.0  # NFS shows another node's file late
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
        if _is_foreign(directory):
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
    shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
    if overwrite:
        drop(directory)
    elif finished:
        return False
    storage.write_json(str(directory / FLAGS), flags)
    (directory / OVERWRITE).unlink(missing_ok=True)
    return True


def _is_foreign(directory: Path) -> bool:
    """Whether there are files, and no run has been there."""
    if (directory / FLAGS).exists() or not directory.exists():
        return False
    return any(not path.name.startswith(".") for path in directory.iterdir())


def has_begun(directory: Path, shards: Manifest, targets: Manifest | None) -> bool:
    """Whether there is a checkpoint of a run on these shards and targets, which were checked when it began."""
    try:
        flags = storage.read_json(str(directory / FLAGS))
        same = flags["shards"] == shards.fingerprint_hash
        same &= flags["targets"] == (targets and targets.fingerprint_hash)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return same and last_checkpoint(directory) is not None


def drop(directory: Path) -> None:
    """Drop the run that is in a directory: its checkpoints, and what says that it is finished."""
    if (directory / FLAGS).exists():
        (directory / SUMMARY).unlink(missing_ok=True)
        for checkpoint in checkpoints(directory):
            _delete(checkpoint)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(directory: Path, contents: bool = False) -> Path | None:
    """The newest whole checkpoint; with ``contents`` one of which every byte is as it was written."""
    return next((path for path in reversed(checkpoints(directory)) if _is_whole(path, contents)), None)


def lock(directory: Path, of_cluster: bool = False) -> IO[bytes] | None:
    """Keep other runs out of an output directory until the file that is returned is closed, or this process ends.

    Nothing is locked in a directory that is no run's, nor where the file system knows no locks.

    Args:
        of_cluster: keep out what else would start workers on a cluster, not the workers.

    Raises:
        UsageError: another run is at work there.
    """
    if _is_foreign(directory):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / LOCK, "wb")  # noqa: SIM115
    try:
        # of the process, so that no loader worker keeps it when the run is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(of_cluster))  # a byte of its own
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None
        raise UsageError(f"another run is at work in {directory}; wait for its end, or end it") from None
    return file


def check_visible(directory: Path, checkpoint: Path | None) -> None:
    """Refuse to train where a rank does not see what the first has just written.

    Raises:
        UsageError: the directory is not shared.
    """
    needed = checkpoint or directory / FLAGS
    until = time.monotonic() + VISIBLE_SECONDS
    while not needed.exists():
        if time.monotonic() > until:
            raise UsageError(f"{needed} is not visible from all nodes; choose an --output-dir on a path they share")
        time.sleep(0.5)


def complete(directory: Path, name: str, limit: int | None, best: str | None) -> None:
    """Give a checkpoint that was written in ``UNFINISHED`` its name, and delete old ones.

    Args:
        limit: how many to keep, None or 0 for all.
        best: the name of one that is kept in any case.
    """
    written, checkpoint = directory / UNFINISHED / name, directory / name
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    marks = {str(file.relative_to(written)): [file.stat().st_size, _crc32(file)] for file in files}
    storage.write_json(str(written / FILES), marks)
    for folder in {file.parent for file in files} | {written}:
        storage.sync_directory(folder)
    if checkpoint.exists():
        _delete(checkpoint)
    os.replace(written, checkpoint)
    storage.sync_directory(directory)
    if limit:
        for old in [path for path in checkpoints(directory) if _is_whole(path)][:-limit]:
            if old.name != best:
                _delete(old)


def _delete(checkpoint: Path) -> None:
    """First under another name: half a checkpoint is never found under its own."""
    doomed = checkpoint.parent / UNFINISHED / f"{checkpoint.name}.old"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _is_whole(checkpoint: Path, contents: bool = False) -> bool:
    """Whether every file is there that was there when it got its name, as long and, if asked, as it was then."""
    try:
        for name, (size, crc32) in json.loads((checkpoint / FILES).read_text()).items():
            file = checkpoint / name
            if file.stat().st_size != size or (contents and _crc32(file) != crc32):
                return False
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return True


def _crc32(file: Path) -> int:
    crc32 = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
