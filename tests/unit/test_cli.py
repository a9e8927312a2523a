"""The command line: what it prints, as text and as JSON, and its exit status."""

from __future__ import annotations

import json

import pytest

from ascend_patch import _registry, cli


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """No host at all: every answer must still be a sentence."""
    from ascend_patch import _versions

    found = _versions.Installed(versions={}, roots={}, host="vllm", host_reason="no plugin")
    monkeypatch.setattr(_versions, "find", lambda *_: found)
    monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", str(tmp_path / "status"))
    return found


def test_list_has_every_patch_with_state_and_reason(capsys, installed):
    status, out, _ = run(capsys, "list")
    assert status == 0
    for name, patch in _registry.load().items():
        assert name in out
        assert patch.summary in out


def test_list_fits_in_100_columns(capsys, installed):
    _, out, _ = run(capsys, "list")
    assert max(map(len, out.splitlines())) <= 100


def test_list_as_json(capsys, installed):
    _, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)["patches"]
    assert [row["id"] for row in rows] == list(_registry.load())
    assert all(row["state"] and row["reason"] for row in rows)


@pytest.mark.parametrize("name", ["rotary", "patch_rotary", "Patch-Rotary"])
def test_explain_takes_a_patch_by_any_spelling(capsys, installed, name):
    status, out, _ = run(capsys, "explain", name)
    assert status == 0
    assert out.startswith("rotary ")


def test_explain_names_every_target_of_every_band(capsys, installed):
    _, out, _ = run(capsys, "explain", "rotary", "--json")
    bands = json.loads(out)["bands"]
    expected = [[target.id for target in band.targets] for band in _registry.load()["rotary"].bands]
    assert [[target["id"] for target in band["targets"]] for band in bands] == expected


def test_explain_says_that_another_host_is_active(capsys, installed):
    _, out, _ = run(capsys, "explain", "rotary", "--json")
    states = {band["name"]: band["state"] for band in json.loads(out)["bands"]}
    assert all(state == "superseded" for name, state in states.items() if "vllm_ascend" in name)


def test_explain_of_an_unknown_patch_names_the_known_ones(capsys, installed):
    status, out, err = run(capsys, "explain", "rope")
    assert (status, out) == (1, "")
    assert "no patch 'rope'" in err
    assert "rotary" in err


def test_status_without_a_run_says_where_it_looked(capsys, installed, tmp_path):
    status, out, _ = run(capsys, "status")
    assert status == 1
    assert str(tmp_path / "status") in out


def test_status_as_json_without_a_run(capsys, installed):
    status, out, _ = run(capsys, "status", "--json")
    assert status == 1
    assert json.loads(out) == {"runs": [], "problems": []}


def test_doctor_fails_where_vllm_is_missing(capsys, installed):
    status, out, _ = run(capsys, "doctor", "--quick")
    assert status == 1
    assert "it is not installed in this environment" in out
    assert out.rstrip().endswith("something is wrong: see above")
    assert max(map(len, out.splitlines())) <= 100


def test_doctor_as_json_names_a_bad_selection(capsys, installed, monkeypatch):
    monkeypatch.setenv("ASCEND_PATCHES", "rotery")
    _, out, _ = run(capsys, "doctor", "--quick", "--json")
    found = {finding["about"]: finding for finding in json.loads(out)["findings"]}
    assert found["ASCEND_PATCHES"]["level"] == "wrong"
    assert "Did you mean `rotary`?" in found["ASCEND_PATCHES"]["text"]


def test_doctor_names_a_sitecustomize_that_shadows_ours(
    capsys, installed, monkeypatch, tmp_path, checkout
):
    import sys

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "sitecustomize.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "path", ["", str(stranger), str(checkout), *sys.path])
    _, out, _ = run(capsys, "doctor", "--quick", "--json")
    found = [f for f in json.loads(out)["findings"] if f["about"] == "sitecustomize"]
    assert len(found) == 1
    assert str(stranger) in found[0]["text"]
    assert "shadows ours" in found[0]["text"]


@pytest.fixture
def checkout():
    from pathlib import Path

    return Path(__file__).resolve().parents[2]


def test_run_without_a_command_is_a_sentence(capsys, installed):
    status, _, err = run(capsys, "run", "--")
    assert status == 2
    assert err.startswith("ascend-patch: ")


def test_colour_is_for_terminals_only(capsys, installed):
    _, out, _ = run(capsys, "list")
    assert "\033" not in out
