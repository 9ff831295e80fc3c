"""What "auto" means for a mask: which layout, which exchange."""

from __future__ import annotations

import pytest

from gr_train.config import load_config
from gr_train.model.mask import choose_sharding

WINDOW = "model.mask.window=1024"


@pytest.mark.parametrize(
    ("overrides", "layout", "exchange"),
    [
        ("", "zigzag", "ring"),
        (WINDOW, "contiguous", "halo"),
        ("model.mask.local=1024 model.mask.prefix=128", "contiguous", "halo"),
        # The last rank would have several times the others' work.
        (f"{WINDOW} model.mask.full_suffix=1024", "zigzag", "ring"),
        ("model.mask.window=4096", "zigzag", "ring"),
        (f"{WINDOW} parallel.layout=zigzag", "zigzag", "ring"),
        (f"{WINDOW} parallel.exchange=ring", "zigzag", "ring"),
        (f"{WINDOW} parallel.exchange=halo", "contiguous", "halo"),
        ("parallel.layout=contiguous", "contiguous", "ring"),
        ("parallel.exchange=ulysses", "zigzag", "ulysses"),
    ],
)
def test_sharding_suits_the_mask(overrides: str, layout: str, exchange: str) -> None:
    sizes = "parallel.cp=4 data.max_length=16384"
    config = load_config(
        "configs/long_sequence.yaml", [*sizes.split(), *overrides.split()], world_size=4
    )
    sharding = choose_sharding(config)
    assert (sharding.layout, sharding.exchange) == (layout, exchange)
    assert ("as configured" in sharding.why) == ("parallel.exchange" in overrides)
