"""Triton's interpreter without what costs it most of its time, and changes nothing.

It looks for overflow and asserts, with assertions off, that there is none; every call of a function
in a kernel replaces triton.language by Python again, as the launch has done; and of every number
the type, the shape and, of a constant, all else are made anew.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    compiled, patch = tl.core.range, interpreter._patch_lang

    @cache
    def languages_of(fn: Any) -> list[Any]:
        return [x for x in fn.__globals__.values() if x is tl or x is tl.core]

    def patch_once(fn: Any) -> Any:
        languages = languages_of(fn)
        done = bool(languages) and all(x.range is not compiled for x in languages)
        return interpreter._LangPatchScope() if done else patch(fn)

    interpreter._patch_lang = patch_once
    _remember_types()


def _remember_types() -> None:
    np_dtype, constant = interpreter._get_np_dtype, TritonSemantic.scalar_constant
    make_type = tl.block_type.__init__
    np_dtypes: dict[str, Any] = {}
    types: dict[tuple[int, ...], tl.block_type] = {}
    constants: dict[tuple[object, ...], tl.tensor] = {}

    def np_dtype_of(dtype: tl.dtype) -> Any:
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    def init_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple([getattr(x, "value", x) for x in shape])
        if sizes not in types:
            make_type(self, element_ty, shape)
            types[sizes] = self
        of_shape = types[sizes]
        self.element_ty, self.shape, self.numel = element_ty, of_shape.shape, of_shape.numel
        self.name = f"<{sizes}, {element_ty}>"

    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(x) for x in sizes]), tl.constexpr(math.prod(sizes))

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())

    def constant_of(self: TritonSemantic, value: Any, dtype: tl.dtype) -> tl.tensor:
        key = id(self), type(value), value, dtype.name
        if key not in constants:
            constants[key] = constant(self, value, dtype)
        return constants[key]

    interpreter._get_np_dtype = np_dtype_of
    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor
    TritonSemantic.scalar_constant = constant_of
