"""Randomness with an address: one integer seed, and a generator for each (purpose, step).

Nothing in the package touches the global random state, so any single draw can be repeated alone.
"""

import zlib

import numpy as np


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return a 63-bit seed for one purpose and step, the same on every machine.

    >>> derived_seed(0, "splits") == derived_seed(0, "splits")
    True
    >>> derived_seed(0, "splits") == derived_seed(0, "rollouts")
    False
    """
    return int(generator(seed, purpose, step).integers(2**63))


def generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """Return the NumPy generator that belongs to (seed, purpose, step).

    >>> generator(1, "a").integers(100) == generator(1, "a").integers(100)
    np.True_
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got seed={seed}, step={step}")
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), step])
