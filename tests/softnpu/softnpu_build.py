"""Compiles the software NPU from device/, and stubs for the rest of CANN.

The libraries of device/ implement what they export. Whatever else torch_npu and vllm-ascend link
to becomes a stub that raises an error with its name when it is called; a few functions that only
register or describe something and compute nothing are named in `HARMLESS` and return 0.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEVICE = Path(__file__).resolve().parent / "device"
SECONDS = 600
SCHEMAS = "c_ascend_schemas.txt"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")
RUNTIME = ("acl_runtime", "acl_stream", "acl_memory", "acl_graph", "acl_late")
HCCL = ("hccl_communicator", "hccl_collectives", "hccl_messages")
# Called while torch_npu or vllm-ascend are imported, or by a profiler that is off.
HARMLESS = {
    "Msprof",  # a profiler's reports, of which nobody reads any
    "aclrtBinaryLoadFromData",  # AscendC kernels announce themselves; launching one is an error
    "aclrtBinaryUnLoad",
    "rtDevBinaryRegister",  # the same, as older compilers have it
    "rtDevBinaryUnRegister",
    "rtFunctionRegister",
    "rtRegisterAllKernel",
    "rtRegStreamStateCallback",
}


class Packages:
    """Where one environment's packages are."""

    def __init__(self, python: Path) -> None:
        code = (
            "import importlib.util as u, json, sys; print(json.dumps({n: "
            "u.find_spec(n).submodule_search_locations[0] "
            "for n in ('torch', 'torch_npu', 'vllm_ascend')}))"
        )
        found = json.loads(_output(str(python), "-c", code))
        self.torch, self.torch_npu = Path(found["torch"]), Path(found["torch_npu"])
        self.vllm_ascend = Path(found["vllm_ascend"])

    def needing(self) -> list[Path]:
        """Every library that links to CANN."""
        found = [*self.torch_npu.glob("lib/*.so"), *self.torch_npu.glob("_C*.so")]
        found += self.torch_npu.glob("dynamo/torchair/core/*.so")
        return [*found, *self.vllm_ascend.glob("*.so")]


def sources() -> list[Path]:
    """Return what the compiled libraries are made from."""
    return sorted([*DEVICE.iterdir(), Path(__file__).resolve()])


