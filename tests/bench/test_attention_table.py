"""Tests that the table of lossy attention in docs/sparse-attention.md has a row for each way."""

from __future__ import annotations

from tests.bench.results import program

attention_table = program("attention_table")


def row(way: str, density: float | None, error: float | None, **changes: object) -> dict[str, object]:
    psnr, followed = (None, 31.44)[error is not None], {"right": 3, "of": 4}
    errors = {"mean_error": error, "largest_error": error and 2 * error}
    return {
        "way": way,
        "density": density,
        **errors,
        "psnr_dense": psnr,
        "ssim_dense": 0.95554,
        "prompt_following": followed,
        "gate": error and {"prompts": True, "SSIM": False, "error": error < 0.15, "holds": False},
        **changes,
    }


def test_each_way_has_a_row_and_each_figure_its_path() -> None:
    better = {"pairs": 4, "lower_error": 3, "higher_psnr": 1}
    rows = [row("dense", None, None), row("uniform", 0.5, 0.2), row("calibrated", 0.494, 0.1, against_uniform=better)]
    rows.append(row("fp8", None, 0.02, gate=dict.fromkeys(("prompts", "SSIM", "error", "holds"), True)))
    document = {
        "rows": rows,
        "pairs": 4,
        "steps": 8,
        "hardware": "2 CPU cores",
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
    }
    head, _, *made, empty, legend, figures = attention_table.lines(document)
    assert head == "| attention | density | mean error | largest error | PSNR | SSIM | prompts followed | gate |"
    assert made[0] == "| dense | — | — | — | — | 0.9555 | 3 of 4 | — |"
    assert made[1] == "| uniform | 0.50 | 0.200 | 0.400 | 31.4 dB | 0.9555 | 3 of 4 | not: SSIM, error |"
    assert made[2] == "| calibrated | 0.49 | 0.100 | 0.200 | 31.4 dB | 0.9555 | 3 of 4 | not: SSIM |"
    assert made[3] == "| fp8 | — | 0.020 | 0.040 | 31.4 dB | 0.9555 | 3 of 4 | holds |"
    assert empty == "" and legend.endswith(": 3 with a smaller error and 1 with a higher PSNR.")
    assert "0.200 = rows/1/mean_error; 0.400 = rows/1/largest_error; 31.4 dB = rows/1/psnr_dense" in figures
