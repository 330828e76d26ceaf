"""Large buffers that are freed and allocated again, in a process of their own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys
import torch
from entropy_masking.commands.memory import keep_buffers

if sys.argv[1] == "keep":
    keep_buffers()
for count in range(30):
    torch.ones(2**24)  # 64 MiB
    if count == 19:  # the first ones may come from new memory
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc returns large buffers to the kernel")
def test_buffers_are_kept() -> None:
    faults = {}
    for choice in ("keep", "default"):
        run = subprocess.run([sys.executable, "-c", FAULTS, choice], capture_output=True, text=True, check=True)
        faults[choice] = int(run.stdout)
    assert faults["keep"] < 100 < faults["default"]
