"""scripts/soak: minutes of mixed load on a server with every patch.

Watches the resident memory of each process (a slope over the second half), the patches' states,
and that aborted requests leave nothing behind; measures what a token takes with the shim and
without, by turns; and makes the server leak in the end, which must be noticed. Ends with 1 where
something is wrong, and says what.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from pathlib import Path

import _env
import _soak_report
import _soak_run
from _serve import interrupt
from _server import ServerError
from _system import SetupError, say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--minutes", type=float, default=30, help="of load (30)")
    parser.add_argument(
        "--vllm",
        dest="release",
        choices=list(_env.RELEASES),
        default=_env.DEFAULT,
        help="%(default)s",
    )
    parser.add_argument("--rounds", type=int, default=20, help="of the comparison (20)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--out", type=Path, help="the report's file, such as docs/soak.md")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    _soak_run.check_minutes(args.minutes)
    env = _env.prepare(device="cpu", release=args.release)
    folder = _env.cache_root() / "soak" / time.strftime("%Y%m%dT%H%M%S")
    say(f"seed {args.seed}; logs in {folder}")
    report = _soak_run.soak(
        env,
        args.release,
        folder,
        minutes=args.minutes,
        rounds=args.rounds,
        seed=args.seed,
    )
    text = _soak_report.to_markdown(report)
    print(text, flush=True)
    if args.out is not None:
        args.out.write_text(text)
    for sentence in report.wrong:
        print(f"ascend-patch: {sentence}", file=sys.stderr)
    return 1 if report.wrong else 0


def main() -> int:
    # A terminated command still stops the servers that it started.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(parse(sys.argv[1:]))
    except (SetupError, ServerError, ValueError) as error:
        print(f"ascend-patch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
