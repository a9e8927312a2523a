"""`ascend-patch`: what there is, what happened, why, and whether something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from ascend_patch import __version__

COLUMNS = 100
STATUS_EXIT = "exit status 0 if there is a run, 1 if there is none, with --json or without"
KERNEL_DEVICES = ("npu", "cuda", "cpu")
COLOURS = {
    "applied": "32",
    "armed": "36",
    "ok": "32",
    "failed": "31",
    "wrong": "31",
    "skipped": "33",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; `sys.argv[1:]` by default.

    Returns:
        The exit status: 0 if all is well, 1 if something is wrong, 2 for a wrong command line.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows ASCII alone is no reason for a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        status: int = arguments.command(arguments)
    except ModuleNotFoundError as error:
        if error.name not in ("packaging", "wrapt"):
            raise
        return _complain(
            f"{error.name} is missing, so nothing is patched; pip install {error.name}",
            arguments.json,
        )
    except ValueError as error:
        # A variable that names no device, which each command reads; its class needs `packaging`.
        if type(error).__name__ != "DeviceError":
            raise
        return _complain(str(error), arguments.json)
    except BrokenPipeError:
        # The reader, `head` for example, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ascend-patch", description="Patches for an installed vLLM on Ascend NPUs."
    )
    parser.add_argument("--version", action="version", version=f"ascend-patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("list", _list, "all patches: what they do, for which releases, and their state here"),
        ("status", _status, "each patch in each process of the running server"),
        ("explain", _explain, "why a patch would apply here or not, target by target"),
        ("doctor", _doctor, "is anything wrong with this installation? exit status 1 if so"),
        ("verify", _verify, "are the kernels right on this device? a report for a bug"),
    ):
        more = f"; {STATUS_EXIT}" if name == "status" else ""
        command = commands.add_parser(name, help=text, description=text + more)
        command.set_defaults(command=function)
        if name == "verify":
            _add_verify(command)
            continue
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "explain":
            command.add_argument("patch", metavar="ID", help="for example: rotary")
            command.add_argument(
                "--case", metavar="CASE", help="of attention_router: key=value,... and its route"
            )
        if name == "status":
            command.add_argument("--all", action="store_true", help="ended runs too")
        if name == "doctor":
            command.add_argument(
                "--quick", action="store_true", help="do not import vLLM in a process of its own"
            )
    run = commands.add_parser(
        "run",
        help="start a command with the door open, installed or not",
        description="Start a command whose Python processes are patched: ascend-patch run -- CMD",
    )
    run.add_argument("--json", action="store_true", help="print JSON if the command cannot start")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command")
    run.set_defaults(command=_run)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from ascend_patch import _explain

    rows = _explain.catalogue()
    if arguments.json:
        return _print_json({"patches": rows})
    for row in rows:
        print(f"{row['id']:<18} {_colour(row['state']):<11} {row['summary']}")
        for text in (row["applies_to"], row["reason"]):
            print(textwrap.fill(text, COLUMNS, initial_indent=" " * 30, subsequent_indent=" " * 30))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from ascend_patch import _rundir, _status, _status_read

    try:
        found = _status_read.read()
        place = "" if found.runs or found.problems else str(_rundir.base())
    except _rundir.RunDirectoryError as error:
        return _complain(str(error), arguments.json)
    runs = found.runs
    if arguments.json:
        _print_json({"runs": runs, "problems": found.problems})
        return 0 if runs else 1
    if place:
        print(
            f"No vLLM was started with ASCEND_PATCHES set, or its status directory is another one "
            f"(looked in {place})."
        )
    alive = [run for run in runs if run["alive"]]
    for run in runs if arguments.all else alive or runs[:1]:
        for line in _status.as_text(run):
            print(line)
        print()
    for problem in found.problems:
        print(f"not read: {problem}")
    return 0 if runs else 1


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.case is not None:
        return _explain_case(arguments)
    from ascend_patch import _explain

    try:
        found = _explain.explain(arguments.patch)
    except KeyError as error:
        return _complain(str(error.args[0]), arguments.json)
    if arguments.json:
        return _print_json(found)
    print(_explain.as_text(found))
    return 0


def _explain_case(arguments: argparse.Namespace) -> int:
    from ascend_patch import _explain_case

    try:
        found = _explain_case.explain(arguments.patch, arguments.case)
    except _explain_case.CaseError as error:
        _complain(str(error), arguments.json)
        return 2
    if arguments.json:
        return _print_json(found)
    print(_explain_case.as_text(found))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ascend_patch import _doctor

    findings = _doctor.examine(quick=arguments.quick)
    wrong = any(finding.level == "wrong" for finding in findings)
    if arguments.json:
        _print_json({"findings": [vars(finding) for finding in findings], "ok": not wrong})
        return int(wrong)
    for finding in findings:
        head = f"{_colour(finding.level)} {' ' * (5 - len(finding.level))} {finding.about:<16} "
        lines = textwrap.wrap(finding.text, COLUMNS - 24, break_long_words=False) or [""]
        print(head + ("\n" + " " * 24).join(lines))
    print("\nsomething is wrong: see above" if wrong else "\nnothing is wrong")
    return int(wrong)


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="print JSON, or write it to FILE beside the report",
    )
    command.add_argument("--device", choices=KERNEL_DEVICES, default="", help="the one there")
    command.add_argument("--patch", default="", metavar="ID", help="only the kernels of a patch")
    command.add_argument("--case", default="", metavar="NAME", help="only this one, among all")
    command.add_argument("--seed", type=int, help="of the inputs; a fresh one by default")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the default: below a minute on a CPU")
    size.add_argument("--all", action="store_true", help="every case; minutes on a CPU")


def _verify(arguments: argparse.Namespace) -> int:
    from ascend_patch import _verify_cli

    file = arguments.json if isinstance(arguments.json, str) else ""
    only_json = arguments.json is True
    try:
        results = _verify_cli.verify(
            device=arguments.device,
            patch=arguments.patch,
            case=arguments.case,
            everything=arguments.all,
            seed=arguments.seed,
        )
        return _verify_cli.report(results, file, only_json=only_json)
    except _verify_cli.VerifyUsageError as error:
        _complain(str(error), arguments.json)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _complain(
            "torch is not installed for this interpreter, so no kernel can run; use the one that "
            f"vLLM runs in (this is {sys.executable})",
            arguments.json,
        )
    except OSError as error:
        return _complain(f"the report could not be written: {error}", only_json)


def _run(arguments: argparse.Namespace) -> int:
    from ascend_patch import _run

    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    try:
        return _run.run(words)
    except _run.RunError as error:
        _complain(str(error), arguments.json)
        return error.status


def _print_json(value: Any) -> int:
    # The only control character that JSON leaves as it is.
    print(json.dumps(value, indent=1).replace("\x7f", "\\u007f"))
    return 0


def _complain(sentence: str, as_json: bool | str) -> int:
    """Say what is wrong: as text, as JSON, or as text beside JSON in the file that is named."""
    if as_json is True:
        _print_json({"error": sentence})
        return 1
    print(f"ascend-patch: {sentence}", file=sys.stderr)
    if as_json:
        try:
            with open(as_json, "w", encoding="utf-8") as file:
                file.write(json.dumps({"error": sentence, "ok": False}, indent=1) + "\n")
        except OSError as error:
            print(f"ascend-patch: {as_json} could not be written: {error}", file=sys.stderr)
    return 1


def _colour(word: str) -> str:
    code = COLOURS.get(word)
    if code is None or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return word
    return f"\033[{code}m{word}\033[0m"
