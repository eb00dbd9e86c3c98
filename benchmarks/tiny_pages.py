"""Makes those parts of pages that show measurements of the tiny model, from the JSON files of benchmarks/results.

`benchmarks/tiny_tables.py` writes the pages. Figures of photographs and of larger videos appear only if the JSON files
have these figures. The model card also lists the photographs of training/photographs.json.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import attention_table
import kinds_table
from page_block import declaration, with_block
from projection import RESULTS

from wanfast.quality.camera import CAMERAS
from wanfast.quality.motions import MOTIONS

CARD = "wanfast/assets/tiny/README.md"
MOVERS = {"shape": "shapes", "camera": "a camera over photographs"}
EXAMPLES = "wanfast/assets/examples"
SCHEMES = ("int8-weight-only", "int8-dynamic", "fp8-rowwise")
OF_README = "E012K2R20, low-noise-only"  # the setting of MagCache that README shows
DENSITY = 0.35  # that README shows


def written(root: Path) -> dict[str, str]:
    """Returns {page: its text}, with those parts replaced that come from the JSON files below `root`."""
    parts: dict[str, dict[str, Callable[[Results], list[str]]]] = {
        "README.md": {"two videos": lambda results: two_videos(results.root), "lossy steps": lossy},
        "docs/quality.md": {"the tiny model": quality},
        "docs/quantization.md": {"the tiny model's videos": schemes},
        "docs/magcache.md": {"extrapolated": extrapolated, "skipping": skipping},
        "docs/few-steps.md": {"gates": gates, "few steps": few_steps},
        "docs/fp8-attention.md": {"error of a head": in_fp8},
        "docs/sparse-attention.md": {attention_table.BLOCK: attention},
        kinds_table.PAGE: {kinds_table.BLOCK: lambda results: kinds_table.lines(results.root)},
        CARD: {"prompts": prompts, "table": card, "photographs": lambda results: photographs(results.root)},
    }
    found = {}
    for page, blocks in parts.items():
        text = (root / page).read_text()
        for name, lines in blocks.items():
            text = with_block(text, name, lines(Results(root)))
        found[page] = text
    return found


class Results:
    """Reads figures from the JSON files, and remembers which figures were shown since the last footnote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.figures: dict[str, dict[str, str]] = {}  # of each JSON file: {figure: its path}

    def document(self, name: str) -> Any:
        return json.loads((self.root / self.file(name)).read_text())

    def has(self, name: str) -> bool:
        return (self.root / self.file(name)).exists()

    @staticmethod
    def file(name: str) -> Path:
        return RESULTS / f"{name}.json"

    def value(self, name: str, path: str) -> Any:
        keys = path.split("/")
        return reduce(lambda at, key: at[int(key) if isinstance(at, list) else key], keys, self.document(name))

    def shown(self, name: str, path: str, form: str, factor: int = 1) -> str:
        """Returns the figure at `path` times `factor` in the format `form`: `.1f dB` gives a text such as `38.8 dB`."""
        number, _, unit = form.partition(" ")
        figure = f"{self.value(name, path) * factor:{number}}{' ' + unit if unit else ''}"
        self.figures.setdefault(name, {}).setdefault(figure, path + (f" * {factor}" * (factor > 1)))
        return figure

    def ratio(self, name: str, path: str, base: str, form: str) -> str:
        """Returns a figure divided by another figure of the same file, as the page shows it."""
        figure = f"{self.value(name, path) / self.value(name, base):{form}}"
        self.figures.setdefault(name, {}).setdefault(figure, f"{path} / {base}")
        return figure

    def of(self, name: str, path: str) -> str:
        """Returns how many prompts were followed, such as `99 of 100`."""
        figure = f"{self.value(name, path + '/right')} of {self.value(name, path + '/of')}"
        self.figures.setdefault(name, {}).setdefault(figure, f"{path}/right")
        return figure

    def footnote(self, mark: str, *names: str) -> list[str]:
        """Returns a footnote with the command, the JSON file and the commit of each result in `names`.

        The commit is the one that the JSON file names, `-dirty` included. The line also declares the source of all
        figures that were shown since the last footnote.
        """
        used = {name: self.value(name, "versions/torch").partition("+")[0] for name in names}
        several = len(set(used.values())) > 1
        told = [
            f"`make {name}`, `{self.file(name)}` ({self.value(name, 'commit')}{f', torch {used[name]}' * several})"
            for name in names
        ]
        torch = "" if several else f"; torch {used[names[0]]}"
        found = itertools.chain.from_iterable(declaration(self.file(name), of) for name, of in self.figures.items())
        self.figures = {}
        return [f"[^{mark}]: {'; '.join(told)}{torch}. {' '.join(found)}"]


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def columns_of(results: Results) -> list[tuple[str, str, str]]:
    """Returns (title, name of the JSON file, path in the file) of each column of the tables of quality.

    `make tiny-quality` and `make tiny-quality-256` each give a column for shapes and, if measured, one for the camera.
    """
    found = []
    for name, size in (("tiny-quality", "128x128"), ("tiny-quality-256", "256x256")):
        for path, mover in (("", MOVERS["shape"]), ("camera/", MOVERS["camera"])):
            if results.has(name) and (not path or "camera" in results.document(name)):
                found.append((f"{mover}, {size}", name, path))
    return found


