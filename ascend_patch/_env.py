"""The shim's environment variables: their names, their values, and one reader for all switches.

Imported in every process that the shim is activated in, so it imports nothing that Python has not
loaded at start-up.
"""

from __future__ import annotations

import os

PATCHES = "ASCEND_PATCHES"
STRICT = "ASCEND_PATCHES_STRICT"
SELFTEST = "ASCEND_PATCHES_SELFTEST"
CHECK = "ASCEND_PATCHES_CHECK"
VERIFY = "ASCEND_PATCHES_VERIFY"
DEVICE = "ASCEND_PATCHES_DEVICE"
# Variables that are either on or off.
SWITCHES = (STRICT, SELFTEST, CHECK)
# What the user said when the shim was activated; see `remember`.
REMEMBERED = (PATCHES, *SWITCHES, VERIFY, DEVICE)

ON_WORDS = ("1", "true", "yes", "on")
OFF_WORDS = ("0", "false", "no", "off")
# Values of ASCEND_PATCHES that leave the shim off. sitecustomize.py and the .pth have copies,
# because off must not import even this module.
NOT_ACTIVATED = ("", "none", "0", "off", "false", "no")
LONGEST_SHOWN = 200

_remembered: dict[str, str] = {}


class SettingError(ValueError):
    """A variable cannot be read; the message names it, its value, and what is expected."""


def remember() -> None:
    """Keep the variables as they are at activation.

    Code that runs later may empty os.environ, and does not mean the shim by that.
    """
    for name in REMEMBERED:
        value = os.environ.get(name)
        if value is not None:
            _remembered[name] = value


def get(name: str) -> str:
    """What a variable says now; where it is gone, what it said at activation; or nothing."""
    value = os.environ.get(name)
    return _remembered.get(name, "") if value is None else value


def environment() -> dict[str, str]:
    """All variables, those of the shim as `get` reads them."""
    return {**_remembered, **os.environ}


def switch(name: str, default: bool = False) -> bool:
    """Read a variable that is either on or off.

    Args:
        name: One of SWITCHES.
        default: What an empty or missing variable means.

    Raises:
        SettingError: The value is neither.
    """
    text = get(name)
    value = text.strip().lower()
    if not value:
        return default
    if value in ON_WORDS:
        return True
    if value in OFF_WORDS:
        return False
    raise SettingError(
        f"{name}={shown(text)} says neither yes nor no; write {' or '.join(ON_WORDS)}, or "
        f"{' or '.join(OFF_WORDS)}; empty is the default"
    )


def is_not_activated(value: str) -> bool:
    """Whether a value of ASCEND_PATCHES leaves the shim off."""
    return value.strip().lower() in NOT_ACTIVATED


def shown(text: str) -> str:
    """A value as a message has it: one line, however long it is."""
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}...")
