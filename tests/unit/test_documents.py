"""What the documents say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ascend_patch import _records

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_patches_is_the_registry_s():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/update_readme"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_recorded_release_is_named():
    assert "(docs/releases.md)" in README
    text = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    sections = dict(zip(("vllm_ascend", "vllm"), text.split("\n## ")[1:3], strict=True))
    for host, section in sections.items():
        rows = {line.split()[1] for line in section.splitlines() if line.startswith("| ")}
        missing = set(_records.releases(host)) - rows
        assert not missing, f"{host}: recorded, and no row of docs/releases.md: {missing}"


def test_every_script_and_command_that_is_named_exists():
    for name in set(re.findall(r"scripts/(\w+)", README)):
        assert (ROOT / "scripts" / name).is_file(), name
    commands = set(re.findall(r"`?ascend-patch ([a-z]\w*)", README))
    from ascend_patch.cli import _parser

    text = _parser().format_help()
    for command in commands:
        assert command in text, command


def test_modules_stay_small():
    for path in [*ROOT.glob("ascend_patch/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
    for path in ROOT.glob("ascend_patch/patches/*.py"):
        if path.name.startswith("_watch"):
            # Tables of names.
            continue
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"
