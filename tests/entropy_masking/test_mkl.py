"""The first results of a process, computed in several threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSES = 3000  # without choose_kernels about one in 400 differs, on two busy cores


@pytest.mark.exhaustive
def test_the_first_results_equal_the_second() -> None:
    """In a process of its own, whose children have not called any function before. It computes in one thread itself."""
    subprocess.run([sys.executable, __file__], check=True, timeout=600)


def main() -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import torch

    from entropy_masking.mkl import choose_kernels

    torch.set_num_threads(1)
    numbers = torch.linspace(0.05, 0.95, 8 * 4096)
    choose_kernels()
    for _ in range(PROCESSES):
        if not (child := os.fork()):
            torch.set_num_threads(8)
            equal = all(torch.equal(function(numbers), function(numbers)) for function in (torch.exp, torch.log))
            os._exit(not equal)
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