def judged(results: Results, rows: list[tuple[str, Callable[[str, str], str]]]) -> list[str]:
    """Returns the lines of a table with the columns of `columns_of`; `rows` is (title, function that makes a cell).

    A row is left out if no column has its figure.
    """
    columns, made = columns_of(results), []
    for title, cell in rows:
        cells = []
        for _, name, path in columns:
            try:
                cells.append(cell(name, path))
            except KeyError:  # this judge did not measure it
                cells.append("")
        if any(cells):
            made.append([title, *cells])
    return table(["what", *(title for title, *_ in columns)], made)


def rows_of_judges(results: Results) -> list[tuple[str, Callable[[str, str], str]]]:
    def followed(name: str, path: str) -> str:
        low, high = (results.shown(name, f"{path}prompt_following/95%/{end}", ".3f") for end in (0, 1))
        return f"{results.of(name, path + 'prompt_following')} ({low} to {high})"

    def reached(name: str, path: str) -> str:
        return results.of(name, f"{path}last_frame_reached")

    return [
        ("prompts followed (95-percent interval)", followed),
        ("followed with an empty prompt", lambda name, path: results.of(name, f"{path}empty_prompt")),
        ("by chance, of 100", lambda name, path: f"{results.value(name, path + 'chance') * 100:.0f}"),
        ("PSNR of the VAE on held-out clips", decibels(results, "vae_psnr")),
        ("PSNR of the first frame to the image", decibels(results, "first_frame_psnr")),
        ("PSNR of the last frame, if it was given", decibels(results, "last_frame_psnr")),
        ("videos whose last frame has a PSNR of 25 or more", reached),
    ]


def decibels(results: Results, key: str) -> Callable[[str, str], str]:
    return lambda name, path: results.shown(name, path + key, ".1f dB")


def quality(results: Results) -> list[str]:
    judges = judged(results, rows_of_judges(results))
    decoder = results.shown("tiny-lossy", "decoder_bf16_psnr", ".1f dB")
    text = f"Decoded in bf16, a clip of the tiny model has a PSNR of {decoder} to the same clip in float32."
    return [*judges, "", text, "", *results.footnote("quality", *results.figures)]


def in_fp8(results: Results) -> list[str]:
    """Returns sentences about the error of attention in float8, with and without the Hadamard matrix."""
    ways = [row["way"] for row in results.value("tiny-attention", "rows")]
    error = results.shown("tiny-attention", f"rows/{ways.index('fp8')}/mean_error", ".3f")
    times = results.shown("tiny-lossy", "error_without_hadamard", ".1f")
    text = f"With the tiny model, the mean relative error of a head is {error}. "
    text += f"In one video without the matrix it is {times} times as large as with it.[^tiny]"
    return [text, "", *results.footnote("tiny", "tiny-attention", "tiny-lossy")]


