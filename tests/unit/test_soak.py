"""scripts/soak without servers: what it takes for growth, what it sends, what it writes."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _soak_load  # noqa: E402
import _soak_memory as memory  # noqa: E402
import _soak_pace  # noqa: E402
import _soak_report  # noqa: E402
import _soak_run  # noqa: E402
from _pair import PatchSeen, faults, patches_seen  # noqa: E402
from _system import SetupError  # noqa: E402

MIB = memory.MIB


def noisy(draw: random.Random, seconds: int, rate: float = 0.0) -> list[tuple[float, int]]:
    """A process that starts up, then jumps by up to 2 MiB around its size, and leaks at `rate`."""
    return [
        (
            1000.0 + t,
            int(300 * MIB + 200 * MIB * min(t / 20, 1) + draw.uniform(-2, 2) * MIB + rate * t),
        )
        for t in range(seconds)
    ]


@pytest.fixture
def draw() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("seconds", [120, 1800])
def test_a_process_that_only_starts_up_does_not_grow(draw, seconds) -> None:
    found = memory.growth_of(1, "a", noisy(draw, seconds))
    assert found.fine, found
    assert found.first < 310 * MIB
    assert found.last > 490 * MIB


@pytest.mark.parametrize("seconds", [120, 1800])
def test_a_leak_past_the_tolerance_is_growth(draw, seconds) -> None:
    rate = 1.5 * memory.TOLERANCE / (seconds / 2)
    found = memory.growth_of(1, "a", noisy(draw, seconds, rate))
    assert not found.fine, found
    assert found.slope == pytest.approx(rate, rel=0.3)


def test_the_slope_is_that_of_numpy_s_polynomial(draw) -> None:
    numpy = pytest.importorskip("numpy")
    samples = noisy(draw, 90, 12345.0)
    at, size = zip(*samples, strict=True)
    expected = numpy.polyfit(numpy.array(at) - at[0], numpy.array(size, dtype=float), 1)[0]
    assert memory.fitted_slope(samples) == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_an_error_and_no_slope() -> None:
    with pytest.raises(ValueError, match="let it run for longer"):
        memory.growth_of(1, "a", [(float(t), 1) for t in range(9)])
    with pytest.raises(SetupError, match="half a minute"):
        _soak_run.check_minutes(0.1)


def test_a_real_process_that_leaks_is_found_and_one_that_does_not_is_not(monkeypatch) -> None:
    monkeypatch.setattr(memory, "PERIOD", 0.05)
    code = (
        "import sys, time\nkept = []\n"
        "while True:\n    time.sleep(0.02)\n    kept.append(b'x' * int(sys.argv[1]))"
    )
    for size, fine in ((0, True), (MIB // 2, False)):
        command = [sys.executable, "-S", "-c", code, str(size)]
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                with memory.Watch(process.pid) as watch:
                    time.sleep(2.0)
            finally:
                process.kill()
        (growth,) = watch.growths({process.pid: "leaker"}, tolerance=4 * MIB)
        assert growth.name == "leaker"
        assert growth.fine == fine, growth


def test_the_memory_of_a_process_is_the_system_s() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        time.sleep(0.2)
        status = Path(f"/proc/{process.pid}/status").read_text()
        said = int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) * 1024
        assert memory.resident(process.pid) == pytest.approx(said, abs=MIB)
        process.kill()
    assert memory.resident(process.pid) is None


def test_requests_are_what_their_kind_says(draw) -> None:
    for kind in _soak_load.KINDS:
        for _ in range(20):
            path, payload = _soak_load.request(kind, draw)
            json.dumps(payload)
            assert path.endswith("chat/completions") == (kind == "chat")
            assert payload["stream"] == ("stream" in kind)
            prompt = payload.get("prompt", "")
            assert isinstance(prompt, list) == (kind == "several prompts")
            if kind.startswith("long"):
                assert len(prompt.split()) >= _soak_load.LONG[0]
            # A prompt and its answer fit into the server's 2048 tokens.
            words = max(len(text.split()) for text in (prompt if prompt else [""]))
            assert words + payload["max_tokens"] <= 2047


def test_answers_that_are_not_whole_are_noticed() -> None:
    stream, plain = {"stream": True}, {"stream": False, "prompt": ["a", "b"]}
    _soak_load.check(stream, b"data: {}\n\ndata: [DONE]\n\n")
    with pytest.raises(ValueError, match="the stream ends with"):
        _soak_load.check(stream, b"data: {}\n\n")
    done = {"finish_reason": "stop"}
    _soak_load.check(plain, json.dumps({"choices": [done, done]}).encode())
    with pytest.raises(ValueError, match="1 choices for 2 prompts"):
        _soak_load.check(plain, json.dumps({"choices": [done]}).encode())
    none = {"finish_reason": None}
    with pytest.raises(ValueError, match="2 choices for 2 prompts"):
        _soak_load.check(plain, json.dumps({"choices": [done, none]}).encode())


class Mute:
    """A server that takes requests and never answers."""

    def __enter__(self) -> Mute:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_whoever_interrupts_the_load_waits_for_no_answer() -> None:
    with Mute() as server:
        load = _soak_load.Load(server, seed=1, threads=2)

        def interrupted() -> None:
            with load.running():
                time.sleep(0.5)
                raise KeyboardInterrupt

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - began < 5


def test_a_server_that_has_gone_is_a_failure_and_no_storm() -> None:
    with Mute() as server:
        pass
    load = _soak_load.Load(server, seed=1, threads=2)
    with load.running():
        time.sleep(1.5)
    assert load.failures
    assert all("Connection refused" in failure for failure in load.failures)
    assert len(load.failures) <= 6
    assert not load.sent


def test_the_pace_is_that_of_paired_rounds() -> None:
    # The machine slows down by half on the way; the difference stays.
    base = [100.0, 100.0, 150.0, 150.0, 150.0]
    found = _soak_pace.pace_of([value + 7 for value in base], base)
    assert found.added == 7
    assert found.quartiles == (7, 7)
    assert "+7 us a token" in str(found)


@pytest.mark.parametrize(("rounds", "seconds", "done"), [(6, 60.0, 6), (50, 0.0, 4)])
def test_a_slow_machine_has_fewer_rounds(monkeypatch, rounds, seconds, done) -> None:
    asked = []

    def one_answer(server: str) -> float:
        asked.append(server)
        return 0.128 if server == "patched" else 0.064

    monkeypatch.setattr(_soak_pace, "one_answer", one_answer)
    found = _soak_pace.measure("patched", "unpatched", rounds, seconds)
    assert found.rounds == done
    # One more, which warms both; and each is first as often as the other.
    assert asked.count("patched") == asked.count("unpatched") == done + 1
    assert abs(asked[2::2].count("patched") - asked[2::2].count("unpatched")) <= 1
    assert found.patched == pytest.approx(2000)
    assert found.unpatched == pytest.approx(1000)


def a_run(state: str = "applied", problems: tuple[str, ...] = ()) -> dict:
    patch = {"id": "rotary", "state": "armed", "reason": "r", "targets": [{"calls": 0}]}
    there = {**patch, "state": state, "targets": [{"calls": 3}, {"calls": 4}]}
    process = {"role": "front end", "pid": 1, "problems": [], "patches": [patch]}
    worker = {"role": "EngineCore", "pid": 2, "problems": list(problems), "patches": [there]}
    return {"processes": [process, worker]}


def test_states_and_problems_that_should_not_be_are_named() -> None:
    assert faults(a_run()) == []
    assert faults(a_run(problems=("it broke",))) == ["EngineCore (process 2): it broke"]
    for state in ("failed", "skipped", "reverted", "superseded"):
        assert faults(a_run(state)) == [f"EngineCore (process 2): rotary is {state}: r"]
    assert patches_seen(a_run()) == {"rotary": PatchSeen("applied", "r", 7)}


def test_the_report_shows_what_was_found() -> None:
    growth = memory.Growth(2, "EngineCore", MIB, 3 * MIB, 1024.0, 9 * MIB, 60.0, 8 * MIB)
    report = _soak_run.Report(
        "0.18.0", 2.0, "2026-01-02", "abc", 5, {"torch": "2"}, Counter(short=30, long=10)
    )
    report.growths, report.control = [growth], [growth]
    report.patches = patches_seen(a_run())
    report.pace = _soak_pace.pace_of([2.0, 2.0], [1.0, 1.0])
    report.wrong = [_soak_run.sentence(growth)]
    text = _soak_report.to_markdown(report)
    assert "- EngineCore (process 2) grew by 9.0 MiB in the last 60 s, and 8 MiB is" in text
    assert "| EngineCore | 1.0 | 3.0 | +60 | +9.00 | grows |" in text
    assert "| EngineCore | 1.0 | 3.0 | +60 | +9.00 | found |" in text
    assert "8192 KiB a\nminute" in text or "8192 KiB a minute" in text
    assert "409.6 KiB a request" in text
    assert "| `rotary` | applied | 7 |" in text
    assert "40 requests" in text
