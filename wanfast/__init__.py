"""This package makes a video from an image and a prompt with Wan2.2-A14B, fast and with correct results.

    with wanfast.open(model="a14b", num_gpus=8) as handle:
        handle.make(image="cat.jpg", prompt="The cat blinks.").save("cat.mp4")

`wanfast.make(...)` opens a handle, makes one video and closes the handle. Neither `open` nor `make` imports torch:
other processes do the work.
"""

from __future__ import annotations

from typing import Any

from wanfast.version import __version__

__all__ = ["Handle", "Video", "__version__", "make", "open"]


def __getattr__(name: str) -> Any:
    """Loads the API on first use, so that `import wanfast` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wanfast.runtime.processes import handle

    return getattr(handle, name)
