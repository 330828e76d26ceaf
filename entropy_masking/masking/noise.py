"""Noise as a hash of a key, without a generator's state: it is the same for any split of the work. Pure functions.

Shapes: B rows, L tokens, K positions of a row, N numbers.
"""

import torch
from torch import Tensor

# each use of noise has its own stream, so that the uses are independent
SELECTION, HARD, CORRUPTION, REPLACEMENT, PREDICTION, SAMPLE = range(6)


def noise(seed: int, stream: int, epoch_B: Tensor, sequence_id_B: Tensor, position_X: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) [B, K] float64: a hash of (seed, stream, epoch, sequence id, position).

    Args:
        position_X: int64, [K] for every row or [B, K].
    """
    # computed on the CPU, so that nothing waits for an accelerator
    key = int(_mix(_mix(torch.tensor(seed, dtype=torch.int64)) + stream))
    key_B = _mix(_mix(epoch_B.long() + key) + sequence_id_B.long())
    bits_BK = _shift_right(_mix(_mix(position_X) + key_B[:, None]), 11)
    return (bits_BK.double() + 0.5) * 2.0**-53


def hash_order(seed: int, *key: int, size: int) -> Tensor:
    """A permutation of ``range(size)``, a function of (seed, key) alone: no library version changes it."""
    return hashes(seed, *key, of_N=torch.arange(size)).argsort(stable=True)


def hashes(seed: int, *key: int, of_N: Tensor) -> Tensor:
    """An int64 for each int64 in ``of_N``, a function of it and (seed, key) alone."""
    state = _mix(torch.tensor(seed, dtype=torch.int64))
    for part in key:
        state = _mix(state + part)
    return _mix(_mix(of_N) + state)


def sequence_hash(input_ids_BL: Tensor, attended_BL: Tensor) -> Tensor:
    """An id [B] int64 for rows that have none: a hash of their tokens without the padding."""
    hash_BL = _mix(_mix(torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)) + input_ids_BL.long())
    return _mix((hash_BL * attended_BL).sum(1))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic, after its increment."""
    x = x + -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift. Torch shifts an int64 arithmetically: it repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
