"""scripts/matrix without servers: its table, what it keeps, how it judges."""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _env  # noqa: E402
import _matrix  # noqa: E402
import _matrix_cases as cases  # noqa: E402
import _matrix_imports  # noqa: E402
import _matrix_run  # noqa: E402
import _matrix_table as table  # noqa: E402
import _pair  # noqa: E402
from _matrix_cases import Case, Result, Seen  # noqa: E402
from _system import SetupError  # noqa: E402

logprobs = _matrix_run.logprobs
VERSIONS = {"vllm": "0.18.0", "torch": "2.10.0", "transformers": "4.57.6", "python": "3.11.7"}
SKIPPED = "vllm 0.18.0 on cpu is outside of: what it is written for (/some/where/of.mine/file.py)"


def a_result(release: str = "0.18.0", what: str = "Qwen3", **changes) -> Result:
    result = Result(
        release,
        what,
        "float32",
        "2026-01-02",
        "abc1234",
        dict(VERSIONS),
        verdict="same",
        oracle=cases.ITSELF,
        steps=192,
        worst=1.5e-6,
        limit=1e-4,
        spoilt=0.5,
        patches={
            "rotary": Seen("applied", "the source is that of vllm 0.18.0", 1234),
            "kv_connector": Seen("armed", "the source is that of vllm 0.18.0", 0),
            "gdn_attn": Seen("skipped", SKIPPED, 0),
        },
        seconds=77,
    )
    return replace(result, **changes)


def imports(release: str = "0.18.0", device: str = "cpu", **states: str) -> Result:
    patches = {name: Seen(state) for name, state in states.items()}
    nothing = {"oracle": "", "steps": 0, **dict.fromkeys(table.NUMBERS)}
    return a_result(release, f"imports, {device}", verdict="applied", patches=patches, **nothing)


def test_a_table_is_read_as_it_was_written() -> None:
    rows = [
        a_result(note="a note, with a comma"),
        a_result("0.11.0", "Qwen3-Next", verdict="not served", why="ValueError: a | b, c"),
        imports(rotary="applied", kv_connector="applied"),
    ]
    text = table.to_csv(rows)
    again = table.from_csv(text)
    assert table.to_csv(again) == text
    assert table.to_markdown(again) == table.to_markdown(table.in_order(again))
    assert [(r.release, r.what) for r in again] == [
        ("0.11.0", "Qwen3-Next"),
        ("0.18.0", "Qwen3"),
        ("0.18.0", "imports, cpu"),
    ]
    first = again[1]
    assert first.worst == 1.5e-6
    assert first.patches["rotary"] == Seen("applied", "", 1234)
    assert first.patches["gdn_attn"].reason.startswith("vllm 0.18.0 on cpu is outside of: what")
    assert first.note == "a note, with a comma"
    assert again[2].worst is None


def test_no_folder_of_this_machine_is_written() -> None:
    why = "FileNotFoundError: /made/.up/some-thing/venvs/vllm/x.py is missing; see /etc/a and b/c"
    text = table.to_csv([a_result(verdict=why, why=why)])
    assert "/made" not in text
    assert "x.py is missing; see a and b/c" in text
    assert "/some/where" not in text


def test_both_forms_of_the_table_are_the_same_and_name_no_folder(tmp_path) -> None:
    _matrix.write(tmp_path, [a_result(verdict="not served", why="OSError: '/made/x/y.py' is gone")])
    rows = table.from_csv((tmp_path / "matrix.csv").read_text())
    text = (tmp_path / "matrix.md").read_text()
    assert text == table.to_markdown(rows)
    assert "/made" not in text
    assert "OSError: 'y.py' is gone" in text


def test_rows_of_releases_that_are_not_run_stay() -> None:
    before = [a_result("0.11.0", seconds=1), a_result("0.18.0", seconds=1)]
    rows = table.merged(before, [a_result("0.18.0", seconds=2), a_result("0.9.1")])
    assert [(r.release, r.seconds) for r in rows] == [("0.9.1", 77), ("0.11.0", 1), ("0.18.0", 2)]


