"""Writes and reads frames without loss, so that videos can be compared exactly.

The format is H.264 with RGB pixels, which few players can show.
This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_LOSSLESS = {"qp": "0", "preset": "veryfast"}


def write_frames(frames: npt.NDArray[np.uint8], file: Path, fps: int) -> None:
    """Writes uint8 RGB frames [F, H, W, 3] to an mp4 file without any loss."""
    import av

    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options=_LOSSLESS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_frames(file: Path) -> npt.NDArray[np.uint8]:
    """Returns the uint8 RGB frames [F, H, W, 3] of an mp4 file that `write_frames` wrote."""
    import av
    import numpy as np

    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
