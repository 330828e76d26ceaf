"""A workaround for a race in MKL, which can make the first results of a process inexact."""

import torch

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)


def choose_kernels() -> None:
    """Call MKL's vector functions once, in one thread, so that later results are the same in every process.

    MKL 2024, which torch 2.13 uses on a CPU, chooses the kernel of a vector function in its first call. If several
    threads make the first call at the same time, one of them can run a kernel of low accuracy (relative errors of
    1e-4): https://github.com/pytorch/pytorch/issues/188792. A shard or a resumed run would then have other bits.
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(half)
