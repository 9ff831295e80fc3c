"""Which blocks of keys and queries meet: computed on the device, once per batch, for all layers.

Kernels work on tiles: consecutive rows of one sequence. For every query tile the plan lists the
runs of key rows to visit, and for every key tile the runs of query rows; in a run either every row
sees every key, so nothing is masked, or one of the rows' two intervals is tested. Rows that no run
names cost nothing. Key positions appear only here: the plan turns the position intervals of
`kernels.masks` into intervals of key *rows*, so the kernels never load a position and need not know
where a sequence or a context-parallel shard ends. Heavy tiles come first, see `tiles.py`; key tiles
that far more queries see than see others (a prefix under a window) are walked in segments, side by
side. The host learns no length: the number of tiles is bounded by shapes, and surplus tiles are
empty.

In an `aligned` plan, for `kernels.triton.slopes`, masked runs of query rows test both intervals,
and runs of key rows, all stored as full ones, say which parts are met, not that all is seen.

A launch may visit the rows of several sources, such as keys of different ranks. Each has a plan of
its own with the same tiles; their order goes by what a tile meets in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime import driver

from kernels.jagged import Jagged
from kernels.triton.halves import mark_halves
from kernels.triton.key_tiles import key_tiles_kernel
from kernels.triton.query_tiles import HULLS, query_tiles_kernel
from kernels.triton.tiles import PIECES, SHARES, Records, Tiles, most_segments, order_bits


@dataclass(frozen=True, eq=False)
class Plan:
    """Of one source: see the module's docstring.

    Query tiles have `tile` rows, or only `part`, which divides it: fewer rows next to a mask's edge
    work for nothing. Key tiles have `key_tile` rows. Full runs are multiples of `part`, and that of
    the blocks that walk them.

    aligned: parts begin at multiples of `part` from their sequence's first row. A query part names
    each key part that it meets, once. A key part names those query parts, once each, and where its
    record has too few runs, also some that it does not meet.
    """

    tile: int
    part: int
    key_tile: int
    queries: Jagged
    keys: Jagged
    bounds: Tensor  # int32 [Tq, 4]: the key rows each query sees, in [low, high) and [low, high)
    query_cut: Tiles
    hulls: Tensor  # int32 [HULLS, query parts], in the order of the rows
    tile_records: Records
    part_records: Records
    aligned: bool

    @staticmethod
    def build(
        queries: Jagged,
        keys: Jagged,
        intervals: Tensor,
        tile: int,
        part: int,
        key_tile: int,
        aligned: bool = False,
    ) -> Plan:
        if aligned:
            assert part == key_tile
            assert queries.max_length is not None
            fits = (queries.lengths() <= queries.max_length).all()
            torch._assert_async(fits, "max_length: a sequence of the queries is longer")
        intervals = intervals.contiguous()
        cut = Tiles.cut(queries, intervals, tile, part, aligned)
        bounds = intervals.new_empty(intervals.shape)
        hulls = intervals.new_empty(HULLS, cut.bound * (tile // part))
        tiles, parts = Records.empty(cut.bound, bounds), Records.empty(hulls.shape[1], bounds)
        query_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.origins,
            cut.offsets,
            keys.offsets,
            keys.positions,
            intervals,
            bounds,
            hulls,
            tiles.records,
            tiles.costs,
            parts.records,
            parts.costs,
            PIECES.value * queries.num_sequences,
            hulls.shape[1],
            TILE=tile,
            PART=part,
            ALIGNED=aligned,
            num_warps=4,
        )
        return Plan(tile, part, key_tile, queries, keys, bounds, cut, hulls, tiles, parts, aligned)

    def query_tiles(self, *more: Plan) -> Tensor:
        """int32 [query tiles, 1 + more, RECORD], heavy ones first, as the next two.

        more: of the same queries and other keys.
        """
        return self._ordered("tile_records", more, Records.heavy_first, self.queries)

    @property
    def num_query_tiles(self) -> Tensor:
        """int32 [1]: how many of them there are, on the device; those behind are empty."""
        return self.query_cut.offsets[-1:]

    def query_parts(self, *more: Plan) -> Tensor:
        """int32 [query parts, 1 + more, RECORD]. more: as above."""
        return self._ordered("part_records", more, Records.heavy_first, self.queries)

    def key_tiles(self, *more: Plan) -> Tensor:
        """int32 [segments of key tiles, 1 + more, RECORD].

        more: of the same keys and other queries.
        """
        return self._ordered("key_records", more, Records.in_segments, self.keys)

    @cached_property
    def halved_query_tiles(self) -> Tensor:
        """`query_tiles`, with what halves of them do not see, as the next."""
        return mark_halves(self.query_tiles(), self.bounds, self.tile, self.part, of_keys=False)

    @cached_property
    def halved_key_tiles(self) -> Tensor:
        records = self.key_tiles().clone()  # not all who read those know of riders
        return mark_halves(records, self.bounds, self.key_tile, self.part, of_keys=True)

    @cached_property
    def key_tiles_first_first(self) -> Tensor:
        """The same, but those of equal weight by rows. Those who all add to dq then find what they
        add to in the cache: without, they take a fifth longer (16,384 tokens, causal, H100)."""
        return self.key_records.in_segments(self.part, order_bits(self.keys.num_rows), False)

    def _ordered(
        self,
        kind: str,
        more: tuple[Plan, ...],
        order: Callable[[Records, int, int], Tensor],
        rows: Jagged,
    ) -> Tensor:
        known = self._orders.get((kind, more))
        if known is None:
            records = Records.of_sources([getattr(plan, kind) for plan in (self, *more)])
            known = order(records, self.part, order_bits(rows.num_rows))
            self._orders[kind, more] = known
        return known

    @cached_property
    def _orders(self) -> dict[tuple[str, tuple[Plan, ...]], Tensor]:
        return {}

    @property
    def num_key_tiles(self) -> Tensor:
        """int32 [1]: how many there are, on the device; not counting what segments are more."""
        return self.key_cut.offsets[-1:]

    @property
    def most_segments_more(self) -> int:
        """Than key tiles, at most."""
        return SHARES

    @cached_property
    def key_cut(self) -> Tiles:
        return Tiles.cut(self.keys, None, self.key_tile, self.key_tile, self.aligned)

    @cached_property
    def key_records(self) -> Records:
        """Of the key tiles."""
        cut = self.key_cut
        tiles = Records.empty(cut.bound, self.bounds)
        key_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.origins,
            cut.offsets,
            self.query_cut.pieces,
            self.query_cut.origins,
            self.query_cut.offsets,
            self.hulls,
            tiles.records,
            tiles.costs,
            PIECES.value * self.keys.num_sequences,
            self.hulls.shape[1],
            TILE=self.key_tile,
            PART=self.part,
            PARTS=self.tile // self.part,
            CHUNK=256,
            ALIGNED=self.aligned,
            num_warps=4,
        )
        return tiles

    @cached_property
    def _counters(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def counters(self, count: int) -> Tensor:
        """int32 [count], all zero: kernels that count in them leave them so for the next one. Each
        stream has its own: what runs side by side must not count together."""
        key = count, stream_of(self.bounds)
        known = self._counters.get(key)
        if known is None:
            known = self._counters[key] = self.bounds.new_zeros(count)
        return known

    def most_segments(self, *more: Plan) -> int:
        """Of key tiles that have several: at most as many. more: as of `key_tiles`."""
        return most_segments(sum(plan.hulls.shape[1] for plan in (self, *more)))


# One batch's plans, found again by every layer, forward and backward, and freed with its intervals.
_plans = WeakIdKeyDictionary()


def plan_for(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    tile: int,
    part: int,
    key_tile: int,
    aligned: bool = False,
) -> Plan:
    """The plan of these very tensors, built on first sight. Each stream has its own: it may reach
    one that another has still to write.

    Tensors are told apart by identity and version, so writing into them in place is noticed; but a
    `Weighting` keeps its plan, so that who keeps it must not, nor capture a graph.
    """
    arguments = queries, keys, intervals, tile, part, key_tile, aligned
    if intervals.is_cuda and torch.cuda.is_current_stream_capturing():
        return Plan.build(*arguments)  # a graph must plan at every replay
    parts = (queries.offsets, queries.positions, keys.offsets, keys.positions)
    key = (
        tile,
        part,
        key_tile,
        aligned,
        aligned and queries.max_length,
        stream_of(intervals),
        _version(intervals),
        *map(id, parts),
        *map(_version, parts),
    )
    known = _plans.setdefault(intervals, {})
    plan = known.get(key)
    if plan is None:
        plan = known[key] = Plan.build(*arguments)
    return plan


def stream_of(x: Tensor) -> int:
    """The current stream of its device."""
    return int(driver.active.get_current_stream(x.device.index)) if x.is_cuda else 0


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
