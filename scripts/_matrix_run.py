"""Runs one case of scripts/matrix: servers with the shim and without, and what they answer."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _env
import _matrix_cases as cases
import _pair
from _matrix_cases import DECIDED, Case, Result, Seen
from _serve import Progress, tiny_model
from _server import Server, ServerError
from _system import SetupError, say

E2E = _env.CHECKOUT / "tests" / "e2e"
sys.path.append(str(E2E))

import logprobs  # noqa: E402  (the tests' own way to ask and compare)

# A fault's plugin reads its name from the file that this variable names.
FAULT_VARIABLES = {"fault_plugin": "E2E_FAULT_FILE", "gdn_plugin": "E2E_GDN_FAULT_FILE"}
# Behind what vLLM writes in front of a line: `ValueError: too many values to unpack`.
ERROR = re.compile(r"(?:^|[\])] )((?:[\w.]+\.)?[A-Z]\w*Error: .+)$")
ASK_SECONDS = 240
ORACLE_SECONDS = 240
Answers = tuple[logprobs.Answer, ...]


def run_case(env: _env.Environment, case: Case, versions: dict[str, str], folder: Path) -> Result:
    """Serve one model with the shim and without, and compare.

    Raises:
        SetupError: A step passed its deadline, or the shim's status cannot be had.
    """
    began = time.monotonic()
    model = tiny_model(env, case.kind, case.dtype)
    result = Result(
        case.release, case.model, case.dtype, _pair.today(), _pair.commit(), dict(versions)
    )
    result.note = case.note
    lead, why = _unpatched(env, case, model, folder / "unpatched")
    if lead is None and case.alone:
        result.verdict, result.why = "its unpatched server does not start or answer", why
    elif lead is not None and not case.alone:
        result.verdict = "its unpatched server answers: this release needs the patch no more"
    else:
        result.why = why
        try:
            _patched(env, case, model, folder / "patched", lead, result)
        except ServerError as error:
            seen = _first_error(folder / "patched" / "log.txt") or str(error)
            if case.served:
                result.verdict = f"its patched server failed: {seen}"
            else:
                result.verdict, result.why = "not served", seen
    result.seconds = round(time.monotonic() - began)
    return result


def _unpatched(
    env: _env.Environment, case: Case, model: Path, folder: Path
) -> tuple[tuple[Answers, Answers] | None, str]:
    """Return the answers one by one and in one batch; or None, and the server's last error."""
    try:
        with _started(env, case, model, folder, None) as server:
            one_by_one = logprobs.ask(server)
            return (one_by_one, logprobs.ask_together(server, one_by_one)), ""
    except ServerError as error:
        return None, _first_error(folder / "log.txt") or str(error)


def _patched(
    env: _env.Environment,
    case: Case,
    model: Path,
    folder: Path,
    lead: tuple[Answers, Answers] | None,
    result: Result,
) -> None:
    """Ask the patched server the same, compare, and spoil it."""
    folder.mkdir(parents=True, exist_ok=True)
    fault = folder / "fault"
    fault.write_text("")
    with _started(env, case, model, folder, fault) as server:
        answers = logprobs.ask(server, lead[0] if lead else None)
        together = logprobs.ask_together(server, answers)
        run = _pair.status(server)
        fault.write_text(case.fault[1])
        spoilt = logprobs.ask(server, logprobs.heads(answers))
    result.patches = {
        name: Seen(seen.state, seen.reason, seen.calls)
        for name, seen in _pair.patches_seen(run).items()
    }
    result.spoilt = min(logprobs.compare(logprobs.heads(answers), spoilt).prompts)
    result.steps = sum(len(answer.tokens) for answer in answers)
    if lead is None:
        found = _by_transformers(env, model, folder, {"alone": answers, "together": together})
        result.oracle, result.limit = cases.TRANSFORMERS, cases.TRANSFORMERS_LIMIT
        result.worst = max(max(one["apart"]) for one in found.values())
        result.other_tokens = found["alone"]["wrong"]
    else:
        result.oracle, result.limit = cases.ITSELF, _limit(case, lead[0])
        difference = logprobs.compare(lead[0], answers)
        result.worst, result.other_tokens = difference.worst, difference.diverged
    result.verdict = _verdict(case, result, _pair.faults(run, DECIDED), _pair.kernel_calls(run))


def _limit(case: Case, lead: Answers) -> float:
    if case.dtype == "float32":
        return cases.FLOAT32_LIMIT
    return cases.BFLOAT16_ULPS * logprobs.bfloat16_ulp(logprobs.largest(lead))


def _verdict(case: Case, result: Result, faults: list[str], kernels: dict[str, int]) -> str:
    assert result.worst is not None
    assert result.limit is not None
    assert result.spoilt is not None
    wrong = list(faults)
    # The other way round, so that no number is no small one either.
    if not result.worst <= result.limit:
        wrong.append(f"{result.worst:.1e} apart, and {result.limit:.1e} is the limit")
    # In half precision two choices are often level; in float32 they are not.
    if result.other_tokens and case.dtype == "float32":
        wrong.append(f"{result.other_tokens} of {result.steps} tokens are others")
    if not sum(kernels.values()):
        wrong.append("no call reached a kernel of ours")
    power = cases.POWER if case.dtype == "float32" else 1
    if not result.spoilt > power * result.limit:
        wrong.append(f"a spoilt kernel shows {result.spoilt:.1e} only, so this proves nothing")
    return "; ".join(wrong) or "same"


def _by_transformers(
    env: _env.Environment, model: Path, folder: Path, answers: dict[str, Answers]
) -> dict[str, Any]:
    question, verdict = folder / "question.json", folder / "verdict.json"
    said = {name: [asdict(answer) for answer in some] for name, some in answers.items()}
    question.write_text(json.dumps(said))
    variables = _pair.make_server(env, model, folder, patches=None, arguments=(), path=[E2E]).env
    variables["PYTHONPATH"] += f":{_env.SCRIPTS}"
    command = [str(env.plain), str(_env.SCRIPTS / "_matrix_oracle.py")]
    command += [str(model), str(question), str(verdict)]
    done = _pair.finished(command, folder, variables, ORACLE_SECONDS, "The model in transformers")
    if done.returncode:
        raise SetupError(f"transformers cannot run the model: {done.stdout.strip()[-600:]}")
    found: dict[str, Any] = json.loads(verdict.read_text())
    return found


@contextlib.contextmanager
def _started(
    env: _env.Environment, case: Case, model: Path, folder: Path, fault: Path | None
) -> Iterator[Server]:
    """Start a server and give it `ASK_SECONDS`; patched where there is a file for faults."""
    plugin = case.fault[0]
    progress = Progress()
    server = _pair.make_server(
        env,
        model,
        folder,
        patches=None if fault is None else "all",
        arguments=case.command_line(),
        path=[] if fault is None else [E2E / plugin],
        more={} if fault is None else {FAULT_VARIABLES[plugin]: str(fault)},
        progress=progress,
    )
    kind = "unpatched" if fault is None else "patched"
    say(f"{case.name}: starting it {kind}")
    try:
        with server, _pair.deadline(ASK_SECONDS, f"{case.name}, {kind}: what is asked"):
            progress.end()
            say(f"{case.name}: {kind}, ready in {server.started_in:.0f} s")
            yield server
    finally:
        progress.end()


def _first_error(log: Path) -> str:
    """Return the first error that a log names: the cause. What follows says where to look."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found = (ERROR.search(line) for line in lines)
    return next((match[1].strip()[:300] for match in found if match), "")
