"""By which keys Triton's cache knows kernels, if asked for them in this order or in reverse.

    python -m tests.kernels.keys 1
    python -m tests.kernels.keys -1

Writes a line for each: kernel, key, globals that have one name and several values. A process of its
own, since Triton either compiles or interprets, and has a function's key but once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import kernels.triton
from kernels.triton.launcher import Launcher, settle


def main(step: int) -> None:
    root = Path(kernels.triton.__path__[0])
    found = {}
    for path in sorted(root.rglob("[!_]*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        for x in vars(import_module(f"kernels.triton.{name}")).values():
            if isinstance(x, Launcher):
                found[f"{x.kernel.fn.__module__}.{x.kernel.fn.__name__}"] = x.kernel
    for name in sorted(found)[::step]:
        kernel, values = found[name], dict[str, set[str]]()
        settle(kernel)
        for (of_global, _), (value, _) in kernel.used_global_vals.items():
            values.setdefault(of_global, set()).add(repr(value))
        several = [of_global for of_global, x in values.items() if len(x) > 1]
        print(name, kernel.cache_key, several)


if __name__ == "__main__":
    main(int(sys.argv[1]))
