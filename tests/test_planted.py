"""Links, FIFOs and checkpoints that somebody else planted: nothing outside a directory is read, copied or written."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import RANDOM, train_here
from made_shards import VOCAB, write_shards

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError
from entropy_masking.models.checkpoints import local_checkpoint
from entropy_masking.shards import commit, manifests
from entropy_masking.shards.faults import check_shards
from train import resume

ESCAPE = "\x1b[31m\x9b2J\u202e\nx"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound directory, not to be changed."""
    return write_shards(tmp_path_factory.mktemp("made") / "shards")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit(path: Path, change: Edit) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def sentence(call: Callable[[], object]) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises((UsageError, RunError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- links and FIFOs -------------------------------------------------------------------------------------------------


def plant(path: Path, kind: str, target: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero" if kind == "device" else target)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("{}")
    return tmp_path / "secret"


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
def test_a_planted_lock_is_refused(tmp_path: Path, secret: Path, kind: str) -> None:
    secret.write_text("precious")
    (tmp_path / "out").mkdir()
    plant(tmp_path / "out" / ".lock", kind, secret)
    assert ".lock is a link, or not a regular file" in sentence(lambda: resume.lock(tmp_path / "out"))
    assert secret.read_text() == "precious"


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["manifest.json", "_records/run.json", "tokenizer/tokenizer.json"])
def test_nothing_waits_for_a_fifo_or_reads_a_device(copy: Path, secret: Path, name: str, kind: str) -> None:
    if name == "_records/run.json":
        (copy / "manifest.json").unlink()
    plant(copy / name, kind, secret)
    with pytest.raises((UsageError, RunError, OSError)) as caught:
        check_shards(manifests.read_manifest(str(copy)))
    assert Path(name).name in str(caught.value)


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
def test_a_tokenizer_is_no_way_out_of_its_directory(copy: Path, secret: Path, kind: str) -> None:
    """It is copied to the student, which may be published."""
    plant(copy / "tokenizer" / "vocab.txt", kind, secret)
    assert "vocab.txt is" in sentence(lambda: check_shards(manifests.read_manifest(str(copy)))), kind
    (copy / "tokenizer" / "vocab.txt").unlink()
    shutil.copytree(copy / "tokenizer", copy.parent / "elsewhere")
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").symlink_to(copy.parent / "elsewhere")
    assert "tokenizer is a link" in sentence(lambda: check_shards(manifests.read_manifest(str(copy))))


def test_links_within_a_cache_of_the_hub_and_to_whole_directories_are_followed(made: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0a1b", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in made.rglob("*") if path.is_file()):
        place = snapshot / file.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    check_shards(manifests.read_manifest(str(snapshot)))
    assert local_checkpoint(str(snapshot / "tokenizer")).is_dir()
    (tmp_path / "link").symlink_to(made)
    check_shards(manifests.read_manifest(str(tmp_path / "link")))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_model_with_a_fifo_or_a_device_is_refused(tmp_path: Path, secret: Path, name: str, kind: str) -> None:
    (tmp_path / "model").mkdir()
    plant(tmp_path / "model" / name, kind, secret)
    assert f"{name} is neither a file" in sentence(lambda: local_checkpoint(str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["_records", "_attempts", "tokenizer"])
def test_scoring_writes_into_no_linked_folder(copy: Path, name: str) -> None:
    run = manifests.read_json_file(commit.Run, manifests.run_uri(str(copy)))
    if (copy / name).exists():
        (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    assert run and f"{name} is a link" in sentence(lambda: commit.begin_run(str(copy), run))


def test_a_checkpoint_holds_plain_files_only(tmp_path: Path, secret: Path) -> None:
    output = tmp_path / "out"

    def write(name: str) -> Path:
        written = output / resume.UNFINISHED / name
        written.mkdir(parents=True)
        (written / "model").write_text("{}")
        resume.complete(output, name, None)
        return output / name

    whole = write("checkpoint-1")
    assert resume.last_checkpoint(output, contents=True) == whole
    marks = json.loads((whole / resume.FILES).read_text())
    for name in ("../../secret", str(secret), "link", "link/../model", "fifo", ".", "missing"):
        plant(whole / "link", "link", secret)
        plant(whole / "fifo", "fifo", secret)
        (whole / resume.FILES).write_text(json.dumps(marks | {name: marks["model"]}))
        assert resume.last_checkpoint(output, contents=True) is None, name
    for broken in ("[" * 100_000, "5", '{"model": 5}', '{"model": [1e999, 1]}'):
        (whole / resume.FILES).write_text(broken)
        assert resume.last_checkpoint(output) is None, broken
    # the name of a checkpoint that is a link, or a linked folder for unfinished ones
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (output / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert output / "checkpoint-2" not in resume.checkpoints(output)
    assert not write("checkpoint-2").is_symlink()
    shutil.rmtree(output / resume.UNFINISHED)
    (output / resume.UNFINISHED).symlink_to(tmp_path / "elsewhere")
    storage.write_json(str(output / resume.RUN), {})
    assert resume.claim(output, {}, overwrite=False) and not (output / resume.UNFINISHED).exists()
    assert (tmp_path / "elsewhere" / "precious").exists()


# --- JSON ------------------------------------------------------------------------------------------------------------

STATE = {"global_step": 1, "max_steps": 2, "log_history": [{"step": 1, "loss": 2.5}], "stateful_callbacks": {}}


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("global_step", "max_steps") for value in ("1", -1, 10**400, None, 1e999)),
        *({"log_history": value} for value in (None, [1], [{"loss": 1.0}], [{"step": 1, "loss": "x"}], [[]])),
        *({"stateful_callbacks": value} for value in ([], {"TrainerControl": 5})),
        *({name: "x"} for name in ("best_model_checkpoint", "epoch", "unknown", "train_batch_size")),
    ],
    ids=str,
)
def test_the_state_of_a_checkpoint_is_checked(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(STATE))
    resume.check_state(tmp_path)
    file.write_text(json.dumps(STATE | change))
    assert str(file) in sentence(lambda: resume.check_state(tmp_path))
    file.write_text("[" * 100_000)
    assert str(file) in sentence(lambda: resume.check_state(tmp_path))


def test_a_checkpoint_that_cannot_be_loaded_ends_the_run_with_a_sentence(made: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "bert", "vocab_size": VOCAB, **sizes}))
    flags = ["--model", tmp_path / "model.json", *RANDOM, "--max-steps", 2, "--save-steps", 1, "--eval-fraction", 0]
    output = tmp_path / "out"
    train_here(made, output, *flags)
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoint-2")
    checkpoint = output / "checkpoint-1"
    marks = json.loads((checkpoint / resume.FILES).read_text())
    for name, data in (
        ("optimizer.pt", b"PK junk"),
        ("model.safetensors", b"\xff" * 99),
        ("rng_state.pth", b"\x80\x04junk"),
        ("trainer_state.json", b"{}"),
    ):
        sound = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data)
        (checkpoint / resume.FILES).write_text(json.dumps(marks | {name: [len(data), zlib.crc32(data)]}))
        assert "checkpoint-1" in sentence(lambda: train_here(made, output, *flags)), name
        (checkpoint / name).write_bytes(sound)
    (checkpoint / resume.FILES).write_text(json.dumps(marks))
    # a link that stands where the model goes changes nothing elsewhere
    (tmp_path / "precious").write_text("precious")
    (output / "model.safetensors").unlink()
    (output / "model.safetensors").symlink_to(tmp_path / "precious")
    train_here(made, output, *flags)
    assert (tmp_path / "precious").read_text() == "precious" and not (output / "model.safetensors").is_symlink()
