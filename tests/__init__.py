import gc
import os

gc.disable()  # until all tests are collected: the search for garbage takes a third of the imports' time

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this at import and then interprets its kernels on a CPU, slowly
