"""One seed per use, derived by a hash: no generator state to carry, so none to lose on resume."""

from __future__ import annotations

import hashlib

#: What a seed is for; a number of its own keeps two uses of one (seed, step, ...) apart.
INIT, PROBLEM, SAMPLE = range(3)


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) from integers such as (seed, purpose, step, prompt, sample).

    BLAKE2b with an 8-byte digest over the parts as little-endian signed 64-bit integers, its top bit cleared. The
    same on every machine and in every Python.
    """
    data = b"".join(part.to_bytes(8, "little", signed=True) for part in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") & (2**63 - 1)
