import os

import torch

if torch.version.cuda is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this at import and then interprets its kernels on a CPU, slowly
