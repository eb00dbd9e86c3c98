"""Writes the page of a report: one HTML file that works offline, with a table, pictures and videos.

This module does not import torch.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from wanfast.bench.frames import read_frames
from wanfast.runtime.media.video_file import Mp4Writer

TEMPLATE = Path(__file__).parents[1] / "assets/bench/report.html"
_CRF = 16  # smaller files than those of `wanfast generate`, because all videos lie in one page


def write_page(report: dict[str, Any], pictures: dict[str, Path], videos: dict[str, Path], file: Path) -> None:
    """Writes the page `file` of a report, with pictures and videos.

    `pictures` is {title: PNG file}, and `videos` is {recipe: file that `write_frames` wrote}.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    fps = report["fps"]
    shown = {name: _data(_playable(frames, fps, file.parent), "video/mp4") for name, frames in videos.items()}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        pictures={title: _data(picture.read_bytes(), "image/png") for title, picture in pictures.items()},
        videos=shown,
        document=json.dumps(report, indent=1, ensure_ascii=False),
    )
    file.write_text(text, encoding="utf-8")


def _playable(frames: Path, fps: int, folder: Path) -> bytes:
    """Returns an mp4 that browsers play."""
    partial = folder / ".video.mp4"
    try:
        with Mp4Writer(partial, fps, _CRF) as writer:
            writer.add(read_frames(frames))
        return partial.read_bytes()
    finally:
        partial.unlink(missing_ok=True)


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
