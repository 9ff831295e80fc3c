"""Memory that a kernel may take for a moment, to be faster. One limit for the whole process."""

from __future__ import annotations

_limit = 4 << 30


def limit_scratch(num_bytes: int) -> None:
    """At most so much on each device at a time; 0: none. 4 GiB unless told otherwise.

    Small buffers, and copies of rows whose heads are padded, do not count.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes: want 0 or more, got {num_bytes}")
    global _limit
    _limit = num_bytes


def scratch_limit() -> int:
    return _limit
