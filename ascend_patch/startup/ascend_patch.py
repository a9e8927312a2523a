"""Makes `import ascend_patch` work where this folder alone is on sys.path.

It gives its name in sys.modules to the package that this folder is part of, so that neither the
site-packages nor the checkout around that package has to be on sys.path.
"""

import os
import sys
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_spec = PathFinder.find_spec("ascend_patch", [_root])
if _spec is None or _spec.loader is None or not _spec.has_location:
    raise ModuleNotFoundError(
        f"{_root} has no whole package ascend_patch; install ascend-patch again",
        name="ascend_patch",
    )
_package = module_from_spec(_spec)
# What is run here may be `python -m ascend_patch`; the package has its name all the same.
sys.modules["ascend_patch"] = _package
_spec.loader.exec_module(_package)
if __name__ == "__main__":
    from ascend_patch.cli import main

    sys.exit(main())
