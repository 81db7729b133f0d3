"""What each part of the benchmark of an accelerator is given: its sizes, its data and its end."""

import pathlib
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.record import LeftOutError


class Sizes(NamedTuple):
    """How large the parts are."""

    width: float = 1.0
    rank: int = 16
    layers: int = 4
    tokens: int = 8192
    steps: int = 20
    updates: int = 100
    calls: int = 5
    pretrain_s: float = 60.0
    pretrain_steps: int = 1500
    decoder: Mapping[str, Any] = MappingProxyType(
        {"width": 512, "depth": 8, "head_width": 64, "batch_size": 64, "length": 256}
    )
    tune_steps: int = 200
    length: int = 384
    batch_size: int = 16
    eval_limit: int = 256


FULL = Sizes()
QUICK = Sizes(
    width=1 / 128,
    rank=2,
    layers=2,
    tokens=32,
    steps=2,
    updates=2,
    calls=2,
    pretrain_s=2.0,
    pretrain_steps=20,
    decoder={"width": 32, "depth": 1, "head_width": 8, "vocabulary": 300}
    | {"batch_size": 2, "length": 16, "eval_limit": 4},
    tune_steps=2,
    length=1024,  # few tokens make long texts
    batch_size=2,
    eval_limit=2,
)


class Call(NamedTuple):
    """What a part is given: the sizes, the data, where the decoder is or will be, and the end."""

    sizes: Sizes
    data_dir: pathlib.Path | None
    decoder: pathlib.Path
    end: float

    def require_time(self, done: int, total: int) -> None:
        """Stops a training, which may be slower than was expected, when all time is over."""
        if time.monotonic() > self.end:
            raise LeftOutError(f"the time was over after {done} of {total} steps")
