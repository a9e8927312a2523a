"""The functional graph that torch.compile hands to its backend, and what is copied in it."""

from __future__ import annotations

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = ("clone", "copy", "contiguous", "empty", "auto_functionalized", "scatter", "new_")


class _Clones(TorchDispatchMode):
    """Counts what is cloned or copied while it is on."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(word in str(func) for word in ("aten.clone", "aten.copy"))
        if isinstance(func, torch._ops.HigherOrderOperator):
            # The wrapper of an in-place operator: count what its own body does, too.
            body = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
            with self:
                return body(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def functionalised(forward, inputs):
    """(graph, clones): the one graph of ``forward`` after AOTAutograd has made it functional.

    ``clones``: how many tensors are cloned or copied as it runs; inside our operators none is seen.
    """
    graphs = []
    clones = _Clones()

    def keep(graph_module, _example_inputs):
        graphs.append(graph_module.graph)

        def run(*arguments):
            with clones:
                return graph_module(*arguments)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        backend = aot_autograd(fw_compiler=keep)
        torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)(*inputs)
    (graph,) = graphs
    return graph, clones.count


def targets(graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def copies(graph) -> list[str]:
    """What in a graph copies, or will once it is lowered."""
    return [t for t in targets(graph) if any(word in t for word in COPIES)]
