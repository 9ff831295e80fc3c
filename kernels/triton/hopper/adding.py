"""Copies from shared to global memory that add: Triton has them, Gluon has no name for them."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin


@builtin
def async_add_shared_to_global(desc, coord, src, _semantic=None):
    """As `tma.async_copy_shared_to_global`, waited for alike: adds to what is there, atomically."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)
