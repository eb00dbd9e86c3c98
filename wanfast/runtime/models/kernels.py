"""Says whether this process can run kernels of Triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_KERNELS = torch.version.cuda is not None and find_spec("triton") is not None
