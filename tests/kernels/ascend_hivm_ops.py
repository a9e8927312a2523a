"""Lines of HIVM as lines of Python that count: see ascend_hivm.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

WIDTHS = {"f32": 32, "i32": 32, "f16": 16, "bf16": 16, "i16": 16, "i64": 64, "i8": 8, "i1": 1}
_CALL = re.compile(r"^(?:(%[\w-]+) = )?(?:func\.)?call @(\w+)\((.*?)\) : \((.*)\) -> (.*)$")
_OP = re.compile(r"^(%[\w-]+) = ([a-z_]+\.[\w.]+) ?(.*)$")
_PARTS = re.compile(r"^(%.*) = memref\.extract_strided_metadata (%[\w-]+) : .*$")
_MEMREF = re.compile(r"memref<((?:[0-9?]+x)*)(\w+)(?:, .*?)?#hivm\.address_space<(\w+)>>")
NAMES = re.compile(r"%[\w-]+(?:#\d+)?")
_INTEGER = {
    "addi": "+", "subi": "-", "muli": "*", "andi": "&", "ori": "|", "xori": "^", "shli": "<<",
    "shrsi": ">>", "floordivsi": "//",
}  # fmt: skip
_COMPARE = {
    "eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">=", "ult": "<",
    "ule": "<=", "ugt": ">", "uge": ">=",
}  # fmt: skip
# Nothing to count: waiting, and what the hardware is set to.
_SILENT = ("hivm.hir.", "annotation.", "return", "memref.store", "memref.assume", "llvm.")


def variable(name: str) -> str:
    return "v" + name[1:].replace("-", "m").replace("#", "_r")


def _sizes(kind: str, dynamic: Iterator[str]) -> str:
    parts = _MEMREF.search(kind)
    assert parts is not None, kind
    return (
        "("
        + "".join(f"{next(dynamic) if e == '?' else e}, " for e in parts[1].split("x")[:-1])
        + ")"
    )


def _list(text: str) -> list[str]:
    """[%a, 3, ...] as Python expressions."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [variable(part) if part[0] == "%" else part for part in parts]


def _affine(found: re.Match[str], operands: str) -> list[str]:
    names = _list(f"{found[2]}, {found[3] or ''}")
    values = [variable(name) for name in NAMES.findall(operands)]
    known = dict(zip(names, values, strict=True))
    text = found[4].replace("floordiv", "//").replace("mod", "%")
    text = re.sub(r"\(([^()]*|[^()]*\([^()]*\)[^()]*) ceildiv (\w+)\)", r"(-(-(\1) // \2))", text)
    assert "ceildiv" not in text, text
    text = re.sub(r"\b[sd]\d+\b", lambda name: known[name[0]], text)
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def results(name: str | None, count: int) -> list[str]:
    if name is None:
        return []
    if ":" in name:
        return [f"{variable(name.split(':')[0])}_r{n}" for n in range(count)]
    return [variable(name)]


def statement(line: str, maps: dict[str, re.Match[str]]) -> Iterator[str]:
    call = _CALL.match(line)
    if call:
        yield from _counted(call)
        return
    parts = _PARTS.match(line)
    if parts:
        yield from _metadata(parts)
        return
    op = _OP.match(line)
    if op is None:
        if line.startswith("hivm.hir.sync_block_wait"):
            yield "counts.waits += 1"
        elif not line.startswith(_SILENT):
            raise NotImplementedError(f"HIVM: {line}")
        return
    to, name, rest = variable(op[1]), op[2], op[3]
    operands = [variable(n) for n in NAMES.findall(rest.split(" : ")[0])]
    if name == "arith.constant":
        value = rest.split(" : ")[0]
        plain = {"true": "True", "false": "False"}.get(value, value)
        yield f"{to} = {plain if re.fullmatch(r'True|False|-?[0-9]+', plain) else '0.0'}"
    elif name.startswith("affine."):
        shape = maps[rest.split("(")[0]]
        parts = _affine(shape, rest.split("(", 1)[1].split(" : ")[0])
        function = {"affine.apply": "", "affine.min": "min", "affine.max": "max"}[name]
        yield f"{to} = {function}({', '.join(parts)})"
    elif name.startswith("arith."):
        yield f"{to} = {_arithmetic(name[6:], rest, operands)}"
    elif name == "hivm.hir.get_block_idx":
        yield f"{to} = block"
    elif name == "hivm.hir.get_sub_block_idx":
        yield f"{to} = sub_block"
    elif name == "hivm.hir.pointer_cast":
        yield f"{to} = (None, 0, {_sizes(rest, iter(()))}, None)"
    elif name.startswith("math."):
        # Of data.
        yield f"{to} = 0.0"
    elif name.startswith("memref."):
        yield from _memory(to, name[7:], rest, operands)
    else:
        raise NotImplementedError(f"HIVM: {line}")


