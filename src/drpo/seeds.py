"""Random streams that depend on their purpose alone, not on earlier draws."""

import hashlib


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed, a function of `parts` alone.

    Every random choice of a run uses a stream seeded this way (run seed, step, problem, sample), so a resumed run,
    another batch size or another process draws the same numbers.

    Args:
        parts: integers and strings that name the stream; their order and types matter.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive(0, 12, "sample") == derive(0, 12, "sample"), derive(0, 12) == derive(0, "12")
        (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