def attention(results: Results) -> list[str]:
    return attention_table.lines(results.document("tiny-attention"))


def card(results: Results) -> list[str]:
    """Returns the table of the model card, which also compares whole videos with the true clips."""

    def several(*keys: tuple[str, str]) -> Callable[[str, str], str]:
        return lambda name, path: ", ".join(results.shown(name, path + key, form) for key, form in keys)

    rows = [
        *rows_of_judges(results),
        ("PSNR of the whole video to the true clip", decibels(results, "psnr")),
        ("SSIM, MS-SSIM of the same", several(("ssim", ".3f"), ("ms_ssim", ".3f"))),
        ("flicker, motion (of 255)", several(("flicker", ".2f"), ("motion", ".2f"))),
        ("those of the true clips", several(("true_flicker", ".2f"), ("true_motion", ".2f"))),
    ]  # fmt: skip
    return [*judged(results, rows), "", *results.footnote("quality", *results.figures)]


def prompts(_: Results) -> list[str]:
    """Returns the table of the phrases by which prompts ask for a motion; the model knows no others."""
    rows = [[f"`{phrase.rstrip('.')}`" for phrase in camera.phrases] for camera in CAMERAS.values()]
    rows += [[f"`The red star {phrase}`" for phrase in motion.phrases] for motion in MOTIONS.values()]
    return table(["say", "or", "or"], rows)


def schemes(results: Results) -> list[str]:
    """Returns the table of the videos with experts in 8 bits, compared with the videos without a scheme."""
    rows = [["none", *_of_scheme(results, "tiny-quality")]]
    rows += [[f"`{scheme}`", *_of_scheme(results, f"tiny-quality-{scheme}")] for scheme in SCHEMES]
    head = ["scheme", "shapes: PSNR, SSIM, prompts followed"]
    head += ["a camera over photographs"] if len(max(rows, key=len)) == 3 else []
    return [
        *table(head, (row + [""] * (len(head) - len(row)) for row in rows)),
        "",
        *results.footnote("quality", *results.figures),
    ]


def _of_scheme(results: Results, name: str) -> list[str]:
    cells = []
    for path in ("", "camera/") if "camera" in results.document(name) else ("",):
        parts = [results.of(name, f"{path}prompt_following")]
        if results.value(name, "settings").get("quantize"):
            psnr = results.shown(name, f"{path}psnr_unquantized", ".1f dB")
            parts = [psnr, results.shown(name, f"{path}ssim_unquantized", ".4f"), *parts]
        cells.append(", ".join(parts))
    return cells


