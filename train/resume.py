"""Resuming a run: an output directory belongs to a run of one identity, and its checkpoints appear whole.

The identity of a run is a dictionary of all that decides what is learned (``train.results``).
"""

import errno
import fcntl
import os
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.shards.commit import differences
from entropy_masking.shards.fields import Count, Seconds, first_fault
from entropy_masking.shards.schema import Manifest

RUN, SUMMARY = "run.json", "summary.json"
GIVEN = "flags.yaml"  # the flags that were given, for --config
WHOLE_SHARDS, DOCUMENTS = "whole shards", "documents"  # what --eval-fraction held out in old runs, and now
BY_WINDOWS, BY_LANES = "windows", "lanes"  # what ordered the data of old runs, and now
UNFINISHED = ".unfinished"  # holds a checkpoint until it is whole, and while it is deleted
FILES = "files.json"  # the last file of a checkpoint: size and CRC-32 of each other file
LOCK = ".lock"
OVERWRITE = ".overwrite"  # while this file exists, workers delete the old run (see ``train.cluster``)
VISIBLE_SECONDS = 60.0  # NFS shows another node's file late


def claim(directory: Path, identity: dict[str, object], overwrite: bool) -> bool:
    """Bind an output directory to the identity of a run; False if this run is already finished.

    A run without a checkpoint is replaced by any other run, since nothing is lost. ``overwrite`` deletes the existing
    run with its checkpoints. Raises UsageError for a run with other flags, and for files that belong to no run.
    """
    if _is_foreign(directory):
        raise UsageError(f"{directory} holds files but no training run; choose another --output-dir")
    previous = _identity_in(directory)
    if previous is None:
        raise UsageError(f"{directory / RUN} is damaged or not written by train/run.py; choose another --output-dir")
    finished = (directory / SUMMARY).exists()
    previous = {"held_out_by": WHOLE_SHARDS, "ordered_by": BY_WINDOWS} | previous if previous else {}
    # a flag that a library has added or removed since then does not make another run
    shared = {name: value for name, value in identity.items() if name in previous}
    differing = differences({name: previous[name] for name in shared}, shared)
    if differing and not overwrite and (finished or last_checkpoint(directory)):
        fix = "choose another --output-dir, or pass --overwrite to start again"
        raise UsageError(f"{directory} holds a run with other flags ({'; '.join(differing)}); {fix}")
    _clear(directory / UNFINISHED)
    if overwrite and (directory / RUN).exists():
        (directory / SUMMARY).unlink(missing_ok=True)
        for checkpoint in checkpoints(directory):
            _delete(checkpoint)
    elif finished:
        return False
    storage.write_json(str(directory / RUN), identity)
    (directory / OVERWRITE).unlink(missing_ok=True)
    return True


def check_kept(directory: Path, identity: dict[str, object]) -> None:
    """Raises RunError if a directory no longer belongs to the run of this identity, as after ``rm -rf``."""
    if _identity_in(directory) != identity:
        fix = "run the command again with an empty --output-dir"
        raise RunError(f"{directory / RUN} was deleted or replaced during the run; {fix}")


def _identity_in(directory: Path) -> dict[str, object] | None:
    """The identity of the run in a directory, empty without a run; None if the file holds something else."""
    try:
        identity = storage.read_json(str(directory / RUN))
    except FileNotFoundError:
        return {}
    except ValueError:
        return None
    return identity if isinstance(identity, dict) else None


def _is_foreign(directory: Path) -> bool:
    """Whether a directory holds files but no run."""
    if (directory / RUN).exists() or not directory.exists():
        return False
    return any(not path.name.startswith(".") for path in directory.iterdir())


