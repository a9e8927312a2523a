"""scripts/matrix: every patch applied in real servers of each release.

One release after another: an environment of its own (kept), the modules that the patches change
imported for each device, and tiny models served with the shim and without it. What a release shows
is kept in the cache for as long as neither the shim, nor the release's packages, nor what this
command asks changes, so that a run that was interrupted goes on where it ended. The table
(docs/matrix.csv, docs/matrix.md) is written after each release; rows of releases that are not run
stay as they are.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import _env
import _matrix_imports
import _matrix_run
import _matrix_table
from _matrix_cases import CASES, DEVICES, RELEASES, Result, result_of
from _serve import interrupt
from _server import ServerError
from _system import SetupError, say

# What a result comes from; how it is written down is another matter.
OWN = ("_matrix_[!t]*.py", "_pair.py", "_tiny_*.py")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/matrix",
        description=__doc__.partition("\n\n")[2],
    )
    parser.add_argument(
        "--only", nargs="+", choices=RELEASES, metavar="RELEASE", help=", ".join(RELEASES)
    )
    parser.add_argument("--again", action="store_true", help="run what has a kept result too")
    parser.add_argument(
        "--out",
        type=Path,
        default=_env.CHECKOUT / "docs",
        help="folder of matrix.csv and matrix.md (docs)",
    )
    return parser.parse_args(arguments)


class Kept:
    """Results in the cache, each under a digest of all that it depends on."""

    def __init__(self, folder: Path, release: str, *, again: bool = False) -> None:
        self.folder, self.again = folder, again
        self.key = key_of(release)

    def get(self, name: str, run: Callable[[], Result]) -> Result:
        """Return the result of that name: the kept one, or what `run` returns."""
        file = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{self.key[:12]}.json"
        if not self.again and file.exists():
            result = result_of(json.loads(file.read_text()))
            say(f"{name}: {result.verdict} (kept since {result.date})")
            return result
        result = run()
        if result.fine:
            # What went wrong is run again.
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(result), indent=1))
            temporary.replace(file)
        say(f"{name}: {result.verdict} ({result.seconds} s)")
        return result


def key_of(release: str) -> str:
    """Return a digest of the shim, of what the release is installed from, and of this command."""
    names = [_env.SCRIPTS / f"{kind}-cpu-{release}.txt" for kind in ("requirements", "overrides")]
    for pattern in OWN:
        names += sorted(_env.SCRIPTS.glob(pattern))
    for name in _env.SHIM_SOURCES:
        path = _env.CHECKOUT / name
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        names += [one for one in found if one.is_file() and "__pycache__" not in one.parts]
    return _env.digest_of(names, release)


def run_release(release: str, *, again: bool) -> list[Result]:
    """Return the rows of one release."""
    kept = Kept(_env.cache_root() / "matrix" / "results", release, again=again)
    logs = _env.cache_root() / "matrix" / "servers" / release
    env = _env.prepare(device="cpu", release=release)
    results = [
        kept.get(
            f"{release} imports, {device}",
            lambda device=device: _matrix_imports.run_imports(
                env, release, device, logs / f"imports-{device}"
            ),
        )
        for device in DEVICES
    ]
    versions = results[0].versions
    for case in (case for case in CASES if case.release == release):
        folder = logs / case.kind
        results.append(
            kept.get(
                case.name,
                lambda case=case, folder=folder: _matrix_run.run_case(env, case, versions, folder),
            )
        )
    return results


def write(out: Path, results: list[Result]) -> None:
    """Put the rows in their places in the table, and write both forms of it."""
    data = out / "matrix.csv"
    before = _matrix_table.from_csv(data.read_text()) if data.exists() else []
    rows = _matrix_table.merged(before, results)
    out.mkdir(parents=True, exist_ok=True)
    data.write_text(_matrix_table.to_csv(rows))
    # From what was written, which names no folder of this machine.
    rows = _matrix_table.from_csv(data.read_text())
    (out / "matrix.md").write_text(_matrix_table.to_markdown(rows))


def run(args: argparse.Namespace) -> int:
    """Run the releases; one that cannot be run does not keep the others from it."""
    wrong = []
    chosen = args.only or RELEASES
    for number, release in enumerate(chosen, 1):
        say(f"vLLM {release} ({number} of {len(chosen)})")
        try:
            results = run_release(release, again=args.again)
        except (SetupError, ServerError) as error:
            print(f"ascend-patch: vLLM {release}: {error}", file=sys.stderr)
            wrong.append(f"{release} could not be run")
            continue
        wrong += [f"{r.release} {r.what}: {r.verdict}" for r in results if not r.fine]
        write(args.out, results)
        say(f"vLLM {release}: written to {args.out / 'matrix.md'}")
    for sentence in wrong:
        print(f"ascend-patch: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    # A terminated command still stops the server that it started.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(parse(sys.argv[1:]))
    except SetupError as error:
        print(f"ascend-patch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; start it again and it goes on behind what is kept")
        return 130


if __name__ == "__main__":
    sys.exit(main())
