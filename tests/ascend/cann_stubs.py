"""Stub CANN libraries, so that the real torch_npu wheel imports on a machine without CANN.

torch_npu's shared objects need libraries that only a CANN installation has. Each missing one is
built as an empty library of that name; the symbols that nothing else provides go into one of them
as functions that return 0. Operators cannot run on them: tests give CPU implementations.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

CARRIER = "libascendcl.so"
# Where 0 is no answer: torch_npu asks for these while it is imported.
ANSWERS = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { if (n) *n = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B3"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "a stub of CANN"; }',
}


def build(torch_npu: Path, torch: Path, target: Path) -> None:
    """Build the stubs.

    Args:
        torch_npu: The installed package's folder.
        torch: The installed torch's folder.
        target: Where the libraries go; put it on LD_LIBRARY_PATH.

    Raises:
        subprocess.CalledProcessError: nm, readelf or gcc is missing or failed.
    """
    target.mkdir(parents=True, exist_ok=True)
    needing = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    needing += torch_npu.glob("dynamo/torchair/core/*.so")
    present = {
        path.name for folder in (torch_npu / "lib", torch / "lib") for path in folder.iterdir()
    }
    needed = {name for library in needing for name in _needed(library)}
    missing = sorted(name for name in needed - present if not _on_system(name))
    provided = _symbols([*needing, *torch.glob("lib/*.so*"), *_system(needed)], "--defined-only")
    wanted = _symbols(needing, "--undefined-only") - provided
    source = target / "stubs.c"
    source.write_text("\n".join(_stub(name) for name in sorted(wanted)) + "\n", encoding="utf-8")
    empty = target / "empty.c"
    empty.write_text("", encoding="utf-8")
    for name in sorted({CARRIER, *missing}):
        _compile(source if name == CARRIER else empty, target / name)


def _stub(name: str) -> str:
    if name in ANSWERS:
        return ANSWERS[name]
    # Tables and type information are data; a caller reads them and never calls them.
    is_data = name.startswith(("_ZTV", "_ZTI", "_ZTS")) or re.search(
        r"_instance_|_table_|kEmpty", name
    )
    return f"char {name}[512];" if is_data else f"long {name}(void) {{ return 0; }}"


def _symbols(libraries: Iterable[Path], which: str) -> set[str]:
    found: set[str] = set()
    for library in libraries:
        listed = _output("nm", "-D", "-P", which, str(library))
        for line in listed.splitlines():
            name, kind = line.split()[:2]
            weak = which == "--undefined-only" and kind in "wv"
            if not weak and not name.startswith(("Py", "_Py")):
                found.add(name.partition("@")[0])
    return found


def _needed(library: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.+?)\]", _output("readelf", "-d", str(library)))


def _on_system(name: str) -> bool:
    return bool(_system([name]))


def _system(names: Iterable[str]) -> list[Path]:
    known = dict(
        re.findall(r"^\s+(\S+) .*=> (\S+)$", _output("/sbin/ldconfig", "-p"), re.MULTILINE)
    )
    return [Path(known[name]) for name in names if name in known]


def _compile(source: Path, library: Path) -> None:
    flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
