"""The wheel holds the library alone, and works in an environment that has nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from harness import ROOT

EXAMPLE = """
import torch
from entropy_masking import Masker, MaskPolicy
masker = Masker(vocab_size=50, special_token_ids=[0, 1, 2, 3, 4], mask_id=4, pad_id=0)
batch = {"input_ids": torch.randint(5, 50, (2, 40)), "entropy": torch.rand(2, 40), "sequence_id": torch.arange(2)}
print(masker(batch | {"epoch": torch.zeros(2, dtype=torch.long)}, MaskPolicy())["positions_BP"].shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"entropy_masking"}
    assert "entropy_masking/py.typed" in names and "entropy_masking/masking/policy.py" in names


def test_it_works_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment with the dependencies, the wheel, and no way to the checkout."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([str(part) for part in pip], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # a path file adds the dependencies; those of an editable installation there are not read
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run([python, "-c", EXAMPLE], check=True, **run).stdout == "torch.Size([2, 11])\n"
    for name in ("pipeline", "train", "glue"):
        ended = subprocess.run([python, "-c", f"import {name}"], **run)
        assert ended.returncode == 1 and "ModuleNotFoundError" in ended.stderr
