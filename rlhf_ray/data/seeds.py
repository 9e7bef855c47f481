"""Seeds of random number generators, derived from names and numbers instead of drawn from a shared stream."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, its type and its position.

    Two different lists of parts give unrelated seeds (BLAKE2b), the same list gives the same seed on every machine, so
    that a repeated request repeats its random numbers and no generator's state travels between processes.
    """
    encoded = b"".join(_encode(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big") >> 1


def _encode(part: int | str) -> bytes:
    """The part with its type and length in front, so that ("ab", "c") and ("a", "bc") differ."""
    kind = "s" if isinstance(part, str) else "i"
    text = (part if isinstance(part, str) else str(int(part))).encode("utf-8")
    return f"{kind}{len(text)}:".encode() + text
