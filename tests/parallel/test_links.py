"""What the log says keys and values travel by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from parallel.attention import EXCHANGES
from parallel.links import Links


def test_names() -> None:
    engines: Any = SimpleNamespace(name="copy engines")
    network: Any = SimpleNamespace(name="send and receive")
    node, nodes = Links(engines), Links(engines, network)
    assert EXCHANGES["ring"].by(node) == EXCHANGES["halo"].by(node) == "copy engines"
    assert EXCHANGES["ring"].by(nodes) == "copy engines, between nodes send and receive"
    assert EXCHANGES["halo"].by(nodes) == "send and receive"
    assert EXCHANGES["all_gather"].by(node) == EXCHANGES["ulysses"].by(nodes) == ""
