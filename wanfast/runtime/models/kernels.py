"""Says whether Triton kernels can be imported: only if torch is a CUDA build and Triton is installed.

The machine may still lack a GPU, so callers also check the device of their tensors.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_KERNELS = torch.version.cuda is not None and find_spec("triton") is not None
