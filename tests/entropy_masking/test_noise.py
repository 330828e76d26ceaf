"""Noise that is a hash: against whole numbers, and by statistics."""

import math

import numpy as np
import torch
from rows import VOCAB, L, keys
from scipy import stats

from entropy_masking.masking import noise


def splitmix64(x: int) -> int:
    """In Python's whole numbers, from the published constants."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_noise_is_the_documented_hash() -> None:
    seed, stream, length = 11, 2, 5
    ids, epochs = [3, (5 << 32) + 17], [0, 4]
    found = noise.noise(seed, stream, torch.tensor(epochs), torch.tensor(ids), torch.arange(length))
    for row, (sequence, epoch) in enumerate(zip(ids, epochs, strict=True)):
        key = splitmix64(splitmix64(splitmix64(splitmix64(seed) + stream) + epoch) + sequence)
        for position in range(length):
            bits = splitmix64(splitmix64(position) + key) >> 11
            assert float(found[row, position]) == (bits + 0.5) * 2**-53


def test_noise_is_uniform_and_independent_across_everything() -> None:
    rows, length = 2000, 64
    sequence_B, epoch_B = keys(rows)
    base = noise.noise(0, 0, epoch_B, sequence_B, torch.arange(length))
    assert stats.kstest(base.flatten().numpy(), "uniform").pvalue > 1e-4
    others = {
        "seed": noise.noise(1, 0, epoch_B, sequence_B, torch.arange(length)),
        "stream": noise.noise(0, 1, epoch_B, sequence_B, torch.arange(length)),
        "epoch": noise.noise(0, 0, epoch_B + 1, sequence_B, torch.arange(length)),
        "sequence": noise.noise(0, 0, epoch_B, sequence_B + 1, torch.arange(length)),
        "position": base.roll(1, dims=1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(rows * length), name


def test_hashes_are_of_each_number_alone() -> None:
    whole = noise.hashes(5, 1, of_N=torch.arange(100))
    assert torch.equal(noise.hashes(5, 1, of_N=torch.arange(40, 60)), whole[40:60])
    assert len(set(whole.tolist())) == 100
    assert not (noise.hashes(5, 2, of_N=torch.arange(100)) == whole).any()


def test_hash_order_is_a_permutation_of_its_key() -> None:
    first = noise.hash_order(0, 1, 2, size=1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert torch.equal(first, noise.hash_order(0, 1, 2, size=1000))
    for key in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert not torch.equal(first, noise.hash_order(*key, size=1000))
    assert abs(np.corrcoef(first.numpy(), np.arange(1000))[0, 1]) < 0.15


def test_rows_without_an_id_are_known_by_their_tokens() -> None:
    ids_BL = torch.randint(5, VOCAB, (300, L), generator=torch.Generator().manual_seed(4))
    ids_BL[1], ids_BL[2, :2], ids_BL[3, :2] = ids_BL[0], torch.tensor([5, 6]), torch.tensor([6, 5])
    ids_BL[3, 2:] = ids_BL[2, 2:]
    attended_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    hash_B = noise.sequence_hash(ids_BL, attended_BL)
    assert hash_B[0] == hash_B[1] and len(set(hash_B.tolist())) == 299
    padded_BL = torch.cat([ids_BL, torch.zeros_like(ids_BL)], dim=1)
    attended_BL = torch.cat([attended_BL, torch.zeros_like(attended_BL)], dim=1)
    assert torch.equal(noise.sequence_hash(padded_BL, attended_BL), hash_B)
