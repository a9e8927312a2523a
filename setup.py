"""Builds what setup.cfg describes, and the two things that it cannot say.

`ascend_patch.pth` goes beside the packages: its import line activates the shim in every process,
before and whatever sitecustomize runs. A wheel has no sitecustomize.py beside the packages, where
it would overwrite that of another distribution.

An editable install is one line more in that file: the folder ascend_patch/startup, whose modules
lead to the package around it. The checkout itself must not be on sys.path, because its folder
`kernels` would answer for Hugging Face's package; and setuptools' own import hook would cost every
process 10 ms.
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
STARTUP = ROOT / "ascend_patch" / "startup"

# One line, because a line is what `site` executes. Nothing is imported while the variable is off;
# a shim that is only half there is said, since vLLM would run unpatched; and a SystemExit that got
# out of here would keep Python from starting. Installed copies of this text are older than the
# package that they import from wherever a checkout was updated: see `open_door`. Python executes it
# twice in a virtual environment, and the sentence is for once.
OPEN_THE_DOOR = (
    "import os; "
    "os.environ.get('ASCEND_PATCHES', '').strip().lower() "
    "in ('', 'none', '0', 'off', 'false', 'no') or "
    'exec("try:\\n'
    " from ascend_patch._bootstrap import open_door\\n"
    " open_door('pth')\\n"
    "except KeyboardInterrupt:\\n raise\\n"
    "except BaseException as error:\\n"
    " try:\\n"
    "  import sys\\n"
    "  hasattr(sys, '_ascend_patch_broken') or sys.stderr.write("
    "'ascend-patch: ASCEND_PATCHES is set and the shim cannot be imported ('"
    " + type(error).__name__ + ': ' + str(error) + '); install ascend-patch again\\\\n')\\n"
    "  sys._ascend_patch_broken = True\\n"
    ' except BaseException:\\n  pass")\n'
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
    kept[PTH] = f"{STARTUP}\n{OPEN_THE_DOOR}".encode()
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
                for wheel in Path(self.dist_dir).glob("*editable*.whl"):
                    rewrite_editable(wheel)
            except Exception as error:
                # The install works without it, but for an interpreter with another sitecustomize.
                sys.stderr.write(f"ascend-patch: {PTH} is not installed ({error!r})\n")

    commands["editable_wheel"] = EditableWithPth

setup(packages=packages(), cmdclass=commands)