def has_checkpoint(directory: Path, shards: Manifest, targets: Manifest | None) -> bool:
    """Whether there is a checkpoint of a run on these shards and targets. They were checked when the run began."""
    found = _identity_in(directory) or {}
    expected = {"shards": shards.fingerprint_hash, "targets": targets and targets.fingerprint_hash}
    return all(found.get(name) == value for name, value in expected.items()) and last_checkpoint(directory) is not None


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not. A link to a directory elsewhere is none."""
    paths = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,15}", path.name)]
    paths = [path for path in paths if not path.is_symlink()]
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(directory: Path, contents: bool = False) -> Path | None:
    """The newest whole checkpoint; ``contents`` also compares every byte with its checksum."""
    return next((path for path in reversed(checkpoints(directory)) if _is_whole(path, contents)), None)


def lock(directory: Path, of_cluster: bool = False) -> IO[bytes] | None:
    """Keep other runs out of an output directory until the returned file is closed, or this process ends.

    A directory with other files is not locked, nor is a file system without locks. ``of_cluster`` locks out a second
    launcher, not this one's workers. Raises UsageError if a run is active there.
    """
    if _is_foreign(directory):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    try:
        file = storage.open_regular(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL, errno.ENXIO):
            raise
        raise UsageError(f"{directory / LOCK} is a link, or not a regular file; delete it") from None
    try:
        # the lock belongs to the process, so no loader worker keeps it when the run is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(of_cluster))  # a byte of its own
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None
        raise UsageError(f"another run is active in {directory}; wait for its end, or end it") from None
    return file


def check_visible(directory: Path, checkpoint: Path | None) -> None:
    """Raises UsageError if a rank does not see a file that rank 0 has written."""
    needed = checkpoint or directory / RUN
    until = time.monotonic() + VISIBLE_SECONDS
    while not needed.exists():
        if time.monotonic() > until:
            raise UsageError(f"{needed} is not visible from all nodes; choose an --output-dir on a shared path")
        time.sleep(0.5)


def complete(directory: Path, name: str, limit: int | None) -> None:
    """Give a checkpoint in ``UNFINISHED`` its name, and keep the last ``limit`` (0 or None: all)."""
    written, checkpoint = directory / UNFINISHED / name, directory / name
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    marks = {str(file.relative_to(written)): [file.stat().st_size, _crc32(file)] for file in files}
    storage.write_json(str(written / FILES), marks)
    for folder in {file.parent for file in files} | {written}:
        storage.sync_directory(folder)
    if os.path.lexists(checkpoint):
        _delete(checkpoint)
    os.replace(written, checkpoint)
    storage.sync_directory(directory)
    if limit:
        for old in [path for path in checkpoints(directory) if _is_whole(path)][:-limit]:
            _delete(old)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint after a rename, so that half a checkpoint never has the name of a whole one."""
    doomed = checkpoint.parent / UNFINISHED / f"{checkpoint.name}.old"
    _clear(doomed)
    doomed.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, doomed)
    _clear(doomed)


def _clear(path: Path) -> None:
    """Delete a directory, or a link with its name but not what the link leads to."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _is_whole(checkpoint: Path, contents: bool = False) -> bool:
    """Whether all files of a checkpoint have their size and, with ``contents``, their CRC-32 of ``files.json``.

    Files outside the checkpoint and links are none of its files.
    """
    own = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_symlink()}
    try:
        for name, (size, crc32) in storage.read_json(str(checkpoint / FILES)).items():
            file = checkpoint / name
            sound = name in own and file.is_file() and file.stat().st_size == size
            if not sound or (contents and _crc32(file) != crc32):
                return False
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return True


class _Logged(BaseModel):
    """An entry of a log; all losses and seconds that it has are numbers."""

    model_config = ConfigDict(strict=True)
    step: Count
    loss: float = 0
    eval_loss: float = 0
    train_seconds: Seconds = 0


class _State(BaseModel):
    """What Trainer and ``train.results`` read of ``trainer_state.json``."""

    model_config = ConfigDict(strict=True)
    global_step: Count
    max_steps: Count
    epoch: float | None = None
    num_train_epochs: float = 0
    train_batch_size: Count | None = None
    num_input_tokens_seen: Count = 0
    total_flos: Annotated[float, Field(ge=0, le=1e36)] = 0
    log_history: list[_Logged]
    best_model_checkpoint: None = None  # with one, Trainer may delete the other checkpoints
    stateful_callbacks: dict[str, dict[str, object] | list[object]]


def check_state(checkpoint: Path | None) -> None:
    """Raises UsageError if the state in a checkpoint has other values than Trainer writes."""
    if checkpoint is None:
        return
    file = checkpoint / TRAINER_STATE_NAME
    try:
        _State.model_validate_json(storage.read_bytes(str(file)))
        TrainerState.load_from_json(str(file))
    except (ValueError, TypeError, RecursionError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else one_line(error)
        raise UsageError(f"{file} is not the state of a training run ({reason}); delete {checkpoint}") from None


def _crc32(file: Path) -> int:
    crc32 = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
