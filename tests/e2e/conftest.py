"""Real servers: one for each set-up and session, its log shown where a test fails."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from _server import ServerError  # noqa: E402
from server import Lab  # noqa: E402

LOG_LINES = 40
_measured: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="session", autouse=True)
def _stop_servers_when_terminated() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that no server outlives its test."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Runs servers; a session shares one, so that each set-up is started once."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; scripts/test makes an environment that has it")
    return Lab(tmp_path_factory.mktemp("e2e"))


@pytest.fixture
def measured() -> list[str]:
    """Lines for the report at the end of the run: what was measured, not only that it passed."""
    return _measured


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the end of the server's log to the report of a test whose server failed."""
    outcome = yield
    if call.excinfo is not None and call.excinfo.errisinstance(ServerError):
        report = outcome.get_result()
        lab = item.funcargs.get("lab")
        if isinstance(lab, Lab):
            logs = sorted(lab.folder.glob("servers/*/log.txt"), key=lambda p: p.stat().st_mtime)
            for log in logs[-1:]:
                lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                report.sections.append((f"the end of {log}", "\n".join(lines)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("measured on real servers")
        for line in _measured:
            terminalreporter.write_line(line)
