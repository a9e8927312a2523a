"""Random matrices for the tiny models' weights."""

from __future__ import annotations

import math
from typing import Any


class Draw:
    """Random matrices from one generator, in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        import torch

        self.torch = torch
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> Any:
        return self.torch.randn(*shape, generator=self.generator) * std

    def linear(self, out_features: int, in_features: int, gain: float = 1.0) -> Any:
        """Weights that give a unit input an output with `gain` for standard deviation."""
        return self.normal(out_features, in_features, std=gain / math.sqrt(in_features))

    def full(self, size: int, value: float = 1.0) -> Any:
        return self.torch.full((size,), value)
