"""Moving rows between layouts: every row arrives, the gradient comes back, suffixes drop rows."""

from __future__ import annotations

import pytest
import torch

from kernels.jagged import Jagged, lengths_to_offsets
from parallel.layout import LAYOUTS
from parallel.mesh import Mesh, build_mesh
from parallel.relayout import Relayout, relayout
from parallel.spans import Line

CPU = torch.device("cpu")
LENGTHS = torch.tensor([0, 1, 2, 5, 40, 3, 7, 64], dtype=torch.int32)


def suffix_parts(layout, keep: int) -> list[Jagged]:
    """The layout of each sequence's last `keep` tokens, in positions of the whole sequence."""
    kept = LENGTHS.clamp(max=keep)
    parts = layout.parts(kept)
    return [
        Jagged(p.offsets, p.positions + (LENGTHS - kept)[p.sequence_ids()].int()) for p in parts
    ]


def rows_of(part: Jagged) -> torch.Tensor:
    return lengths_to_offsets(LENGTHS)[:-1].long()[part.sequence_ids()] + part.positions


def plan_move(old: list[Jagged], new: list[Jagged], mesh: Mesh) -> Relayout:
    line = Line.of(LENGTHS, mesh.cp)
    return Relayout.between(line, line.spans(old), line.spans(new), mesh.links, CPU)


def move(cp: int, source: str, target: str, keep: int):
    mesh = build_mesh(dp=1, cp=cp, device=CPU)
    old = LAYOUTS[source](cp).parts(LENGTHS)
    new = suffix_parts(LAYOUTS[target](cp), keep)
    plan = plan_move(old, new, mesh)
    whole = torch.arange(int(LENGTHS.sum()) * 2, dtype=torch.float64).view(-1, 2)
    x = whole[rows_of(old[mesh.rank])].requires_grad_()
    out = relayout(x, plan)
    assert torch.equal(out, whole[rows_of(new[mesh.rank])])
    (gradient,) = torch.autograd.grad(out, x, out.detach() + 1)
    survives = torch.isin(
        rows_of(old[mesh.rank]), torch.cat([rows_of(part) for part in new])
    ).double()
    assert torch.equal(gradient, (x.detach() + 1) * survives[:, None])
    return sum(plan.send_splits)


@pytest.mark.parametrize("keep", [64, 6])
@pytest.mark.parametrize(("source", "target"), [("zigzag", "contiguous"), ("contiguous", "zigzag")])
@pytest.mark.parametrize("cp", [2, 3])
def test_rows_and_gradients(run_in_world, cp: int, source: str, target: str, keep: int) -> None:
    run_in_world(cp, move, cp, source, target, keep)


def test_nothing_moves_between_equal_layouts(run_in_world) -> None:
    assert run_in_world(3, move, 3, "zigzag", "zigzag", 64) == [0, 0, 0]


def want_too_much():
    mesh = build_mesh(dp=1, cp=2, device=CPU)
    layout = LAYOUTS["zigzag"](2)
    held = [layout.parts(LENGTHS)[0], layout.parts(torch.zeros_like(LENGTHS))[1]]
    wanted = layout.parts(LENGTHS)
    if mesh.rank == 1:
        with pytest.raises(ValueError, match="target"):
            plan_move(held, wanted, mesh)


def test_positions_nobody_holds(run_in_world) -> None:
    run_in_world(2, want_too_much)
