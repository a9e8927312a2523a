"""Activates the shim in every Python process that has this file's folder on PYTHONPATH.

It does so where ASCEND_PATCHES asks for it, and then runs the sitecustomize that it shadows, as if
this one were not there. Nothing here may stop an interpreter from starting: a SystemExit that
leaves a sitecustomize is fatal to Python, so every step catches it.

The file lies in ascend_patch/startup, which no wheel puts on sys.path; a checkout has a link to it
at its top level, for PYTHONPATH=<checkout>.
"""

import os
import sys

# The words of `_bootstrap.OFF`, here too because off must not import even that module.
_OFF = ("", "none", "0", "off", "false", "no")
# On `sys` because two copies of this file share nothing else; gone when the outermost ends.
_RUNNING = "_ascend_patch_sitecustomizes"


def _warn(what):
    try:
        sys.stderr.write(f"ascend-patch: {what}; Python goes on without it.\n")
    except BaseException:
        return


def _here():
    return os.path.dirname(os.path.abspath(__file__))


def _root():
    """The folder that holds the package `ascend_patch` which this file came with."""
    here = _here()
    package, name = os.path.split(here)
    root, package = os.path.split(package)
    return root if (package, name) == ("ascend_patch", "startup") else here


def _hide_kernels_of_the_checkout():
    """Keep the checkout's folder `kernels` from answering for Hugging Face's package.

    With the checkout on PYTHONPATH a probe such as `find_spec("kernels")` would find our folder.
    Only the finder of that one directory changes. An installed shim has no such link.
    """
    root = _here()
    folder = os.path.join(root, "kernels")
    link = os.path.join(root, "ascend_patch", "kernels")
    if not (os.path.islink(link) and os.path.isdir(folder) and os.path.samefile(link, folder)):
        return
    finder = sys.path_importer_cache.get(root)
    if type(finder).__name__ != "FileFinder":
        return

    class CheckoutFinder(type(finder)):
        def find_spec(self, fullname, target=None):
            return None if fullname == "kernels" else super().find_spec(fullname, target)

    finder.__class__ = CheckoutFinder


def _open_the_door():
    """Import the shim only if the variable asks for it; off means that nothing is imported."""
    if os.environ.get("ASCEND_PATCHES", "").strip().lower() in _OFF:
        return
    # PYTHONPATH reaches every interpreter that a server starts, old ones included.
    if sys.version_info < (3, 10):  # noqa: UP036
        return
    from ascend_patch import _bootstrap

    _bootstrap.open_door("sitecustomize", _root())


def _find_shadowed(running):
    """The spec of the sitecustomize that Python would have found without those `running`.

    On sys.path only the entries behind ours are searched: one in front of ours has run already
    (it is what imported us), or else it shadows us, and this code does not run at all.
    """
    from _frozen_importlib_external import PathFinder

    root = _here()
    entries = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    behind = sys.path[entries.index(root) + 1 :] if root in entries else sys.path
    # One entry at a time, so that one that is running hides none behind it.
    searches = [(PathFinder.find_spec, [entry]) for entry in behind]
    # The import hooks of editable installs come after sys.path, here as in Python itself.
    searches += [(f.find_spec, None) for f in sys.meta_path if hasattr(f, "find_spec")]
    for find_spec, path in searches:
        spec = find_spec("sitecustomize", path)
        # A folder without __init__.py has no origin, and Python runs nothing there.
        if spec is None or spec.loader is None or not spec.has_location:
            continue
        if os.path.realpath(spec.origin) not in running:
            return spec
    return None


def _run_the_shadowed_one():
    """Run it under the name that it would have had.

    An Exception goes on to Python, which reports it as it would without us. A SystemExit, which
    would be fatal to Python, is reported here.
    """
    from _frozen_importlib import module_from_spec

    # One that chains too may come back to us by name, and find that both are running.
    running = vars(sys).setdefault(_RUNNING, [])
    outermost = not running
    running.append(os.path.realpath(__file__))
    ours = sys.modules.get(__name__)
    try:
        spec = _find_shadowed(running)
        if spec is None:
            return
        running.append(os.path.realpath(spec.origin))
        # It gets the name for good: whoever imports sitecustomize means that one, not this door.
        sys.modules[__name__] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            if ours is not None:
                sys.modules[__name__] = ours
            _warn(f"{spec.origin} ended with {type(error).__name__}: {error}")
    finally:
        if outermost:
            vars(sys).pop(_RUNNING, None)


for _step in (_hide_kernels_of_the_checkout, _open_the_door):
    try:
        _step()
    except KeyboardInterrupt:
        raise
    except BaseException as _error:
        _warn(f"{_step.__name__.strip('_')} failed with {type(_error).__name__}: {_error}")
_run_the_shadowed_one()