def build(python: Path, target: Path) -> None:
    """Compile everything into `target`, a folder for LD_LIBRARY_PATH.

    Args:
        python: The interpreter of the environment that has torch, torch_npu and vllm-ascend.

    Raises:
        subprocess.CalledProcessError: nm, readelf or g++ is missing or failed.
    """
    packages = Packages(python)
    target.mkdir(parents=True)
    third = packages.torch_npu / "include/third_party"
    cann = [f"-I{third}/acl/inc", f"-I{third}/hccl/inc", f"-I{packages.torch_npu}/include"]
    torch = [f"-L{packages.torch}/lib", "-lc10", "-ltorch_cpu"]
    # Named as what the others need: it is not among the libraries that every library sees.
    runtime = [f"-L{target}", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
    _compile(target, "libascendcl.so", RUNTIME, ["-DSOFTNPU_RUNTIME", *cann], ["-ldl"])
    with ThreadPoolExecutor(2) as pool:
        # Takes about as long as everything else together.
        headers = ["-O1", f"-I{packages.torch}/include"]
        boxed = pool.submit(
            _compile, target, "libsoftnpu.so", ["boxed_kernel"], headers, [*torch, *runtime, "-ldl"]
        )
        _compile(target, "libhccl.so", HCCL, cann, runtime)
        _compile(target, "libacl_op_compiler.so", ["acl_op_compiler"], cann, [])
        _stubs(packages, target)
        (target / SCHEMAS).write_text("\n".join(_schemas(packages.vllm_ascend)) + "\n")
        boxed.result()


def _schemas(vllm_ascend: Path) -> list[str]:
    """Return the schemas of _C_ascend's operators, as they are written in its library."""
    found = []
    for library in vllm_ascend.glob("vllm_ascend_C*.so"):
        for text in re.findall(rb"[\x20-\x7e]{12,}", library.read_bytes()):
            line = " ".join(text.decode().split())
            if re.fullmatch(r"[a-z]\w*\(.*(Tensor|int).*\) ?-> ?.+", line):
                found.append(line)
    return found


def _compile(
    target: Path, library: str, names: Iterable[str], before: list[str], after: list[str]
) -> None:
    files = [str(DEVICE / f"{name}.cpp") for name in names]
    soname = f"-Wl,-soname,{library}"
    command = ["g++", *FLAGS, *before, *files, "-o", str(target / library), soname, *after]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{library} cannot be compiled: {done.stderr[-3000:]}")


def _stubs(packages: Packages, target: Path) -> None:
    """Write libsoftnpu_stubs.so, and an empty library for each other name that is linked to."""
    needing = packages.needing()
    present = {path.name for path in (packages.torch_npu / "lib").iterdir()}
    present |= {path.name for path in (packages.torch / "lib").iterdir()}
    present |= {path.name for path in packages.vllm_ascend.glob("*.so")}
    needed = {name for library in needing for name in _needed(library)}
    made = [path for path in target.glob("lib*.so") if path.name != "libsoftnpu.so"]
    system = _system(needed)
    absent = sorted(needed - present - {path.name for path in (*made, *system)})
    provided = _symbols(
        [*needing, *made, *packages.torch.glob("lib/*.so*"), *system], "--defined-only"
    )
    wanted = _symbols(needing, "--undefined-only") - provided
    source = target / "stubs.cpp"
    source.write_text(_stub_source(sorted(wanted)), encoding="utf-8")
    empty = target / "empty.cpp"
    empty.write_text("", encoding="utf-8")
    stubs = "libsoftnpu_stubs.so"
    _link(target, stubs, source, [])
    for name in absent:
        # Whichever of them a library names, the stubs are loaded with it.
        _link(target, name, empty, ["-Wl,--no-as-needed", f"-L{target}", "-lsoftnpu_stubs"])


def _link(target: Path, library: str, source: Path, after: list[str]) -> None:
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-Wl,-rpath,$ORIGIN"]
    command = ["g++", *flags, str(source), "-o", str(target / library), *after]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{library} cannot be compiled: {done.stderr[-3000:]}")


def _stub_source(names: list[str]) -> str:
    readable = _demangled(names)
    lines = [
        "#include <cstdio>",
        "#include <stdexcept>",
        "#include <string>",
        "static void refuse(const char *name) {",
        '  std::string sentence = std::string("software NPU: ") + name +',
        '      " of CANN was called and is not implemented";',
        '  std::fprintf(stderr, "%s\\n", sentence.c_str());',
        "  throw std::runtime_error(sentence);",
        "}",
        'extern "C" {',
    ]
    for name in names:
        is_data = name.startswith(("_ZTV", "_ZTI", "_ZTS"))
        if is_data or re.search(r"_instance_|_table_|kEmpty", name):
            # Tables and type information are data; a caller reads them and never calls them.
            lines.append(f"char {name}[512];")
        elif any(name.startswith(prefix) for prefix in HARMLESS):
            lines.append(f"long {name}() {{ return 0; }}")
        else:
            lines.append(f"long {name}() {{ refuse({json.dumps(readable[name])}); return 0; }}")
    return "\n".join([*lines, "}", ""])


def _demangled(names: list[str]) -> dict[str, str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def _symbols(libraries: Iterable[Path], which: str) -> set[str]:
    found: set[str] = set()
    for library in libraries:
        for line in _output("nm", "-D", "-P", which, str(library)).splitlines():
            name, kind = line.split()[:2]
            weak = which == "--undefined-only" and kind in "wv"
            if not weak and not name.startswith(("Py", "_Py")):
                found.add(name.partition("@")[0])
    return found


def _needed(library: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.+?)\]", _output("readelf", "-d", str(library)))


def _system(names: Iterable[str]) -> list[Path]:
    listed = _output("/sbin/ldconfig", "-p")
    known = dict(re.findall(r"^\s+(\S+) .*=> (\S+)$", listed, re.MULTILINE))
    return [Path(known[name]) for name in names if name in known]


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=SECONDS
    ).stdout
