"""Arithmetic of sizes on the host. Triton's own versions are for kernels: here each costs 3 us."""


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x, for x >= 1."""
    return 1 << (x - 1).bit_length()
