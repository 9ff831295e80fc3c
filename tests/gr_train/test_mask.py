"""What "auto" means for a mask: which layout, which exchange."""

from __future__ import annotations

import pytest

from gr_train.config import load_config
from gr_train.model.mask import choose_sharding

WINDOW = "model.mask.window=1024"
OWN, UNEQUAL = "exchange as configured", "contiguous chunks would be unequal work"


@pytest.mark.parametrize(
    ("overrides", "layout", "exchange", "why"),
    [
        ("", "zigzag", "ring", "queries see much of a sequence"),
        (WINDOW, "contiguous", "halo", "queries see a window"),
        ("model.mask.local=1024 model.mask.prefix=128", "contiguous", "halo", "queries see a"),
        # The last rank would have several times the others' work.
        (f"{WINDOW} model.mask.full_suffix=1024", "zigzag", "ring", UNEQUAL),
        ("model.mask.window=4096", "zigzag", "ring", UNEQUAL),
        ("model.mask.window=4096 parallel.exchange=halo", "zigzag", "halo", f"{OWN}; {UNEQUAL}"),
        (f"{WINDOW} parallel.layout=zigzag", "zigzag", "ring", "layout as configured"),
        (f"{WINDOW} parallel.layout=contiguous", "contiguous", "halo", "queries see a window"),
        (f"{WINDOW} parallel.exchange=ring", "zigzag", "ring", f"{OWN}; only a halo"),
        (f"{WINDOW} parallel.exchange=halo", "contiguous", "halo", f"{OWN}; chunks are equal"),
        ("parallel.layout=contiguous", "contiguous", "ring", "queries see much of a sequence"),
        ("parallel.exchange=ulysses", "zigzag", "ulysses", f"{OWN}; stripes make causal work"),
        ("parallel.exchange=ring parallel.layout=zigzag", "zigzag", "ring", "as configured"),
    ],
)
def test_sharding_suits_the_mask(overrides: str, layout: str, exchange: str, why: str) -> None:
    sizes = "parallel.cp=4 data.max_length=16384"
    config = load_config(
        "configs/long_sequence.yaml", [*sizes.split(), *overrides.split()], world_size=4
    )
    sharding = choose_sharding(config)
    assert (sharding.layout, sharding.exchange) == (layout, exchange)
    assert sharding.why.startswith(why)