def lossy(results: Results) -> list[str]:
    """Returns README's table of lossy steps: what each one gains on an H200, and what it costs on the tiny model."""
    rows = []
    for scheme in SCHEMES:
        gain = results.shown("quantized-h200", f"ways/{scheme}/ratio", ".3f")
        error = results.shown("quantized-errors", f"ways/{scheme}/error_by_layer/0", ".3f")
        psnr = results.shown(f"tiny-quality-{scheme}", "psnr_unquantized", ".1f dB")
        rows.append([f"`--quantize {scheme}`", gain, error, f"{psnr}[^tiny]"])
    row = _row(results, "tiny-magcache", OF_README, "greedy")
    share = results.shown("tiny-magcache", f"{row}/skipped_share", ".1f %", 100)
    psnr = results.shown("tiny-magcache", f"{row}/psnr_unskipped", ".1f dB")
    name = f"`--magcache {OF_README.split(',')[0]} --magcache-joint off`, {share} of the forwards skipped"
    rows.append([name, results.shown("magcache-h200", "ratio", ".3f"), "", f"{psnr}[^tiny]"])
    found = [(row["way"], row["asked_density"]) for row in results.value("tiny-attention", "rows")]
    for name, ratio, way, density in (
        (f"`--attention sparse --density {DENSITY}`", "guards/bf16 linears, sparse", "uniform, guarded", DENSITY),
        ("`--attention fa3-fp8`, in all steps", "ways/bf16 linears, fp8", "fp8", None),
    ):
        gain = results.shown("lossy-h200", f"{ratio}/ratio", ".3f")
        psnr = results.shown("tiny-attention", f"rows/{found.index((way, density))}/psnr_dense", ".1f dB")
        compared = f"{psnr} to dense attention, {results.value('tiny-attention', 'pairs')} pairs[^tiny]"
        rows.append([name, gain, "", compared])
    gain = results.ratio("vae-h200", "seconds/decode bf16", "seconds/decode tf32", ".3f")
    psnr = results.shown("tiny-lossy", "decoder_bf16_psnr", ".1f dB")
    name = "`--vae-precision bf16`, the default, compared with `fp32`"
    rows.append([name, f"[{gain} of decoding](docs/several-gpus.md#the-vae)", "", f"{psnr} to float32[^tiny]"])
    head = ["lossy", "speed on one H200", "a layer's error[^errors]", "PSNR to the tiny model's bf16 video"]
    names = [*(f"tiny-quality-{scheme}" for scheme in SCHEMES), "tiny-magcache", "tiny-attention", "tiny-lossy"]
    return [*table(head, rows), "", *results.footnote("tiny", *names)]


def skipping(results: Results) -> list[str]:
    """Returns the table of MagCache's settings: the greedy plan, and the plan with the least error at the same cost."""
    name, rows = "tiny-magcache", []
    for settings in _settings(results, name):
        greedy, least = (_row(results, name, settings, plan) for plan in ("greedy", "least error"))
        share = results.shown(name, f"{greedy}/skipped_share", ".1f %", 100)
        is_same = results.value(name, greedy) | {"plan": None} == results.value(name, least) | {"plan": None}
        rows.append([settings, share, _cost(results, greedy), "the same plan" if is_same else _cost(results, least)])
    low, high = (results.shown(name, f"rows/0/prompt_following/95%/{end}", ".3f") for end in (0, 1))
    whole = f"Without skipping, {results.of(name, 'rows/0/prompt_following')} prompts are followed "
    whole += f"(95-percent interval {low} to {high})."
    head = ["settings", "skipped", "greedy: PSNR, SSIM, prompts followed", "least error at the same cost"]
    return [*table(head, rows), "", whole, "", *results.footnote("quality", name)]


def _cost(results: Results, row: str) -> str:
    psnr, ssim = (
        results.shown("tiny-magcache", f"{row}/{key}", form)
        for key, form in (("psnr_unskipped", ".1f dB"), ("ssim_unskipped", ".4f"))
    )
    return f"{psnr}, {ssim}, {results.of('tiny-magcache', row + '/prompt_following')}"


def extrapolated(results: Results) -> list[str]:
    """Returns the table of extrapolated residuals, by the plans with the least error."""
    name, rows = "tiny-magcache-extrapolated", []
    for settings in _settings(results, name):
        last, line = (_row(results, name, settings, plan) for plan in ("least error", "extrapolated"))
        number = results.shown(name, f"{last}/skipped_forwards", "d")
        psnr = [results.shown(name, f"{row}/psnr_unskipped", ".1f dB") for row in (last, line)]
        rows.append([settings, f"{number} of 80", *psnr])
    head = ["settings", "skipped", "last residual again: PSNR", "extrapolated"]
    return [*table(head, rows), "", *results.footnote("extrapolated", name)]


