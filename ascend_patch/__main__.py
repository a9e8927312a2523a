"""`python -m ascend_patch` is the console script `ascend-patch`."""

from __future__ import annotations

import sys

from ascend_patch.cli import main

sys.exit(main())
