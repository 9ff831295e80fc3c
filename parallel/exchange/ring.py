"""Ring exchange: keys and values come rank by rank while attention runs on those in hand.

At step s, rank r works on the keys of rank r - s. HSTU attention has no softmax, so a step's result
is simply added to the sum. In the backward pass the gradients of a rank's keys travel the ring: at
step s every rank adds its own to what rank r - 1 found for the same keys one step before, so that
the sums come home in ring order, the same in every run.

What hides what, in the backward pass: dq of the rank's own keys hides the first keys on their way;
then each step's dq hides its dk and dv on theirs; dk and dv of the own keys come last, and add what
came home. The last step writes q's dtype: results need no further pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention import accumulator, attention_forward, key_value_gradients, query_gradient
from parallel.visibility import Visibility

Block = tuple[Tensor, Tensor]  # keys and values of one rank, or their gradients
KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
MESSAGE_BYTES = 128 << 20  # long since at the speed of the link


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _RingAttention.apply(q, k, v, seen, alpha, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, alpha: float, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.seen, ctx.factors = seen, dict(alpha=alpha, scale=scale)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for heads in _chunks(k, v, seen):
            _forward(out[:, heads], q[:, heads], k[:, heads], v[:, heads], seen, ctx.factors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        for h in _chunks(k, v, ctx.seen):
            given = (dout[:, h], q[:, h], k[:, h], v[:, h])
            _backward(dq[:, h], dk[:, h], dv[:, h], *given, ctx.seen, ctx.factors)
        return dq, dk, dv, None, None, None


def _chunks(k: Tensor, v: Tensor, seen: Visibility) -> list[slice]:
    """Heads that go round together: all, unless a long sequence would make the messages too large.

    Buffers then stay small beside what the layers keep, and the longest sequence grows with cp.
    """
    heads = k.shape[1]
    message = seen.most_rows * heads * (k.shape[2] + v.shape[2]) * k.itemsize
    each = -(-heads // min(heads, -(-message // MESSAGE_BYTES))) if message else heads
    return [slice(start, start + each) for start in range(0, heads, each)]


def _forward(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, factors: dict[str, float]
) -> None:
    """Writes out."""
    ring, total = _Ring(k, v, seen), None
    if not ring.steps_seen:
        out.zero_()
    for step in range(ring.size):
        block = ring.block(step)
        ring.fetch(step + 1)
        if block:
            mask, target = ring.mask(step) | factors, out if ring.is_last(step) else total
            total = attention_forward(q, *block, **mask, add=total, out=target)


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Visibility,
    factors: dict[str, float],
) -> None:
    """Writes dq, dk, dv."""
    ring, total = _Ring(k, v, seen), None
    if not ring.steps_seen:
        dq.zero_()
    for step in range(ring.size):
        block = ring.block(step)
        ring.fetch(step + 1)
        mask = ring.mask(step) | factors
        if step:
            found, target = ring.gradients_so_far(step), ring.gradients_to_pass_on(step)
            if block:
                key_value_gradients(dout, q, *block, **mask, add=found, out=target)
            elif found:
                _copy(found, target)
            ring.pass_gradients(step)
        if block:
            written = dq if ring.is_last(step) else total
            total = query_gradient(dout, q, *block, **mask, add=total, out=written)

    found = ring.gradients_so_far(ring.size)
    if ring.block(0):
        mask = ring.mask(0) | factors
        key_value_gradients(dout, q, k, v, **mask, add=found, out=(dk, dv))
    else:
        _copy(found, (dk, dv))


class _Ring:
    """One pass over the ring: what this rank sees, sends and receives at which step."""

    def __init__(self, k: Tensor, v: Tensor, seen: Visibility) -> None:
        shard = seen.shard
        assert shard.transport is not None
        self.k, self.v, self.seen, self.transport = k, v, seen, shard.transport
        self.parts, self.rank, self.size = shard.device_parts, shard.rank, shard.cp_size
        self.steps_seen = [s for s in range(self.size) if self._sees(self.rank, self.rank - s)]
        self.message = self._outbox(KEYS, self.rank, k.dtype)
        _copy((k, v), self._split(self.message))

    def is_last(self, step: int) -> bool:
        return step == self.steps_seen[-1]

    def mask(self, step: int) -> dict[str, Any]:
        keys = self.parts[self._owner(step)]
        return dict(queries=self.parts[self.rank], keys=keys, intervals=self.seen.intervals)

    def fetch(self, step: int) -> None:
        """Have the keys and values of a step brought here, if they are seen; and send mine."""
        if step < self.size:
            owner, reader = self._owner(step), (self.rank + step) % self.size
            self.keys_coming = self.transport.swap(
                KEYS,
                self.message,
                reader if self._sees(reader, self.rank) else None,
                self._inbox(step),
                owner if self._sees(self.rank, owner) else None,
            )

    def block(self, step: int) -> Block | None:
        """The keys and values of a step, when they are here; None if nothing of them is seen."""
        if step not in self.steps_seen:
            return None
        if step == 0:
            return self.k, self.v
        self.keys_coming.wait()
        return self._split(self._inbox(step))

    def gradients_to_pass_on(self, step: int) -> Block:
        """Where to write dk and dv of a step's keys, with what the ranks before found for them."""
        self.gradients = self._outbox(GRADIENTS, self._owner(step), accumulator(self.k.dtype))
        return self._split(self.gradients)

    def pass_gradients(self, step: int) -> None:
        """On to the next rank, which works on the same keys at its next step."""
        self.gradients_coming = self.transport.swap(
            GRADIENTS,
            self.gradients,
            (self.rank + 1) % self.size if self._found(self.rank, step) else None,
            self._gradient_inbox(step + 1),
            (self.rank - 1) % self.size if self._found(self.rank - 1, step) else None,
        )

    def gradients_so_far(self, step: int) -> Block | None:
        """What the ranks before this one found for a step's keys; None if none of them sees any."""
        if not self._found(self.rank - 1, step - 1):
            return None
        self.gradients_coming.wait()
        return self._split(self._gradient_inbox(step))

    def _found(self, rank: int, step: int) -> bool:
        """Whether `rank` has gradients to pass on after a step, of its own or of ranks before."""
        return any(self._sees(rank - s, rank - step) for s in range(step))

    def _owner(self, step: int) -> int:
        """Whose keys this rank works on."""
        return (self.rank - step) % self.size

    def _sees(self, rank: int, owner: int) -> bool:
        return self.seen.meets[rank % self.size][owner % self.size]

    def _inbox(self, step: int) -> Tensor:
        """Two take turns: one fills while the other is worked on."""
        numel = self._numel(self._owner(step))
        return self.transport.inbox(f"{KEYS} {step % 2}", numel, self.k.dtype)

    def _gradient_inbox(self, step: int) -> Tensor:
        """One will do: it fills again once the kernel that reads it has ended."""
        numel = self._numel(self._owner(step))
        return self.transport.inbox(GRADIENTS, numel, accumulator(self.k.dtype))

    def _outbox(self, name: str, owner: int, dtype: torch.dtype) -> Tensor:
        capacity = max(self._numel(rank) for rank in range(self.size))
        return self.transport.outbox(name, self._numel(owner), capacity, dtype)

    def _numel(self, owner: int) -> int:
        row = self.k.shape[1] * (self.k.shape[2] + self.v.shape[2])
        return self.parts[owner].num_rows * row

    def _split(self, flat: Tensor) -> Block:
        """A message as keys [rows, H, Dqk] and values [rows, H, Dv], each contiguous."""
        heads, qk_dim, v_dim = *self.k.shape[1:], self.v.shape[2]
        rows = flat.numel() // (heads * (qk_dim + v_dim))
        k, v = flat.split([rows * heads * qk_dim, rows * heads * v_dim])
        return k.view(rows, heads, qk_dim), v.view(rows, heads, v_dim)


def _copy(source: Block | None, target: Block) -> None:
    """Zeros for None. The source's rows may lie apart."""
    for i, x in enumerate(target):
        if source is None:
            x.zero_()
            continue
        pair = [y.flatten(1) for y in (source[i], x)]
        if source[i].dtype == x.dtype and all(map(_in_words, pair)):
            pair = [y.view(torch.int64) for y in pair]  # else numbers are copied one by one
        pair[1].copy_(pair[0])


def _in_words(x: Tensor) -> bool:
    """Whether rows of x are whole words of eight bytes."""
    sizes = (x.shape[1], x.stride(0), x.storage_offset())
    return x.stride(1) == 1 and not any(size * x.itemsize % 8 for size in sizes)
