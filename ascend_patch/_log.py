"""Loggers of the shim in vLLM's own tree.

vLLM configures the logger `vllm` and leaves the root logger at WARNING, or at ERROR in the engine
core and its workers: a logger by any other name is not seen there.
"""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of the shim.

    Args:
        name: Its `__name__`: `ascend_patch.kernels.dispatch` logs as
            `vllm.ascend_patch.kernels.dispatch`.
    """
    return logging.getLogger(f"vllm.{name}")