def test_the_document_says_the_most_that_was_seen_of_a_patch() -> None:
    rows = [
        a_result(note="as compiled servers are"),
        imports(rotary="applied", kv_connector="applied", gdn_attn="skipped"),
        imports(device="cuda", rotary="applied", kv_connector="applied", gdn_attn="applied"),
    ]
    text = table.to_markdown(rows)
    assert "| 0.18.0 | applied, 1234 calls (Qwen3) | armed; imported (cpu, cuda): applied |" in text
    assert "skipped; imported (cuda): applied" in text
    assert "- `gdn_attn` is skipped in 0.18.0: vllm 0.18.0 on cpu is outside of" in text
    assert "- 0.18.0 Qwen3: as compiled servers are\n" in text
    assert "| 0 of 192 | 1.5e-06 | 1.0e-04 | 5.0e-01 | same |" in text
    assert "Not run yet: 0.11.0 Qwen3; 0.17.0 Qwen3; " in text
    assert "; 0.18.0 Qwen3-Next; " in text
    assert "; 0.18.0 imports, emulated; " in text
    wrong = table.to_markdown([a_result(verdict="9.0e-01 apart, and 1.0e-04 is the limit")])
    assert "**9.0e-01 apart, and 1.0e-04 is the limit**" in wrong


def test_what_no_server_starts_for_is_said_in_its_own_words() -> None:
    row = a_result(
        what="Qwen3-Next", verdict="not served", why="NameError: no triton", worst=None, patches={}
    )
    text = table.to_markdown([row])
    assert "- 0.18.0 Qwen3-Next: no server starts, patched or not; its first error is" in text
    assert "`NameError: no triton`" in text


