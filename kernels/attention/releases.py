"""What four vllm-ascend releases do with each case, what we do, and why it differs.

releases.json holds what was read in their sources; docs/attention.md is written from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ascend_patch.kernels.attention.case import Case

RELEASES = ("0.11.0", "0.13.0", "0.18.0", "0.23.0")
# `wrong` and `fails` by what the operator's documentation and CANN's own code say of the call,
# `depends on CANN` where the two differ, `reported wrong` by what somebody saw on a machine.
VERDICTS = ("same", "wrong", "depends on CANN", "reported wrong", "fails", "host's own")


@dataclass(frozen=True)
class Behaviour:
    """One row of the releases' decisions.

    Attributes:
        releases: Those that do this.
        name: Unique within a release.
        when: The condition, in words.
        does: Their operator and its arguments, in words.
        verdict: Of VERDICTS: is what they do the answer of our row?
        row: Of our table, to which ``example`` comes.
        example: Fields of a case that the condition holds for.
        why: Why it differs, or that it does not.
    """

    releases: tuple[str, ...]
    name: str
    when: str
    does: str
    verdict: str
    row: str
    example: Mapping[str, Any]
    why: str

    @property
    def case(self) -> Case:
        """The example as a case."""
        return Case(**self.example)


@cache
def behaviours() -> tuple[Behaviour, ...]:
    """All of them, in the order of the first release that each belongs to."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    found = json.loads(text)
    return tuple(
        Behaviour(
            tuple(row["releases"]),
            row["name"],
            row["when"],
            row["does"],
            row["verdict"],
            row["row"],
            {**found["examples"][row["like"]], **row["with"]},
            row["why"],
        )
        for row in found["behaviours"]
    )
