"""Lets torchvision's wheel of PyPI, linked against CUDA, import beside torch's CPU wheel.

It cannot load its own operators there, and then fails to add meaning to the two of them that it
expects to exist: they are declared here. Preparing an image calls neither. A vLLM plugin (this
folder goes on PYTHONPATH), so that each process has it.
"""

from __future__ import annotations

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def install() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        import torch

        # Kept for as long as the process: with the library its operators go.
        install.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            install.library.define(name + SCHEMA)
        import torchvision  # noqa: F401
