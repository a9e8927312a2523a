"""Judges answers by transformers, in a release's own environment: for models that it does not
serve without the shim. Started by scripts/matrix with tests/e2e on PYTHONPATH."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gdn_transformers import Oracle
from logprobs import Answer


def main() -> None:
    model, question, verdict = map(Path, sys.argv[1:])
    oracle = Oracle(model)
    found = {}
    for name, answers in json.loads(question.read_text()).items():
        judged = oracle.judge(
            Answer(tuple(one["prompt"]), tuple(one["tokens"]), tuple(one["steps"]))
            for one in answers
        )
        found[name] = {"wrong": judged.wrong, "apart": judged.apart, "margin": judged.margin}
    verdict.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
