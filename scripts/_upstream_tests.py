"""scripts/upstream_tests: vLLM's and vllm-ascend's own tests, with the patches and without.

Those near to the four patches that run without an accelerator, from the release's source
distribution, each area in one process unpatched and in one with ASCEND_PATCHES=all through
sitecustomize. It prints for each file how its tests ended in both and how many calls reached our
code, and fails where a test ends otherwise and nobody has said why.

vllm-ascend runs over the real torch_npu on stubs of CANN, in the environments of tests/ascend.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import _env
import _upstream_run
import _upstream_sources
import _upstream_table
from _system import SetupError, say
from _upstream_suites import SUITES

DOCUMENT = _env.CHECKOUT / "docs/upstream_tests.md"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/upstream_tests",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("host", nargs="?", choices=[*SUITES, "all"], default="all", help="default: all")
    add("--release", help="one release; default: all of " + _known())
    add("--area", action="append", choices=("rotary", "attention", "gdn", "kv"), help="repeatable")
    add("--tests", default="", metavar="EXPRESSION", help="fewer of them, as pytest's -k has it")
    sources = "a checkout or an unpacked sdist, in place of the package index"
    add("--sources", type=Path, metavar="DIR", default=None, help=sources)
    add("--write", action="store_true", help=f"write {DOCUMENT.relative_to(_env.CHECKOUT)}")
    args = parser.parse_args(arguments)
    chosen = [
        (host, release)
        for host, releases in SUITES.items()
        for release in releases
        if args.host in ("all", host) and args.release in (None, release)
    ]
    if not chosen:
        parser.error(f"there is no suite for {args.host} {args.release}; there is {_known()}")
    if args.sources is not None and len(chosen) != 1:
        parser.error("--sources is of one release: name the host, and --release")
    if args.write and (args.area or args.tests or args.host != "all" or args.release):
        parser.error("--write is of everything")
    args.chosen = chosen
    return args


def _known() -> str:
    return ", ".join(f"{host} {release}" for host in SUITES for release in SUITES[host])


def run(args: argparse.Namespace) -> int:
    found: list[_upstream_table.Found] = []
    for host, release in args.chosen:
        suite = SUITES[host][release]
        folder = _upstream_sources.tests_of(suite.distribution, release, args.sources)
        pair = _upstream_run.pair_of(host, release)
        for area in args.area or suite.areas:
            chosen = [f"({e})" for e in (suite.choose.get(area, ""), args.tests) if e]
            choose = " and ".join(chosen)
            paths = [path for path in suite.areas[area] if (folder / path).exists()]
            if not paths:
                raise SetupError(f"{folder} holds none of {', '.join(suite.areas[area])}")
            with tempfile.TemporaryDirectory(prefix="ascend-patch-upstream-") as scratch:
                runs = {
                    name: _upstream_run.run(side, folder, paths, choose, Path(scratch) / name)
                    for name, side in pair.items()
                }
            one = _upstream_table.Found(host, release, area, runs, suite.differs)
            say("\n".join([f"{host} {release}, {area}", *one.lines()]))
            found.append(one)
    problems = [problem for one in found for problem in one.problems()]
    for problem in problems:
        print(f"ascend-patch: {problem}", file=sys.stderr)
    if args.write:
        DOCUMENT.write_text(_upstream_table.document(found), encoding="utf-8")
    say(_upstream_table.summary(found))
    return 1 if problems else 0


def main() -> int:
    try:
        args = parse(sys.argv[1:])
        # As Ctrl-C does, it ends the tests that are running too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if importlib.util.find_spec("pytest") is None:
            # The environments of vllm-ascend are made by code of the tests.
            python = str(_env.prepare(device="cpu", tests=True).plain)
            os.execv(python, [python, __file__, *sys.argv[1:]])
        return run(args)
    except SetupError as error:
        print(f"ascend-patch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
