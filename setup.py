"""Builds what setup.cfg describes, and the two things that it cannot say.

`ascend_patch.pth` goes beside the packages: where another sitecustomize shadows ours (a system
Python has its own), Python reads it all the same and it opens the same door.

An editable install is one line in that file: a folder of links, build/__editable__.ascend_patch.
The checkout itself must not be on sys.path, because its folder `kernels` would answer for
Hugging Face's package; and setuptools' own import hook would cost every process 10 ms.
"""

import base64
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.editable_wheel import editable_wheel
except ImportError:  # before setuptools 64 there were no editable wheels
    editable_wheel = None

ROOT = Path(__file__).resolve().parent
PTH = "ascend_patch.pth"
LINKS = ROOT / "build" / "__editable__.ascend_patch"
LINKED = ("ascend_patch", "sitecustomize.py")

# One line, because a line is what `site` executes. Nothing is imported while the variable is off;
# nothing is said when the shim is only half there, as while pip removes it; and a SystemExit that
# got out of here would keep Python from starting.
OPEN_THE_DOOR = (
    "import os; "
    "os.environ.get('ASCEND_PATCHES', '').strip().lower() "
    "in ('', 'none', '0', 'off', 'false', 'no') or "
    'exec("try:\\n'
    " from ascend_patch._bootstrap import open_door\\n"
    " open_door('pth')\\n"
    "except KeyboardInterrupt:\\n raise\\n"
    'except BaseException:\\n pass")\n'
)


def packages():
    """Every package once: the link ascend_patch/kernels is the folder kernels."""
    shim = find_packages(str(ROOT), include=["ascend_patch", "ascend_patch.*"])
    shim = [name for name in shim if not f"{name}.".startswith("ascend_patch.kernels.")]
    kernels = [f"ascend_patch.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))]
    return [*shim, "ascend_patch.kernels", *kernels]


class BuildWithPth(build_py):
    """Puts the .pth beside the packages, so that wheels and pip's uninstall know of it."""

    def run(self):
        if getattr(self, "editable_mode", False):
            super().run()
            return
        # A patch that was removed since the last build would be packed again out of build/lib.
        if ROOT / "build" in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        self.mkpath(self.build_lib)
        Path(self.build_lib, PTH).write_text(OPEN_THE_DOOR)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        if getattr(self, "editable_mode", False):
            return outputs
        return [*outputs, os.path.join(self.build_lib, PTH)]


def make_links():
    """The folder that an editable install puts on sys.path: the shim and nothing else."""
    LINKS.mkdir(parents=True, exist_ok=True)
    for entry in LINKS.iterdir():
        if entry.is_symlink() and entry.name not in LINKED:
            entry.unlink()
    for name in LINKED:
        link = LINKS / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / name, LINKS))


def rewrite_editable(wheel):
    """Replace setuptools' import hook in a built editable wheel by our .pth.

    The finished archive is edited, a format with a standard, because the command that writes it
    is setuptools' own affair.
    """
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    kept = {
        name: data
        for name, data in files.items()
        if name != record and not name.startswith("__editable__")
    }
    kept[PTH] = f"{LINKS}\n{OPEN_THE_DOOR}".encode()
    lines = []
    for name, data in kept.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    kept[record] = "".join([*lines, f"{record},,\n"]).encode()
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
    part.replace(wheel)


commands = {"build_py": BuildWithPth}

if editable_wheel is not None:

    class EditableWithPth(editable_wheel):
        def run(self):
            super().run()
            try:
                make_links()
                for wheel in Path(self.dist_dir).glob("*editable*.whl"):
                    rewrite_editable(wheel)
            except Exception as error:
                # The install works without it, but for an interpreter with another sitecustomize.
                sys.stderr.write(f"ascend-patch: {PTH} is not installed ({error!r})\n")

    commands["editable_wheel"] = EditableWithPth

setup(packages=packages(), cmdclass=commands)