def test_the_committed_document_is_what_its_data_says() -> None:
    data = ROOT / "docs" / "matrix.csv"
    if not data.exists():
        pytest.skip("docs/matrix.csv is not there; scripts/matrix writes it")
    rows = table.from_csv(data.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8") == table.to_markdown(rows)
    assert all(row.fine for row in rows), [row.verdict for row in rows if not row.fine]
    # A row for each case and each release's imports; what has not been run is named.
    expected = {(case.release, case.model) for case in cases.CASES} | {
        (release, f"imports, {device}") for release in cases.RELEASES for device in cases.DEVICES
    }
    there = {(row.release, row.what) for row in rows}
    assert there <= expected
    document = table.to_markdown(rows)
    assert ("Not run yet: " in document) == (there != expected)


def test_each_release_has_its_files() -> None:
    for release in cases.RELEASES:
        assert release in _env.RELEASES
        for kind in ("requirements", "overrides"):
            assert (SCRIPTS / f"{kind}-cpu-{release}.txt").is_file()
        lock = (SCRIPTS / f"requirements-cpu-{release}.txt").read_text()
        assert f"\nvllm-cpu=={release}\n" in lock


@pytest.fixture
def kept(tmp_path: Path) -> _matrix.Kept:
    return _matrix.Kept(tmp_path, "0.18.0")


def test_a_fine_result_is_kept_and_a_wrong_one_is_run_again(kept, tmp_path) -> None:
    runs = []

    def run(verdict: str) -> Result:
        runs.append(verdict)
        return a_result(verdict=verdict)

    assert kept.get("0.18.0 Qwen3", lambda: run("broken")).verdict == "broken"
    assert kept.get("0.18.0 Qwen3", lambda: run("same")) == a_result()
    assert kept.get("0.18.0 Qwen3", lambda: run("not reached")) == a_result()
    assert runs == ["broken", "same"]
    again = _matrix.Kept(tmp_path, "0.18.0", again=True)
    again.get("0.18.0 Qwen3", lambda: run("same"))
    # Another release, and another row, have results of their own.
    _matrix.Kept(tmp_path, "0.17.0").get("0.17.0 Qwen3", lambda: run("same"))
    kept.get("0.18.0 Qwen3-Next", lambda: run("same"))
    assert runs == ["broken", "same", "same", "same", "same"]


def test_what_is_kept_belongs_to_the_sources(kept, monkeypatch, tmp_path) -> None:
    """A kernel, a package or a scale that changes makes every release run again."""
    keys = {kept.key, _matrix.key_of("0.17.0")}
    read = Path.read_bytes
    for name in (
        "ascend_patch/_apply.py",
        "kernels/dispatch.py",
        "sitecustomize.py",
        "scripts/requirements-cpu-0.18.0.txt",
        "scripts/_tiny_weights.py",
        "scripts/_matrix_run.py",
    ):
        changed = ROOT / name
        assert changed.is_file()

        def other(path: Path, changed: Path = changed) -> bytes:
            return read(path) + (b" " if path == changed else b"")

        monkeypatch.setattr(Path, "read_bytes", other)
        keys.add(_matrix.key_of("0.18.0"))
    assert len(keys) == 8
    # How results are written down changes none of them.
    table_of = {path.name for pattern in _matrix.OWN for path in SCRIPTS.glob(pattern)}
    assert "_matrix_run.py" in table_of
    assert not table_of & {"_matrix.py", "_matrix_table.py"}
    monkeypatch.setattr(Path, "read_bytes", read)
    assert _matrix.key_of("0.18.0") == kept.key


def test_one_release_that_cannot_be_run_does_not_keep_the_others(
    monkeypatch, tmp_path, capsys
) -> None:
    def run_release(release: str, *, again: bool) -> list[Result]:
        if release == "0.17.0":
            raise SetupError("There is no room.")
        return [a_result(release)]

    monkeypatch.setattr(_matrix, "run_release", run_release)
    command = ["--only", "0.11.0", "0.17.0", "0.18.0", "--out", str(tmp_path)]
    assert _matrix.run(_matrix.parse(command)) == 1
    rows = table.from_csv((tmp_path / "matrix.csv").read_text())
    assert [row.release for row in rows] == ["0.11.0", "0.18.0"]
    assert "vLLM 0.17.0: There is no room." in capsys.readouterr().err
    # The table is not lost where the next one is written.
    assert _matrix.run(_matrix.parse(["--only", "0.32.0", "--out", str(tmp_path)])) == 0
    assert len(table.from_csv((tmp_path / "matrix.csv").read_text())) == 3


CASE = Case("0.18.0", "Qwen3", "qwen3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "same"),
        ({"worst": 2e-4}, "2.0e-04 apart, and 1.0e-04 is the limit"),
        ({"worst": math.nan}, "nan apart"),
        ({"other_tokens": 1}, "1 of 192 tokens are others"),
        ({"spoilt": 9e-4}, "this proves nothing"),
        ({"spoilt": math.nan}, "this proves nothing"),
    ],
)
def test_verdicts(changes, said) -> None:
    result = a_result(**changes)
    assert said in _matrix_run._verdict(CASE, result, [], {"rotary_embedding": 4})
    assert "it broke" in _matrix_run._verdict(CASE, result, ["it broke"], {"rotary_embedding": 4})
    assert "no call reached" in _matrix_run._verdict(CASE, result, [], {})


def seen_by_child(state: str = "applied", *targets: str, refused: str = "") -> dict:
    patch = {"state": state, "reason": "r", "targets": list(targets)}
    failed = {"vllm.a": refused} if refused else {}
    found = {"patches": {"rotary": patch}, "known": ["rotary"], "problems": []}
    return {**found, "versions": VERSIONS, "not imported": failed}


