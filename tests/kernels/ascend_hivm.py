"""What a kernel compiled for Ascend does, counted: its control flow run without its data.

bishengir-compile splits a kernel with matrix products into a function for a block's cube core and
one for its two vector cores, which hand each other tiles through a workspace in global memory. That
form, HIVM, has every copy with its sizes, and products and vector operations as calls. Here its
functions become functions in Python in which copies are counted and arithmetic on data is left out;
integers in global memory (sequence starts, chunks, slots) are read from the real tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ascend_hivm_ops import NAMES, WIDTHS, results, statement, variable

WORKSPACE = "workspace"
_HEAD = re.compile(r"^ *func\.func @(\w+)\((.*)\) attributes .*func_core_type<(AI[CV])>.*\{$")
_MAP = re.compile(r"^(#map\d*) = affine_map<\(([^)]*)\)(?:\[([^\]]*)\])? -> \((.*)\)>$")
_FOR = re.compile(
    r"^(?:(%[\w:-]+) = )?scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)"
    r"(?: iter_args\((.*?)\) -> \(.*\))? .*\{$"
)
_IF = re.compile(r"^(?:(%[\w:-]+) = )?scf\.if (%[\w-]+)(?: -> \(.*\))? \{$")


@dataclass
class Counts:
    """Of a launch, all programs and cores together.

    Attributes:
        read, written: Bytes of global memory, by parameter number or WORKSPACE.
        products: Multiplications and additions on cube cores.
        elements: Written by vector operations, once an operation.
        copies: Between global memory and a core.
        waits: Of one kind of core for the other.
    """

    read: dict[object, int] = field(default_factory=dict)
    written: dict[object, int] = field(default_factory=dict)
    products: int = 0
    elements: int = 0
    copies: int = 0
    waits: int = 0

    def note(self, into: dict[object, int], root: object, amount: int) -> None:
        into[root] = into.get(root, 0) + amount
        self.copies += amount > 0

    def moved(self, workspace: bool) -> tuple[int, int]:
        """(read, written) of the workspace, or of everything but it."""
        return tuple(  # type: ignore[return-value]
            sum(n for root, n in side.items() if (root == WORKSPACE) == workspace)
            for side in (self.read, self.written)
        )


def planned(text: str, space: str = "ub") -> int:
    """Bytes of a memory that the compiler planned: the end of its last allocation."""
    # Constants are named after their value (%c128_i64), so an address can be read off its name.
    cast = re.compile(
        r"pointer_cast\(((?:%c\d+_i64(?:_\d+)?(?:, )?)+)\)[^:]*: "
        rf"memref<((?:\d+x)*)([a-z]\w*)(?:, [^>]*?)?#hivm\.address_space<{space}>"
    )
    ends = [0]
    for addresses, shape, element in cast.findall(text):
        bits = WIDTHS[element]
        for extent in filter(None, shape.split("x")):
            bits *= int(extent)
        ends += [int(at) + -(-bits // 8) for at in re.findall(r"%c(\d+)_i64", addresses)]
    return max(ends)


def functions(text: str) -> dict[str, Callable[..., None]]:
    """core (AIC, AIV) -> f(counts, arguments, grid, block, sub_block)."""
    maps = {m[1]: m for m in map(_MAP.match, text.splitlines()) if m}
    found: dict[str, Callable[..., None]] = {}
    lines = iter(text.splitlines())
    for line in lines:
        head = _HEAD.match(line)
        if head is None:
            continue
        source = "\n".join(_translate(head, lines, maps))
        space: dict[str, Any] = {"div": _div, "product": _product}
        exec(compile(source, head[1], "exec"), space)
        found[head[3]] = space["run"]
    return found


def _div(a: int, b: int) -> int:
    """Towards zero, as divsi does."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def _product(memory: tuple[Any, ...]) -> int:
    total = 1
    for extent in memory[2]:
        total *= extent
    return total


def _translate(
    head: re.Match[str], lines: Iterator[str], maps: dict[str, re.Match[str]]
) -> Iterator[str]:
    """The lines of a Python function that does what the HIVM function does, but for data."""
    yield "def run(counts, arguments, grid, block, sub_block):"
    names = re.findall(r"%arg\d+(?=: )", head[2])
    # Base address, lock and workspace; the kernel's own; the grid.
    hidden = head[2].count("hacc.arg_type = ")
    for n, name in enumerate(names):
        value = f"arguments[{n - hidden}]"
        if n < hidden:
            value = f"('{WORKSPACE}', 0, (), None)"
        elif n >= len(names) - 3:
            value = f"grid[{n - len(names) + 3}]"
        yield f" {variable(name)} = {value}"
    # What a region hands on: to names, at its end.
    regions: list[list[str]] = []
    for line in lines:
        line = line.strip()
        line = re.sub(r" \{[^{}]*\}( :|$)", r"\1", line) if not line.startswith("}") else line
        indent = " " * (len(regions) + 1)
        if line.startswith("}"):
            if not regions:
                return
            if "else" in line:
                yield indent + "pass"
                yield indent[:-1] + "else:"
                continue
            yield indent + "pass"
            after = regions.pop()
            yield from (" " * (len(regions) + 1) + text for text in after[1:])
            continue
        loop, branch = _FOR.match(line), _IF.match(line)
        if loop:
            pairs = [part.split(" = ") for part in (loop[6] or "").split(", ") if part]
            carried = [variable(a.strip()) for a, _ in pairs]
            yield from (f"{indent}{variable(a.strip())} = {variable(b.strip())}" for a, b in pairs)
            bounds = ", ".join(map(variable, loop.group(3, 4, 5)))
            yield f"{indent}for {variable(loop[2])} in range({bounds}):"
            handed = results(loop[1], len(carried))
            done = [f"{to} = {of}" for to, of in zip(handed, carried, strict=True)]
            regions.append([",".join(carried), *done])
        elif branch:
            yield f"{indent}if {variable(branch[2])}:"
            count = int(branch[1].split(":")[1]) if branch[1] and ":" in branch[1] else 1
            regions.append([",".join(results(branch[1], count)) if branch[1] else ""])
        elif line.startswith("scf.yield"):
            given = [variable(n) for n in NAMES.findall(line.split(" : ")[0])]
            if given:
                yield f"{indent}{regions[-1][0]}, = {', '.join(given)},"
        else:
            yield from (indent + text for text in statement(line, maps))


def count(text: str, arguments: list[Any], grid: tuple[int, int, int]) -> Counts:
    """Run every program of a launch.

    Args:
        text: HIVM, as ``compiled.asm["npubin"]`` has it.
        arguments: The kernel's, without constants and what a launch folds into the code: integers,
            floats, and for tensors (number, 0, (), list of its integers or None).
        grid: Programs.
    """
    found = Counts()
    cores = functions(text)
    # A kernel with matrix products runs on a cube core and two vector cores at once.
    mixed = "AIC" in cores
    for core, run in cores.items():
        subs = 2 if core == "AIV" and mixed else 1
        for block in range(grid[0] * grid[1] * grid[2]):
            for sub_block in range(subs):
                run(found, arguments, grid, block, sub_block)
    return found
