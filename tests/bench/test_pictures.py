"""Tests that the pictures of a report mark the recipes that were measured with other options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from wanfast.bench.pictures import draw_quality, draw_waterfall


@pytest.mark.parametrize("draw", [draw_waterfall, draw_quality])
def test_a_recipe_with_other_options_has_a_star(draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def save(figure: Figure, *arguments: Any, **named: Any) -> None:
        figure.draw_without_rendering()  # the names beside the bars are made then
        said.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", save)
    of_one = {
        "recipe": "exact", "status": "measured", "overridden": [], "published_s": None, "ratio": 1.0,
        "ratio_unclear": False, "estimated": None, "video_s": {"median": 1.0},
        "quality": {"psnr": 40.0, "identical": False},
        "seconds": {stage: {"median": 1.0} for stage in ("encode", "denoise", "decode")},
    }  # fmt: skip
    auto = {"overridden": ["--attention", "auto"]}
    of_none = {"status": "needs CUDA", "seconds": {}, "video_s": None, "quality": None, "ratio": None}
    rows = [of_one, of_one | auto | {"recipe": "int8"}, of_one | auto | of_none | {"recipe": "fa3-tf32"}]
    report = {"rows": rows, "model": "tiny", "machine": "2 CPU cores", "noise_floor": {}, "base": "exact"}
    draw(report, tmp_path / "picture.png")
    assert {"exact", "int8*", "* but with --attention auto"} <= set(said) and "fa3-tf32*" not in said
    said.clear()
    draw(report | {"rows": [of_one]}, tmp_path / "picture.png")
    assert not any("*" in text for text in said)