@pytest.mark.parametrize(
    ("patched", "plain", "verdict"),
    [
        (seen_by_child("applied", "applied", "applied"), {}, "applied"),
        (seen_by_child("retired"), {}, "applied"),
        (seen_by_child("skipped"), {}, "applied"),
        (seen_by_child("armed", "armed"), {}, "rotary is armed: r"),
        (seen_by_child("failed", "failed"), {}, "rotary is failed: r"),
        (seen_by_child("applied", "applied", "armed"), {}, "rotary is applied in part: r"),
        (
            seen_by_child("applied", "applied", "armed", refused="E: no triton"),
            {"vllm.a": "E: no triton"},
            "applied in part",
        ),
        # What vLLM can import alone, or fails at for another reason, the shim has broken.
        (
            seen_by_child("applied", "applied", refused="E: ours"),
            {},
            "vllm.a cannot be imported: E: ours",
        ),
        (
            seen_by_child("applied", "applied", refused="E: ours"),
            {"vllm.a": "E: theirs"},
            "vllm.a cannot be imported: E: ours",
        ),
        ({**seen_by_child("applied"), "problems": ["it broke"]}, {}, "it broke"),
        ({**seen_by_child(), "known": ["rotary", "b"]}, {}, "b was not decided"),
    ],
)
def test_verdicts_of_imports(monkeypatch, tmp_path, patched, plain, verdict) -> None:
    asked = []

    def child(env, folder, kind, device, modules=()) -> dict:
        asked.append((kind, list(modules)))
        return patched if kind == "patched" else {"not imported": plain}

    monkeypatch.setattr(_matrix_imports, "_child", child)
    result = _matrix_imports.run_imports(None, "0.18.0", "cpu", tmp_path)
    assert result.verdict == verdict
    assert result.fine == (verdict in ("applied", "applied in part"))
    # Without the shim only what failed with it is imported.
    assert asked[1:] == ([("plain", ["vllm.a"])] if patched["not imported"] else [])
    if verdict == "applied in part":
        assert result.why == "vLLM itself cannot import vllm.a here: E: no triton"
        text = table.to_markdown([result])
        assert f"- 0.18.0 imports, cpu: {result.why}" in text
        assert "imported (cpu): applied in part" in text


def test_the_first_error_of_a_log_is_the_cause(tmp_path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "WARNING 01-02 [core.py:7] nothing\n"
        "(EngineCore_DP0 pid=9) ERROR 01-02 [core.py:7] Traceback (most recent call last):\n"
        "(EngineCore_DP0 pid=9) ERROR 01-02 [core.py:7] ValueError: too many values (expected 2)\n"
        "(APIServer pid=8) RuntimeError: Engine core initialization failed.\n"
    )
    assert _matrix_run._first_error(log) == "ValueError: too many values (expected 2)"
    log.write_text("triton.compiler.CompilationError: of a module's own\n")
    assert _matrix_run._first_error(log) == "triton.compiler.CompilationError: of a module's own"
    assert _matrix_run._first_error(tmp_path / "none") == ""


def test_a_step_past_its_deadline_is_a_sentence() -> None:
    began = time.monotonic()
    with (
        pytest.raises(_pair.TooLateError, match=r"the asking did not end in 0 s\."),
        _pair.deadline(0.2, "the asking"),
    ):
        time.sleep(5)
    assert time.monotonic() - began < 2
    with _pair.deadline(0.2, "the asking"):
        pass
    # The alarm is off.
    time.sleep(0.3)


def test_limits() -> None:
    step = {f"token_id:{i}": -float(random.uniform(0, 1)) for i in range(20)} | {"token_id:3": 10.0}
    answers = (logprobs.Answer((1,), (3,), (step,)),)
    assert _matrix_run._limit(CASE, answers) == 1e-4
    # 10 lies between 8 and 16, where bfloat16 has 128 steps.
    assert _matrix_run._limit(replace(CASE, dtype="bfloat16"), answers) == 2 * 8 / 128
