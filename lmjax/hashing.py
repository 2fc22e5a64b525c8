"""The 32-bit hash that goldfish masks are made with: on tokens inside the step, on words in the data pipeline.

What lives here: the mixer and the constants of the window hash, so that both sides mean the same thing. It works on
uint32 arrays of NumPy and of JAX alike and imports neither JAX nor any room of this house.
"""

import numpy as np

GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, odd: spreads neighbouring ids
FACTOR = 0x01000193  # FNV's prime: position j of a window counts FACTOR^j
NEVER = 2**32 - 1  # a hash value above every threshold: such a target is always kept


def fmix32(x):
    """The finaliser of MurmurHash3 (Appleby): a bijection of uint32 that flips half of the bits."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def spread(ids, seed: int):
    """Each id (uint32 array) mixed by itself, in a way that depends on the seed."""
    return fmix32(ids * np.uint32(GOLDEN) + np.uint32((seed + 1) % 2**32))
