"""What users set for a pull in kv_connector_extra_config: read in one place, for every host.

A host reads it when a server starts: a value that makes no sense ends the start with a sentence,
and not a request later on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

RETRIES, TIMEOUT, QUARANTINE = "pull_retries", "pull_timeout_s", "quarantine_share"
DEFAULT_RETRIES = 2
DEFAULT_QUARANTINE = 0.25


class Settings(NamedTuple):
    """How long a pull is tried, and what may be kept of those that ended badly.

    Attributes:
        retries: Attempts after the first one.
        timeout: Seconds for all attempts together.
        quarantine: The share of a rank's blocks that may be kept for prefill servers which may
            still write to them; above it no pull begins.
    """

    retries: int
    timeout: float
    quarantine: float = DEFAULT_QUARANTINE


def read(vllm_config: Any, engine: str, default_timeout: float) -> Settings:
    """The settings of a server.

    Args:
        vllm_config: The host's; without a kv_transfer_config the defaults are returned.
        engine: Whose they are, for the message.
        default_timeout: Seconds where users set none; the host's own limit.

    Raises:
        ValueError: One of them is no number that makes sense.
    """
    given = getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None) or {}
    return Settings(
        _retries(given, engine),
        _timeout(given, engine, default_timeout),
        _quarantine(given, engine),
    )


def _retries(given: Mapping[str, Any], engine: str) -> int:
    found = given.get(RETRIES, DEFAULT_RETRIES)
    # A bool is an int, and means nothing here.
    if type(found) is not int or found < 0:
        raise ValueError(_sentence(RETRIES, found, engine, "a whole number from 0"))
    return found


def _timeout(given: Mapping[str, Any], engine: str, default: float) -> float:
    found = given.get(TIMEOUT, default)
    # JSON knows neither, but Python reads NaN, Infinity and integers above any float.
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise ValueError(_sentence(TIMEOUT, found, engine, "a number of seconds above 0"))
    try:
        return float(found)
    except OverflowError:
        raise ValueError(_sentence(TIMEOUT, "too large", engine, "fewer seconds")) from None


def _quarantine(given: Mapping[str, Any], engine: str) -> float:
    found = given.get(QUARANTINE, DEFAULT_QUARANTINE)
    if type(found) not in (int, float) or not 0 < found <= 1:
        raise ValueError(_sentence(QUARANTINE, found, engine, "a number above 0 and up to 1"))
    return float(found)


def _sentence(name: str, found: object, engine: str, expected: str) -> str:
    return (
        f"{name} in kv_connector_extra_config of {engine} is {found!r}; give {expected} in "
        "--kv-transfer-config, or leave it out"
    )