def gates(results: Results) -> list[str]:
    """Returns the table of gates of guidance and of the hybrid, or a line if they were not measured yet."""
    name = "tiny-magcache"
    measured = results.document(name).get("gates_and_hybrid", [])
    if not measured:
        return [
            "What a gate and the hybrid cost was not measured yet: `make tiny-magcache` measures it, and fills in a "
            "table here."
        ]
    rows = []
    for k, row in enumerate(measured):
        share = results.shown(name, f"gates_and_hybrid/{k}/skipped_share", ".1f %", 100)
        rows.append([row["settings"], share, row["plan"], _cost(results, f"gates_and_hybrid/{k}")])
    head = ["settings", "forwards saved, of 80", "plan of skips", "PSNR, SSIM, prompts followed"]
    return [*table(head, rows), "", *results.footnote("gates", name)]


def few_steps(results: Results) -> list[str]:
    """Returns the table of the tiny model's distilled pair, or a line if it was not measured yet."""
    name = "tiny-few-steps"
    if not results.has(name):
        return [
            "Not measured yet: no distilled pair ships for the tiny model. `make tiny-few-steps` measures one, and "
            "fills in a table here."
        ]
    rows = [
        [title, *_few_steps_row(results, f"{mover}/{k}")]
        for mover, title in MOVERS.items()
        for k in range(len(results.document(name).get(mover, [])))
    ]
    head = ["clips", "weights", "forwards", "prompts followed", "PSNR of the first frame to the image"]
    head += ["PSNR to the teacher", "paired PSNR in dB (95-percent interval)"]
    return [*table(head, rows), "", *results.footnote("pair", name)]


def _few_steps_row(results: Results, row: str) -> list[str]:
    """Returns the cells of one way; `row` is its path in the result. Figures with a sign are not declared."""
    name = "tiny-few-steps"
    found, psnr, paired = results.value(name, row), "", ""
    if "psnr_teacher" in found:
        psnr = results.shown(name, f"{row}/psnr_teacher/mean", ".1f dB")
    if "paired_psnr" in found:
        mean, (low, high) = found["paired_psnr"]["mean"], found["paired_psnr"]["95%"]
        paired = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
    first = results.shown(name, f"{row}/first_frame_psnr", ".1f dB")
    followed = results.of(name, f"{row}/prompt_following")
    return [found["way"], str(found["forwards"]), followed, first, psnr, paired]


def _settings(results: Results, name: str) -> list[str]:
    return list(dict.fromkeys(row["settings"] for row in results.value(name, "rows")[1:]))


def _row(results: Results, name: str, settings: str, plan: str) -> str:
    """Returns the path of the row of one setting and one kind of plan."""
    rows = results.value(name, "rows")
    (found,) = (k for k, row in enumerate(rows) if (row["settings"], row["plan"]) == (settings, plan))
    return f"rows/{found}"


def two_videos(root: Path) -> list[str]:
    """Returns the images, prompts and contact sheets of `make generate`, and the model's note about its weights."""
    rows = []
    for line in (root / EXAMPLES / "jobs.jsonl").read_text().splitlines():
        job = json.loads(line)
        name = Path(job["output"]).stem
        image = f"![the image of the {name}]({EXAMPLES}/{job['image']})"
        rows.append([f'{image} "{job["prompt"]}"', f"![the video of the {name}](docs/{name}.png)"])
    note = json.loads((root / CARD).with_name("wanfast.json").read_text())["weights_note"]
    said = f" A note says so: {note}." if note else ""
    known = f"The tiny model knows only [what its page says]({CARD}).{said}"
    return [*table(["in: an image and a prompt", "out: eight of seventeen frames"], rows), "", known]


def photographs(root: Path) -> list[str]:
    """Returns the list of the photographs: package, licence, author, and the names, with a star if held out."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for picture in json.loads((root / "training/photographs.json").read_text()):
        package, _, name = picture["name"].partition("/")
        author = re.sub(r" <.*>", "", picture["author"])  # without an address
        names = groups.setdefault((package, picture["licence"], author), [])
        names.append(f"{name}\\*" if picture["held_out"] else name)
    rows = [[*group, ", ".join(sorted(names))] for group, names in sorted(groups.items())]
    return table(["package", "licence", "author", "pictures"], rows)
