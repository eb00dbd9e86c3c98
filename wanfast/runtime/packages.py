"""Reports which packages are installed, and their versions, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from wanfast.runtime.errors import ConfigError

# The packages of attention kernels: pip's name, and the modules, any of which holds the kernel.
ATTENTION_PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fa3": ("fa3-fwd", ("fa3_fwd_interface", "flash_attn_interface")),
    "fa4": ("flash-attn-4", ("flash_attn.cute",)),
    "fa2": ("flash-attn", ("flash_attn.flash_attn_interface",)),
}
ATTENTION_ON_CPU = ("flash", "math")  # the kernels that run on a CPU


def require_attention(kernel: str, device: str) -> None:
    """Raises ConfigError if the kernel's package is not installed, or if the kernel needs a GPU and `device` is a CPU.

    Only a run on the GPU shows whether the kernel works.
    """
    if device == "cpu" and kernel not in ("auto", *ATTENTION_ON_CPU):
        raise ConfigError(f"--attention {kernel} needs a GPU: use --attention auto, or --device cuda")
    if kernel in ATTENTION_PACKAGES:
        package, modules = ATTENTION_PACKAGES[kernel]
        if not any(find_spec(module.partition(".")[0]) for module in modules):
            fix = f"run `pip install {package}`, or use --attention auto"
            raise ConfigError(f"--attention {kernel}: {package} is not installed: {fix}")


def version_of(package: str) -> str | None:
    """Returns a package's version, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
