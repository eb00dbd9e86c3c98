"""Defines `HAS_KERNELS`, which is True if Triton kernels can be imported.

For this, torch must be a CUDA build, and Triton must be installed. The machine may still lack a GPU. So callers must
also check the device of their tensors.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_KERNELS = torch.version.cuda is not None and find_spec("triton") is not None
