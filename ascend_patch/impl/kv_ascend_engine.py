"""A transfer engine over TCP for vllm-ascend's connector: so many ranges at a time."""

from __future__ import annotations

from typing import Any

RANGES = 1024


class InBatches:
    """A transfer engine that is given so many ranges at a time.

    Over TCP Mooncake refuses more than some 2000, and everything after them. An NPU's has no such
    limit.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def batch_transfer_sync_read(
        self, session: str, local: list[int], remote: list[int], lengths: list[int]
    ) -> int:
        """As the engine's; the first answer that is an error."""
        for first in range(0, len(local), RANGES):
            part = slice(first, first + RANGES)
            batch = local[part], remote[part], lengths[part]
            code: int = self._engine.batch_transfer_sync_read(session, *batch)
            if code < 0:
                return code
        return 0
