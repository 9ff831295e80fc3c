"""Reads Hopper's machine code: ptxas has been seen to set up wgmma's operands on one path alone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from triton import knobs

LABEL = re.compile(r"\.L_x_\d+")


def unset_operands(cubin: bytes) -> list[str]:
    """Matrix products that a path leads to without having set the uniform registers that say where
    in shared memory their operands lie."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return unset_in(text)


def unset_in(text: str) -> list[str]:
    code, labels = _parse(text)
    after = [_after(i, code, labels) for i in range(len(code))]
    written = [_written(x) for x in code]
    # Registers that are set whichever path was taken, a bit each; None where none was found yet.
    known: list[int | None] = [0] + [None] * (len(code) - 1)
    changed = [0]
    while changed:
        i = changed.pop()
        now = (known[i] or 0) | written[i]
        for j in after[i]:
            there = known[j]
            if there is None or there & ~now:
                known[j] = now if there is None else there & now
                changed.append(j)
    found = []
    for x, before in zip(code, known, strict=True):
        for first in re.findall(r"gdesc\[UR(\d+)\]", x):
            wanted = 0b11 << int(first)
            if before is not None and wanted & ~before:
                found.append(x)
    return found


def _parse(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and where labels are among them."""
    code: list[str] = []
    labels = {}
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            code.append(found[1])
    return code, labels


def _after(i: int, code: list[str], labels: dict[str, int]) -> list[int]:
    """Where control may go from an instruction."""
    x = code[i]
    sometimes = x.startswith("@")
    jumps = re.search(r"\b(BRA|BRX|EXIT)\b", x)
    to = [labels[name] for name in LABEL.findall(x) if name in labels] if jumps else []
    if jumps and jumps[1] == "BRA":
        sometimes = sometimes or re.search(r"BRA\S* !?U?P\d", x) is not None
    return [*to, i + 1] if i + 1 < len(code) and (not jumps or sometimes) else to


def _written(x: str) -> int:
    """Uniform registers that an instruction sets: what stands first, but for predicates."""
    instruction, _, rest = re.sub(r"^@!?U?P\w+\s+", "", x).partition(" ")
    for operand in rest.split(",")[:3]:
        operand = operand.strip(" ;")
        if found := re.fullmatch(r"UR(\d+)", operand):
            wide = 2 if re.search(r"\.64|WIDE", instruction) else 1
            return ((1 << wide) - 1) << int(found[1])
        if not re.fullmatch(r"U?P(\d|T)", operand):
            break
    return 0
