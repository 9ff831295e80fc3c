"""What the log says keys and values travel by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from parallel.links import Links


def test_names() -> None:
    engines: Any = SimpleNamespace(name="copy engines")
    network: Any = SimpleNamespace(name="send and receive")
    node, nodes = Links(engines), Links(engines, network)
    assert node.name_for("ring") == node.name_for("halo") == "copy engines"
    assert nodes.name_for("ring") == "copy engines, between nodes send and receive"
    assert nodes.name_for("halo") == "send and receive"
    assert node.name_for("all_gather") == nodes.name_for("ulysses") == ""
