"""scripts/bench kv ttft without servers: what it keeps, counts and tells apart."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _bench_kv_ttft as ttft  # noqa: E402
import _ttft_machine  # noqa: E402
import _ttft_model  # noqa: E402
from _disaggregated import Sizes  # noqa: E402
from _server import ServerError  # noqa: E402
from _ttft_servers import prompt  # noqa: E402

SPIN = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\n"


def test_time_of_others_is_told_from_ours() -> None:
    """On a machine that may be busy: a process counts where it is not ours, and not where it is."""

    def spin(ours: bool) -> tuple[float, int]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", SPIN + "print(flush=True)\ninput()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        watch = _ttft_machine.Others([process.pid] if ours else [])
        before = watch._at
        assert process.stdout is not None
        process.stdout.readline()
        cores, counted = watch.cores(), watch._at[2] - before[2]
        process.communicate(b"\n", timeout=20)
        return cores, counted

    strange, ours = spin(ours=False), spin(ours=True)
    assert strange[0] > 0
    assert ours[1] >= strange[1] + 0.3 * _ttft_machine.TICKS


def test_bytes_are_those_of_whole_blocks() -> None:
    each = 2 * _ttft_model.LAYERS * _ttft_model.HEADS * _ttft_model.HEAD_SIZE * 4
    assert _ttft_model.kv_bytes(1, 128) == 128 * each
    assert _ttft_model.kv_bytes(128, 128) == _ttft_model.kv_bytes(128, 32) == 128 * each
    assert _ttft_model.kv_bytes(129, 32) == 160 * each


def test_prompts_differ_where_they_should() -> None:
    assert prompt(64) == prompt(64)
    # random.Random takes -64 for 64.
    assert prompt(64) != prompt(64, random.Random(65))


def test_an_answer_that_did_not_come_is_counted_and_in_no_median() -> None:
    samples = [(0.1, 0.05, 0.5), None, (0.3, 0.06, 0.1), (0.2, 0.07, 0.3)]
    row = dict(zip(ttft.COLUMNS[7:], ttft.summary(ttft.PAIR, samples), strict=True))
    assert (row["ttft_ms"], row["min_ms"], row["max_ms"]) == (200.0, 100.0, 300.0)
    assert (row["q1_ms"], row["q3_ms"], row["prefill_ms"]) == (150.0, 250.0, 60.0)
    assert row["after_ms"] == 130.0
    assert (row["answers"], row["failed"], row["others"]) == (3, 1, 0.3)
    with pytest.raises(ServerError, match="2 answers of 4 are too few"):
        list(ttft.summary(ttft.PAIR, [*samples[:2], None, samples[2]]))


def test_a_run_replaces_its_own_rows_and_leaves_out_what_is_there(tmp_path, monkeypatch) -> None:
    asked = []

    def measure(env: Any, sizes: Sizes, layout: str, arguments: Any) -> list[dict[str, Any]]:
        asked.append((str(sizes), layout))
        row = dict.fromkeys(ttft.COLUMNS, len(asked))
        row |= {"prefill_tp": sizes.prefill, "decode_tp": sizes.decode, "layout": layout}
        return [row | {"tokens": 64, "what": ttft.PAIR}]

    monkeypatch.setattr(ttft, "measure", measure)
    monkeypatch.setattr(ttft._env, "prepare", lambda **_: None)
    monkeypatch.setattr(ttft, "facts", lambda env, commit: {"commit": commit})
    monkeypatch.setattr(ttft._ttft_picture, "write", lambda folder: None)

    def run(*words: str) -> list[tuple[str, ...]]:
        asked.clear()
        assert ttft.main([*words, "--out", str(tmp_path), "--commit", words[-1]]) == 0
        rows = csv.DictReader((tmp_path / "kv_ttft.csv").open())
        return [(r["prefill_tp"], r["decode_tp"], r["layout"], r["commit"]) for r in rows]

    assert run("--layouts", "HND", "--ratios", "1:1") == [("1", "1", "HND", "1:1")]
    found = run("--missing", "--layouts", "HND", "--ratios", "1:1", "2:1")
    assert asked == [("TP 2 -> 1", "HND")]
    assert found == [("2", "1", "HND", "2:1"), ("1", "1", "HND", "1:1")]
    found = run("--ratios", "1:1", "--layouts", "HND")
    assert found == [("2", "1", "HND", "2:1"), ("1", "1", "HND", "HND")]
