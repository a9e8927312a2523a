"""The door: Python imports this module in every process it starts.

It opens Ascend Patch where ASCEND_PATCHES asks for it, and then runs the sitecustomize that it
shadows, as if this one were not there. Nothing here may stop an interpreter from starting, so
every step catches BaseException: a SystemExit that leaves a sitecustomize is fatal to Python.
"""

import os
import sys


def _warn(what):
    try:
        sys.stderr.write(f"ascend-patch: {what}; Python goes on without it.\n")
    except BaseException:
        return


def _here():
    return os.path.dirname(os.path.abspath(__file__))


def _hide_kernels_of_the_checkout():
    """Keep the checkout's folder `kernels` from answering for Hugging Face's package.

    With the checkout on PYTHONPATH, or as the working directory, a probe such as
    `find_spec("kernels")` would find our folder. Only the cached finder of that one directory is
    replaced; an installed shim has no such folder and nothing happens.
    """
    root = _here()
    if not os.path.isfile(os.path.join(root, "kernels", "dispatch.py")):
        return
    hooks = (h for h in sys.path_hooks if getattr(h, "__name__", "").endswith("FileFinder"))
    finder = next((hook(root) for hook in hooks), None)
    if finder is None:
        return

    class CheckoutFinder(type(finder)):
        def find_spec(self, fullname, target=None):
            return None if fullname == "kernels" else super().find_spec(fullname, target)

    finder.__class__ = CheckoutFinder
    sys.path_importer_cache[root] = finder


def _open_the_door():
    """Import the shim only if the variable is set; off means that nothing is imported."""
    if not os.environ.get("ASCEND_PATCHES", "").strip():
        return
    from ascend_patch import _bootstrap

    _bootstrap.open_door("sitecustomize")


def _run_the_shadowed_one():
    """Run the sitecustomize that Python would have found behind this one.

    Only the entries of sys.path behind ours are searched: one in front of ours was either run
    already (it is what imported us) or shadows us, and then this code does not run at all.
    """
    from _frozen_importlib import module_from_spec
    from _frozen_importlib_external import PathFinder

    root = _here()
    entries = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    behind = sys.path[entries.index(root) + 1 :] if root in entries else sys.path
    behind = [entry for entry in behind if os.path.abspath(entry or os.curdir) != root]
    spec = PathFinder.find_spec("sitecustomize", behind)
    if spec is None or spec.loader is None:
        return
    ours = sys.modules.get(__name__)
    module = module_from_spec(spec)
    # It gets the name for good: whoever imports sitecustomize means that one, not this door.
    sys.modules["sitecustomize"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if ours is not None:
            sys.modules["sitecustomize"] = ours
        raise


for _step in (_hide_kernels_of_the_checkout, _open_the_door, _run_the_shadowed_one):
    try:
        _step()
    except BaseException as _error:
        _warn(f"{_step.__name__.strip('_')} failed with {type(_error).__name__}: {_error}")
