"""The wheel holds the library alone, and works in an environment that has nothing of the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from harness import ROOT
from packaging.requirements import Requirement

from entropy_masking.shards import manifests

EXAMPLE = """
import importlib, pkgutil, sys
import torch
import entropy_masking
from entropy_masking import Masker, MaskPolicy
masker = Masker(vocab_size=50, special_token_ids=[0, 1, 2, 3, 4], mask_id=4, pad_id=0)
batch = {"input_ids": torch.randint(5, 50, (2, 40)), "entropy": torch.rand(2, 40), "sequence_id": torch.arange(2)}
print(masker(batch | {"epoch": torch.zeros(2, dtype=torch.long)}, MaskPolicy())["positions_BP"].shape)
for module in pkgutil.walk_packages(entropy_masking.__path__, "entropy_masking."):
    importlib.import_module(module.name)
print(len(entropy_masking.read_manifest(sys.argv[1]).shards))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    # without files of an older build, and without new ones in the checkout
    (directory / "setup.cfg").write_text(f"[build]\nbuild_base = {directory}\n[egg_info]\negg_base = {directory}\n")
    environment = os.environ | {"DIST_EXTRA_CONFIG": str(directory / "setup.cfg")}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, env=environment)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"entropy_masking"}
    assert "entropy_masking/py.typed" in names and "entropy_masking/masking/policy.py" in names

    assert not any("commands" in name for name in names)


def dependencies(installed: Distribution) -> list[Distribution]:
    """The distributions that a distribution requires, and those that they require."""
    needed: dict[str, Distribution] = {}
    pending = [(installed, {""})]
    while pending:
        parent, extras = pending.pop()
        for requirement in map(Requirement, parent.requires or []):
            marker = requirement.marker
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
            if applies and requirement.name not in needed:
                needed[requirement.name] = distribution(requirement.name)
                pending.append((needed[requirement.name], {"", *requirement.extras}))
    return list(needed.values())


def test_it_works_alone(wheel: Path, scored: Path, tmp_path: Path) -> None:
    """In an environment with the wheel, what it requires, and no way to the checkout."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([str(part) for part in pip], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (installed,) = distributions(path=[str(site)])
    for required in dependencies(installed):
        for name in {file.parts[0] for file in required.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(required.locate_file(name))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    ended = subprocess.run([python, "-c", EXAMPLE, scored], **run)
    shards = len(manifests.read_manifest(str(scored)).shards)
    assert ended.stdout == f"torch.Size([2, 11])\n{shards}\n", ended.stderr
    for name in ("pipeline", "train", "glue", "ray", "datasets"):
        ended = subprocess.run([python, "-c", f"import {name}"], **run)
        assert ended.returncode == 1 and "ModuleNotFoundError" in ended.stderr
