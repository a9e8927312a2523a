"""What the user's variables ask of a process that imports vLLM, read once and in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ascend_patch import _env, _registry, _selection, _selftest, _versions


@dataclass(frozen=True)
class Settings:
    """The selected patches, what is installed, and whether kernels are tested at load."""

    selection: _selection.Selection
    installed: _versions.Installed
    tests_at_load: bool


def read(registry: Mapping[str, _registry.Patch]) -> Settings:
    """Read every variable but ASCEND_PATCHES_VERIFY, which `_verify.begin` reads.

    Raises:
        SettingError: One of them cannot be understood.
    """
    for name in _env.SWITCHES:
        _env.switch(name)
    selection = _selection.parse(
        _env.get(_env.PATCHES),
        tuple(registry),
        tuple(name for name, patch in registry.items() if patch.available),
    )
    installed = _versions.find(_env.environment())
    return Settings(selection, installed, _selftest.wanted(installed.device))
