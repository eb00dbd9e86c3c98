"""Reports which packages are installed, and their versions, without importing them."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from wanfast.runtime.errors import ConfigError, NeedsGpuError
from wanfast.runtime.facts.choices import LOSSY_ATTENTION
from wanfast.version import __version__

# The packages of attention kernels: the package, the modules, any one of which has the kernel, and our extra.
ATTENTION_PACKAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "fa3": ("fa3-fwd", ("fa3_fwd_interface", "flash_attn_interface"), "fa3"),
    "fa4": ("flash-attn-4", ("flash_attn.cute",), "fa4"),
    "fa2": ("flash-attn", ("flash_attn.flash_attn_interface",), "fa2"),
    "sparse": ("flash-attn-4", ("flash_attn.cute",), "fa4"),
    "fa3-fp8": ("fa3-fwd", ("fa3_fwd_interface", "flash_attn_interface"), "fa3"),
}
_ROOT = Path(__file__).parents[3]
ATTENTION_ON_CPU = ("flash", "math", *LOSSY_ATTENTION)  # the kernels that a CPU has, or computes in plain PyTorch
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "ftfy", "pillow", "av")
_OPTIONAL = (
    "triton",
    "torchao",
    "fa3-fwd",
    "flash-attn-4",
    "flash-attn",
    "nvidia-cudnn-frontend",
    "diffusers",
    "gguf",
)  # listed only if they are installed


def install(extra: str) -> str:
    """Returns the command that installs an extra of wanfast, such as "fa3", beside the wanfast that is installed."""
    return f"pip install 'wanfast[{extra}]'"


def require_attention(kernel: str, device: str) -> None:
    """Raises an error if the attention kernel `kernel` cannot run on `device`, which is "cpu" or "cuda".

    On a CPU, raises NeedsGpuError if the kernel needs a GPU. On a GPU, raises ConfigError if the kernel's package is
    not installed. The kernel is not run, so this function does not show whether the kernel works on the GPU.
    """
    if device == "cpu" and kernel not in ("auto", *ATTENTION_ON_CPU):
        raise NeedsGpuError(f"--attention {kernel} needs a GPU: use --attention auto, or --device cuda")
    if device != "cpu" and kernel in ATTENTION_PACKAGES:
        package, modules, extra = ATTENTION_PACKAGES[kernel]
        if not any(find_spec(module.partition(".")[0]) for module in modules):
            fix = f"run `{install(extra)}`, or use --attention auto"
            raise ConfigError(f"--attention {kernel}: {package} is not installed: {fix}")


def require_fp8(device: str, option: str) -> None:
    """Raises ConfigError if the package that float8 attention needs on a GPU is not installed.

    On a CPU, float8 attention needs no package, so no error is raised. `device`: "cpu" or "cuda". `option`: the option
    that asks for float8 attention, as the error names it.
    """
    try:
        require_attention("fa3-fp8", device)
    except ConfigError:
        package, _, extra = ATTENTION_PACKAGES["fa3-fp8"]
        raise ConfigError(
            f"{option}: heads in float8 need {package}, which is not installed: run `{install(extra)}`, or use a "
            "plan without float8"
        ) from None


@functools.cache
def version_of(package: str) -> str | None:
    """Returns a package's version, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Returns {name: version} of all software that can change a video's pixels, without importing any package."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "commit": commit() or "unknown"}
    found["wanfast"] = __version__  # of the code that runs; a checkout need not be installed as a package
    found |= {package: version_of(package) or "not installed as a package" for package in _PACKAGES}
    return found | {package: version for package in _OPTIONAL if (version := version_of(package))}


@functools.cache
def commit() -> str | None:
    """Returns the git commit of this code, or None if the commit is unknown.

    If the environment variable WANFAST_COMMIT is set, its value is returned. Otherwise git names the commit of the
    checkout that contains this package. `-dirty` is appended to git's answer if a tracked file has uncommitted changes;
    changes in results of benchmarks do not count.
    """
    if named := os.environ.get("WANFAST_COMMIT"):
        return named
    if not (_ROOT / ".git").exists():  # else git may find the repository of another project
        return None
    with suppress(OSError, subprocess.CalledProcessError):
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
