"""`gr-train train` in a job whose rank 1 fails in the ring. First argument: how."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from gr_train import cli
from parallel.transport import Transport

FAILURES = {
    "hang": lambda: time.sleep(1000),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
AFTER = 8  # messages: some steps are done


def fail_in_the_ring(how: str) -> None:
    swap, swaps = Transport.swap, iter(range(AFTER))

    def fail(*args: Any) -> Any:
        if next(swaps, None) is None:
            FAILURES[how]()
        return swap(*args)

    Transport.swap = fail  # type: ignore[method-assign]


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        fail_in_the_ring(how)
    sys.exit(cli.main(["train", *arguments]))
