"""The commands say what is so, once, whatever else an environment prints or lacks."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from installs import ROOT, House, base_python, copy_needs

from ascend_patch import _doctor, _doors, _explain, _explain_case, _plan, _registry, _versions, cli

NOISE = {
    "prints at exit": "import atexit; atexit.register(print, 'bye')\n",
    "prints at start": "print('hello'); import sys; sys.stdout.flush()\n",
    "prints JSON at exit": "import atexit; atexit.register(print, '{\"doors\": []}')\n",
    "prints without end": "import atexit, sys; atexit.register(sys.stdout.write, 'x' * 99999)\n",
    "has no stdout": "import sys; sys.stdout = None\n",
    "closes stdout": "import os; os.close(1)\n",
    "fails at exit": "import atexit, os; atexit.register(os._exit, 7)\n",
    "leaves a child behind": (
        "import subprocess, sys\n"
        "if '-S' not in sys.orig_argv:\n"
        "    subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(25)'])\n"
    ),
}


@pytest.fixture
def house(tmp_path) -> House:
    """An interpreter with what the shim needs, and nothing else."""
    house = House.build(tmp_path / "house", base_python())
    copy_needs(house.site)
    return house


def vllm(folder: Path, *more: str) -> Path:
    """A folder with packages that say that they are vLLM 0.18.0, and more."""
    for name in ("vllm", *more):
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "_version.py").write_text("__version__ = version = '0.18.0'\n")
    return folder


def ask(house: House, *words: str, path: tuple = (), **environ: str):
    environ = {"ASCEND_PATCHES": "all", "ASCEND_PATCHES_DEVICE": "cpu", **environ}
    return house.run("-m", "ascend_patch", *words, path=(ROOT, *path), **environ)


def findings(done) -> dict[str, dict[str, str]]:
    return {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}


def noise(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOISE[name])
    return folder


@pytest.mark.fault("doctor_and_exit_output")
@pytest.mark.parametrize("name", NOISE)
def test_doctor_finds_the_answer_of_a_fresh_process(name, house, tmp_path, monkeypatch):
    monkeypatch.setattr(_doors, "ASK_SECONDS", 20)
    # Only the process that is asked makes noise: what doctor itself prints is not under test.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{noise(tmp_path / 'noise', name)}")
    monkeypatch.setattr(sys, "executable", str(house.python))
    (door,) = [finding for finding in _doors.examine() if finding.about == "door"]
    assert (door.level, door.text) == (
        "ok",
        f"open, by sitecustomize, from {ROOT / 'ascend_patch'}",
    )


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (
            "import sys; sys.stderr.write('a reason\\n'); sys.stderr.flush(); os._exit(3)",
            "a reason",
        ),
        ("import os; os._exit(3)", "it ended with exit status 3"),
        ("import os; os.closerange(3, 100)", "Bad file descriptor"),
    ],
)
def test_a_fresh_process_that_cannot_answer_is_said(code, part, house, tmp_path, monkeypatch):
    """The control: where there is no answer none is made up."""
    folder = tmp_path / "customize"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import os\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(house.python))
    (door,) = [finding for finding in _doors.examine() if finding.about == "door"]
    assert door.level == "wrong"
    assert part in door.text


@pytest.mark.fault("doctor_and_exit_output")
@pytest.mark.parametrize("name", NOISE)
def test_doctor_finds_the_answer_of_the_process_that_imports_vllm(
    name, house, tmp_path, monkeypatch
):
    folder = vllm(tmp_path / "site")
    (folder / "vllm" / "plugins.py").write_text(
        "def load_general_plugins():\n    raise ValueError('a plugin fails')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{noise(tmp_path / 'noise', name)}:{folder}")
    monkeypatch.setenv("ASCEND_PATCHES", "all")
    monkeypatch.setenv("ASCEND_PATCHES_DEVICE", "cpu")
    monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", str(tmp_path / "status"))
    monkeypatch.setattr(sys, "executable", str(house.python))
    monkeypatch.setattr(_doctor, "PROBE_SECONDS", 20)
    target = types.SimpleNamespace(module="vllm._version")
    band = types.SimpleNamespace(targets=[target])
    monkeypatch.setattr(_registry, "load", lambda: {"x": None})
    monkeypatch.setattr(_plan, "decide", lambda *_: types.SimpleNamespace(state="armed", band=band))
    found = list(_doctor._applied(None))
    texts = [finding.text for finding in found]
    assert any(text.startswith("loading vLLM's plugins failed: ValueError") for text in texts)
    assert not any("could not be imported" in text for text in texts), texts
    assert sum("in a process of its own: " in text for text in texts) == 4


@pytest.mark.fault("doctor_and_skipped_by_name")
@pytest.mark.parametrize(
    ("patches", "wrong"),
    [
        ("rotary", ["rotary"]),
        ("all,rotary", ["rotary"]),
        ("rotary,kv_connector", ["kv_connector", "rotary"]),
    ],
)
def test_doctor_fails_where_a_patch_that_was_asked_for_is_skipped(patches, wrong, house, tmp_path):
    site = vllm(tmp_path / "site")
    done = ask(house, "doctor", "--quick", "--json", path=(site,), ASCEND_PATCHES=patches)
    found = findings(done)
    assert sorted(name for name, f in found.items() if f["level"] == "wrong") == wrong
    assert found["rotary"]["text"].startswith("asked for by name and skipped: ")
    assert done.returncode == 1, "a patch that was asked for is missing, and doctor is content"


@pytest.mark.parametrize("patches", ["all", "all,-rotary"])
def test_doctor_is_content_where_all_skips_one(patches, house, tmp_path):
    """The control: `all` is for what fits."""
    site = vllm(tmp_path / "site")
    done = ask(house, "doctor", "--quick", "--json", path=(site,), ASCEND_PATCHES=patches)
    found = findings(done)
    assert (found["rotary"]["level"], done.returncode) == ("note", 0), done.stdout
    assert found["rotary"]["text"].startswith("skipped: ")


@pytest.mark.fault("explain_without_vllm")
@pytest.mark.parametrize("patch", ["rotary", "gdn_attn", "attention_router", "kv_connector"])
def test_explain_without_vllm_says_that_and_no_more(patch, house):
    done = ask(house, "explain", patch)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 12, "it describes the sources of a vLLM that is not there"
    (line,) = [line for line in lines if "is not installed" in line]
    assert line.startswith("  here         skipped: vllm is not installed for this interpreter")
    assert "differs" not in done.stdout
    found = json.loads(ask(house, "explain", patch, "--json").stdout)
    assert {b["state"] for b in found["bands"] if b["name"].startswith("vllm ")} <= {"skipped"}
    assert not any(target["reasons"] for band in found["bands"] for target in band["targets"])


@pytest.fixture
def on_ascend(house, tmp_path):
    """A folder with a fake vllm-ascend whose platform plugin is the active host."""
    site = vllm(tmp_path / "site", "vllm_ascend")
    info = site / "vllm_ascend-0.18.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ascend\nVersion: 0.18.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nascend = vllm_ascend:x\n")
    return site


@pytest.mark.fault("explain_repeats_lines")
@pytest.mark.parametrize("patch", ["rotary", "gdn_attn", "attention_router", "kv_connector"])
@pytest.mark.parametrize("host", ["vllm", "vllm_ascend"])
def test_explain_says_each_sentence_once(host, patch, house, request, tmp_path):
    site = vllm(tmp_path / "other") if host == "vllm" else request.getfixturevalue("on_ascend")
    text = ask(house, "explain", patch, path=(site,)).stdout
    found = json.loads(ask(house, "explain", patch, "--json", path=(site,)).stdout)
    assert any(band["state"] == "superseded" for band in found["bands"])
    lines = [line.partition(": ")[2] or line for line in text.splitlines()]
    for band in found["bands"]:
        assert band["name"] in text
        said = [line for line in lines if line.endswith(band["reason"])]
        assert len(said) == 1, f"{len(said)} times: {band['reason']}"
        for sentence in {s for target in band["targets"] for s in target["reasons"]}:
            assert lines.count(" " * 16 + sentence) + lines.count(sentence) <= 1, sentence
        if band["in_question"]:
            assert all(target["id"] in text for target in band["targets"])


@pytest.mark.fault("explain_repeats_lines")
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_explain_is_computed_once(words, monkeypatch, capsys):
    calls = []
    find, explain = _versions.find, _explain_case.explain
    monkeypatch.setattr(_versions, "find", lambda *given: calls.append("find") or find(*given))
    assert cli.main(["explain", "rotary", *words]) == 0
    assert calls == ["find"]
    monkeypatch.setattr(
        _explain_case, "explain", lambda *given: calls.append("case") or explain(*given)
    )
    assert cli.main(["explain", "attention_router", "--case", "state=chunked", *words]) == 0
    assert calls == ["find", "case"]
    assert capsys.readouterr().out


def test_explain_of_the_package_is_what_the_command_prints(capsys):
    import ascend_patch

    assert cli.main(["explain", "rotary"]) == 0
    assert capsys.readouterr().out == ascend_patch.explain("rotary") + "\n"


def test_sentences_of_targets_are_said_once_and_counted_after_that():
    target = {"state": "skipped", "seam": "host"}
    targets = [
        {**target, "id": "a", "reasons": ["one", "two"]},
        {**target, "id": "b", "reasons": ["two", "three"]},
        {**target, "id": "c", "reasons": ["one", "two"]},
        {**target, "id": "d", "reasons": ["two"]},
        {**target, "id": "e", "reasons": []},
    ]
    lines = [line.strip() for line in _explain._target_lines(targets, set())]
    assert lines == [
        *("skipped     a (host seam)", "skipped     c (host seam)", "one", "two"),
        *("skipped     b (host seam)", "three", "and 1 named above"),
        *("skipped     d (host seam)", "1 named above"),
        "skipped     e (host seam)",
    ]


@pytest.mark.fault("verify_json_without_dependency")
@pytest.mark.parametrize(
    ("missing", "words", "status", "part"),
    [
        ("torch", [], 1, "torch is not installed for this interpreter"),
        ("packaging", [], 1, "packaging is missing"),
    ],
)
def test_verify_writes_its_file_where_a_dependency_is_missing(
    missing, words, status, part, house, tmp_path
):
    if missing == "packaging":
        (house.site / "packaging").rename(tmp_path / "packaging")
        (house.site / "torch.py").write_text("raise ModuleNotFoundError(name='packaging')\n")
    file = tmp_path / "report.json"
    done = ask(house, "verify", "--json", str(file), *words)
    assert done.returncode == status
    assert file.exists(), "the file that was asked for is not written"
    assert part in json.loads(file.read_text())["error"]
    assert part in done.stderr
    assert done.stdout == ""


def test_verify_names_a_file_that_cannot_be_written_too(house, tmp_path):
    done = ask(house, "verify", "--json", str(tmp_path / "no" / "such" / "folder"))
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert "torch is not installed" in first
    assert "could not be written" in second


@pytest.mark.parametrize("command", [["list"], ["explain", "rotary"], ["doctor", "--quick"]])
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_device_that_does_not_exist_is_a_sentence(command, words, house):
    done = ask(house, *command, *words, ASCEND_PATCHES_DEVICE="tpu")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "names no device" in " ".join((done.stdout + done.stderr).split())