def _metadata(found: re.Match[str]) -> Iterator[str]:
    base, _, sizes, strides = (name.strip() for name in f"{found[1]}, %_, %_".split(",")[:4])
    yield f"{variable(base)} = {variable(found[2])}"
    for n, name in enumerate(results(sizes, int(sizes.partition(":")[2] or 1))):
        yield f"{name} = {variable(found[2])}[2][{n}]"
    for name in results(strides, int(strides.partition(":")[2] or 1)):
        yield f"{name} = 0"


def _arithmetic(name: str, rest: str, operands: list[str]) -> str:
    if name in _INTEGER:
        return f" {_INTEGER[name]} ".join(operands)
    if name == "cmpi":
        return f" {_COMPARE[rest.split(',')[0]]} ".join(operands)
    if name in ("divsi", "divui"):
        return f"div({', '.join(operands)})"
    if name in ("remsi", "remui"):
        a, b = operands
        return f"{a} - {b} * div({a}, {b})"
    if name == "ceildivsi":
        return f"-(-{operands[0]} // {operands[1]})"
    if name in ("minsi", "maxsi", "minui", "maxui"):
        return f"{name[:3]}({', '.join(operands)})"
    if name == "select":
        return f"{operands[1]} if {operands[0]} else {operands[2]}"
    if name in ("extsi", "extui", "trunci", "index_cast", "index_castui"):
        return f"int({operands[0]})"
    # Of data.
    return "0.0"


def _memory(to: str, name: str, rest: str, operands: list[str]) -> Iterator[str]:
    """A memory is (root, offset, sizes, integers of the tensor)."""
    first = operands[0]
    if name == "cast":
        yield f"{to} = {first}"
    elif name == "load":
        at = _list(rest[rest.index("[") + 1 : rest.index("]")])
        memory = _MEMREF.search(rest)
        assert memory is not None
        if memory[3] == "gm":
            yield f"counts.note(counts.read, {first}[0], {WIDTHS[memory[2]] // 8})"
            yield f"{to} = int({first}[3][{first}[1] + {at[-1]}]) if {first}[3] else 0"
        else:
            yield f"{to} = 0"
    elif name == "view":
        sizes = _list(rest[rest.index("][") + 2 :].split("]")[0])
        yield f"{to} = ({first}[0], 0, {_sizes(rest[rest.rindex('memref<') :], iter(sizes))}, None)"
    elif name == "collapse_shape":
        groups = re.findall(r"\[([\d, ]*)\]", rest.split(" : ")[0])
        extents = [" * ".join(f"{first}[2][{n}]" for n in _list(g)) or "1" for g in groups]
        yield f"{to} = ({first}[0], {first}[1], ({', '.join(extents)},), {first}[3])"
    elif name == "expand_shape":
        sizes = _list(rest[rest.index("output_shape [") + 14 :].split("]")[0])
        yield f"{to} = ({first}[0], {first}[1], ({', '.join(sizes)},), {first}[3])"
    elif name == "subview":
        lists = re.findall(r"\[([^\]]*)\]", rest.split(" : ")[0])
        given = _list(lists[1])
        kept = _kept(rest, given)
        yield f"{to} = ({first}[0], {first}[1], ({', '.join(kept)},), {first}[3])"
    elif name == "reinterpret_cast":
        lists = re.findall(r"\[([^\]]*)\]", rest.split(" : ")[0])
        offset, sizes = _list(lists[0])[0], _list(lists[1])
        yield f"{to} = ({first}[0], {offset}, ({', '.join(sizes)},), {first}[3])"
    elif name == "dim":
        yield f"{to} = {first}[2][{operands[1]}]"
    elif name == "extract_aligned_pointer_as_index":
        yield f"{to} = 0"
    else:
        raise NotImplementedError(f"HIVM: memref.{name} {rest}")


def _kept(rest: str, given: list[str]) -> list[str]:
    """The sizes of a subview, without those of one element that its type drops."""
    result = _MEMREF.search(rest[rest.rindex("memref<") :])
    assert result is not None
    rank = result[1].count("x")
    kept = list(given)
    while len(kept) > rank:
        kept.remove("1")
    return kept


def _counted(call: re.Match[str]) -> Iterator[str]:
    """What a call of the library means for the counts."""
    result, name = call[1], call[2]
    operands = [variable(n.strip()) for n in call[3].split(",") if n.strip()]
    kinds = _split(call[4])
    if result:
        yield f"{variable(result)} = 0"
    if name.startswith("mma"):
        m, k, n = operands[3:6]
        yield f"counts.products += 2 * {m} * {k} * {n}"
        return
    moved = False
    for operand, kind in zip(operands, kinds, strict=True):
        memory = _MEMREF.search(kind)
        if memory is None or memory[3] != "gm":
            continue
        moved = True
        side = "written" if name.startswith(("store", "fixpipe", "copy_ub")) else "read"
        width = WIDTHS[memory[2]]
        yield f"counts.note(counts.{side}, {operand}[0], product({operand}) * {width} // 8)"
    if not moved and not name.startswith("set_l1"):
        last = [o for o, kind in zip(operands, kinds, strict=True) if "memref" in kind]
        if last:
            yield f"counts.elements += product({last[-1]})"


def _split(text: str) -> list[str]:
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "<[(") - (letter in ">])")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
