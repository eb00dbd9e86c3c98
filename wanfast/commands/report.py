"""Prints the plan before a run and a summary after the run: tables on a terminal, otherwise one line for each video."""

from __future__ import annotations

import json
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.config.option import words
from wanfast.runtime.errors import JobsFailedError, from_failure
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.planning import past_runs
from wanfast.runtime.planning.next_step import warmup_command
from wanfast.runtime.planning.plan_json import plan_json, read_guided
from wanfast.runtime.planning.requests import Planned

_ANY_WIDTH = 10_000
_WORTH_A_NOTE_S = 0.5


class Report:
    """Prints plans and results on stdout or, if `as_json` is true, on stderr.

    If `as_json` is true, the last line of stdout is one JSON document. Notes always go to stderr. If a line of a list
    fails, the line's error goes to stderr too.

    `brief` is true if stdout is not a terminal. Then each result is one line, and plans are not printed, except by
    `plans(..., always=True)`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.brief = not sys.stdout.isatty()
        width = _ANY_WIDTH if self.brief else None  # a pipe breaks no path
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
        self._warnings = Console(stderr=True, highlight=False, soft_wrap=True)

    def plans(self, planned: list[Planned], *, always: bool) -> None:
        """Prints the notes of all plans; if `always` is true or stdout is a terminal, also prints the plans.

        A request without a plan has an outcome already: an error, or a note that the video exists. This method calls
        `result` with this outcome.
        """
        for item in planned:
            if item.plan is None:
                self.result(item, item.outcome())
                continue
            if always or not self.brief:
                seconds = past_runs.predicted_seconds(item.plan)
                self._table("plan" + _of_line(item), _plan_rows(plan_json(item.plan), seconds))
        for note, lines in _notes(planned).items():
            self._warnings.print(f"note{lines}: {note}", markup=False)

    def result(self, item: Planned, result: dict[str, Any]) -> None:
        """Prints the summary of one video, or a note that the video exists already.

        If the video failed: with `--jobs`, prints the error; without `--jobs`, prints nothing, because `close` raises
        the error.
        """
        if "skipped" in result:
            self._console.print(f"{_shown(result['output'])}: {result['skipped']}, skipped", markup=False)
        elif "error" not in result:
            self._summary(result, _of_line(item))
            self._note_compile_time(result, _of_line(item))
            if item.request.engines not in (None, result["cudnn_engines"]):
                self._warnings.print(
                    "note: --from: cuDNN uses other engines than in the earlier run, so pixels may differ slightly"
                )
        elif item.request.line is not None:
            self._warnings.print(f"error{_of_line(item)}: {result['error']}", markup=False)

    def close(self, planned: list[Planned], results: list[dict[str, Any]]) -> None:
        """Prints the JSON document if `as_json` is true, and raises an error if a video failed.

        Without `--jobs`, this error is the video's error, and no document is printed. With `--jobs`, it is
        JobsFailedError, and the document is printed first.
        """
        many = planned[0].request.line is not None
        failed = sum("error" in result for result in results)
        if failed and not many:
            raise from_failure(results[0])
        if self.as_json:
            lines = [{"line": item.request.line, **result} for item, result in zip(planned, results, strict=True)]
            print(json.dumps({"results": lines, "failed": failed} if many else results[0]))
        if failed:
            done, of_all = len(planned) - failed, f"{failed} of {len(planned)} failed"
            raise JobsFailedError(f"--jobs: {done} succeeded, {of_all}: fix the lines whose errors are printed above")

    def _note_compile_time(self, result: dict[str, Any], of_line: str) -> None:
        """Prints what compilation cost, if anything was compiled.

        The cost is the first step's time, less the time that as many forwards take in later steps.
        """
        in_first, *in_others = past_runs.forwards_in_turn(result["plan"])
        config = EffectiveConfig.from_json(result["effective"])
        if not result["compiled_anew"] or not sum(in_others) or config.ranks.nnodes > 1:
            return
        first, all_steps = result["first_step_s"], result["seconds"]["denoise"]
        cost = first - in_first * (all_steps - first) / sum(in_others)
        if cost >= _WORTH_A_NOTE_S:
            command = warmup_command(config)
            self._warnings.print(
                f"note{of_line}: compiling took {cost:.1f} s of this run; run `{command}` once to save this time later",
                markup=False,
            )

    def _summary(self, result: dict[str, Any], of_line: str) -> None:
        seconds, plan = result["seconds"], result["plan"]
        if self.brief:
            size = f"{plan['width']}x{plan['height']}, {plan['total_frames']} frames, seed {plan['seed']}"
            self._console.print(f"{_shown(result['output'])}: {size}, {seconds['total']:.1f} s", markup=False)
            return
        rows = {name: f"{value:.1f} s" for name, value in seconds.items()}
        for name, read in result["loading"].items():
            speed = f"{read['bytes'] / 1e9 / max(read['seconds'], 1e-3):.2f} GB/s"
            rows[f"  {name.replace('_', ' ')}"] = f"{read['seconds']:.1f} s, {read['bytes'] / 1e9:.2f} GB, {speed}"
        if result["effective"]["models"]["compile"]:
            key = result["compile_cache"]
            rows["compiled"] = (
                "in this run"
                if result["compiled_anew"]
                else f"cache hit: inductor/{key}"
                if key
                else "torch's own cache"
            )
        rows["attention"] = f"{result['attention']['kernel']}: {result['attention']['why']}"
        if check := result["attention_check"]:
            rows["attention error"] = _check_line(check)
        rows["peak memory"] = f"{result['peak_memory_bytes'] / 1e9:.2f} GB"
        rows["written"] = "\n".join(_shown(path) for path in plan["outputs"])
        self._table("done" + of_line, rows)

    def _table(self, heading: str, rows: dict[str, str]) -> None:
        table = Table(title=heading, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows.items():
            table.add_row(name, Text(value, overflow="fold"))  # no markup, and nothing is cut: a path may be long
        self._console.print(table)


def _notes(planned: list[Planned]) -> dict[str, str]:
    """Returns each note once, with the lines that have it, such as " (line 2)" or " (line 2 and 7 others)"."""
    lines: dict[str, list[Planned]] = {}
    for item in planned:
        for note in item.plan.notes if item.plan else ():
            lines.setdefault(note, []).append(item)
    return {note: _of_lines([item.request.line for item in items]) for note, items in lines.items()}


def _plan_rows(plan: dict[str, Any], predicted_s: float | None) -> dict[str, str]:
    steps, guidance, latent = plan["steps"], plan["guidance"], "x".join(str(n) for n in plan["latent"])
    kind = plan["quantize"] or plan["precision"]
    return {
        **_recipe_row(plan),
        "model": f"{plan['model']}, {kind} on {plan['device']}, {plan['attention']} attention"
        + (f", compiled ({plan['compile']})" if plan["compile"] else ""),
        **_expert_row(plan),
        **_lora_row(plan),
        **({"last image": _shown(plan["images"]["--last-image"])} if "--last-image" in plan["images"] else {}),
        "video": f"{plan['width']}x{plan['height']}, {plan['total_frames']} frames at {plan['fps']} fps "
        f"({plan['duration_s']} s)",
        **_clips_row(plan),
        "latent": f"{latent}, {plan['tokens']:,} tokens",
        "steps": f"{steps['high_noise']} high noise + {steps['low_noise']} low noise, {plan['forwards']} forwards "
        f"({plan['solver']}, {_noise_levels(plan)})",
        **_sparsity_row(plan),
        **_fp8_row(plan),
        **_magcache_row(plan),
        "guidance": f"{guidance['high_noise']:g} high noise, {guidance['low_noise']:g} low noise{_gate(plan)}",
        **_ranks_row(plan),
        "memory": plan["placement"],
        **({"time": f"about {predicted_s:.1f} s of denoising, as in an earlier run like this"} if predicted_s else {}),
        "seed": str(plan["seed"]),
        "writes": "\n".join(_shown(path) for path in plan["outputs"]),
    }


def _noise_levels(plan: dict[str, Any]) -> str:
    levels = plan["sigmas"]
    return f"shift {plan['shift']:g}" if levels is None else f"sigmas {', '.join(f'{level:.6g}' for level in levels)}"


def _gate(plan: dict[str, Any]) -> str:
    """Says in which steps the negative prompt's branch runs, and how many forwards this saves."""
    if plan["guidance_gate"] == 1:
        return ""
    steps, guided = plan["steps"], plan["guided_steps"]
    both = sum(2 * steps[expert] if plan["guidance"][expert] != 1 else steps[expert] for expert in steps)
    return (
        f"; the negative prompt runs in the first {guided['high_noise']} high-noise and the first "
        f"{guided['low_noise']} low-noise steps (gate {plan['guidance_gate']:g}): {plan['forwards']} of {both} forwards"
    )


def _clips_row(plan: dict[str, Any]) -> dict[str, str]:
    """Returns the row that says from which clips the video is joined; no row if it is a single clip."""
    clips, continued = plan["clips"], plan["continued_frames"]
    if clips == 1 and not continued:
        return {}
    earlier = f"{continued} frames of {_shown(plan['images']['--continue-from'])}, then " if continued else ""
    seeds = f", seeds {plan['seed']} to {plan['seed'] + clips - 1}" if clips > 1 else ""
    own = f"{clips} clip{'s' * (clips > 1)} of {plan['frames']} frames{seeds}"
    return {"clips": f"{earlier}{own}; a frame that two clips share is written once"}


def _expert_row(plan: dict[str, Any]) -> dict[str, str]:
    lines = [f"{_shown(each['path'])}, {each['form']} ({each['option']})" for each in plan["experts"]]
    return {"experts": "\n".join(lines)} if lines else {}


def _lora_row(plan: dict[str, Any]) -> dict[str, str]:
    lines = [f"{_shown(each['file'])}, strength {each['strength']:g} ({each['option']})" for each in plan["loras"]]
    return {"LoRA": "\n".join(lines)} if lines else {}


def _recipe_row(plan: dict[str, Any]) -> dict[str, str]:
    """Returns the row that names the recipe and the options that override it."""
    changes = ", ".join(" ".join(words(name, value)) for name, value in plan["overridden"].items())
    return {"recipe": plan["recipe"] + (f", but {changes}" if changes else "")} if plan["recipe"] else {}


def _sparsity_row(plan: dict[str, Any]) -> dict[str, str]:
    """Returns the row that shows which calls of self-attention are sparse, and how sparse."""
    s = plan["sparsity"]
    if s is None:
        return {}
    steps, own_plan = sum(plan["steps"].values()), s.get("plan")
    slowest = (
        f", on the slowest rank {s['slowest_rank_density']:.2f}" if own_plan and plan["mesh"]["ulysses"] > 1 else ""
    )
    listed = f"{'at most ' if own_plan else ''}{s['listed']} of {s['blocks']} blocks of {s['block']} tokens"
    return {
        "sparsity": f"{listed}: density {s['density']:.2f}; "
        f"dense in the first {s['dense_steps']} of {steps} steps and the first {s['dense_layers']} layers\n"
        f"mean density of the video {s['mean_density']:.2f}{slowest}; lists of blocks: {gb(s['list_bytes'])} "
        f"a rank, chosen every {s['lists_every']} steps" + _attention_plan_lines(own_plan)
    }


def _attention_plan_lines(plan: dict[str, Any] | None) -> str:
    """Returns the lines that show the mean densities of a plan of attention by band and layer, and its errors."""
    if plan is None:
        return ""
    bands = [
        f"steps {first} to {last}: mean density {sum(layers) / len(layers):.2f}"
        + (f", {in_fp8} heads in float8" if in_fp8 else "")
        + "; by layer "
        + " ".join(f"{density:.2f}" for density in layers)
        for (first, last), layers, in_fp8 in map(itemgetter("steps", "layers", "fp8_heads"), plan["bands"])
    ]
    errors = f"error mean {plan['mean_error']:.2g}, largest {plan['largest_error']:.2g}"
    return "\n" + "\n".join([f"plan {plan['key']}: {errors}, measured for the target {plan['target_error']:g}", *bands])


def _fp8_row(plan: dict[str, Any]) -> dict[str, str]:
    """Returns the row that shows which calls of self-attention are in float8."""
    fp8 = plan["fp8_attention"]
    if fp8 is None:
        return {}
    (step, end), (layer, last) = fp8["steps"], fp8["layers"]
    if step == end:
        return {"fp8 attention": "in no step, because the video has few steps"}
    rotated = ", with a Hadamard matrix" if fp8["hadamard"] else ""
    return {
        "fp8 attention": f"in the steps {step} to {end - 1} of {sum(plan['steps'].values())}, counted from 0, and the "
        f"layers {layer} to {last - 1}{rotated}"
    }


def _check_line(check: dict[str, Any]) -> str:
    """Returns the errors of lossy attention in one line."""
    if check["largest_at"] is None:
        return "no call was lossy"
    at = ", ".join(f"{name} {place}" for name, place in check["largest_at"].items())
    return (
        f"mean {check['mean']:.2g}, at most {check['of_95_percent']:.2g} for 95 % of the heads, largest "
        f"{check['largest']:.2g} ({at})"
    )


def _magcache_row(plan: dict[str, Any]) -> dict[str, str]:
    """Returns the row that shows how much is skipped, and strips of the steps of both experts."""
    m = plan["magcache"]
    if m is None:
        return {}
    how = "least error" if m["threshold"] is None else f"threshold {m['threshold']:g}"
    limits = (
        f"at most {m['max_skips']} in a row, first {m['retention']:.0%} of an expert's forwards computed, {m['rule']}"
    )
    curve, of = f"curve {m['curve']}", m["interpolated_from"]
    if of:
        curve += f", interpolated from {of['steps']} steps at shift {of['shift']:g}"
    share = f"{m['skipped_forwards']} of {m['total_forwards']} forwards skipped ({m['skipped_share']:.1%})"
    if m["skipped_forwards_apart"] is not None:
        share += f"; both branches skip together ({m['skipped_forwards_apart']} forwards if each skipped alone)"
    kind = "extrapolated residuals" if m["extrapolates"] else "residuals"
    stored = f"{m['residual_bytes'] / 1e9:.1f} GB of {kind} a rank"
    always = _always_computed(plan)
    legend = "(# computed, . skipped; high noise | low noise)"
    return {"magcache": "\n".join([share, *_strips(plan), legend, *always, f"{how}, {limits}; {curve}; {stored}"])}


def _always_computed(plan: dict[str, Any]) -> list[str]:
    """Says which steps skip nothing because of distilled weights or the gate of guidance."""
    distilled, at_gate = plan["magcache"]["distilled_steps"], plan["guidance_gate"] != 1
    lines = (
        [f"the last {distilled} steps are never skipped, because the curve has no ratios for them"] if distilled else []
    )
    gate = "an expert's last step with guidance and its first step without guidance are never skipped"
    return [*lines, *([gate] if at_gate else [])]


def _strips(plan: dict[str, Any]) -> list[str]:
    """Returns one character a step; one line if both branches skip alike. A blank means that guidance is off."""
    m, high, guided = plan["magcache"], plan["steps"]["high_noise"], read_guided(plan)
    prompt = "".join("#."[skip] for skip in m["skips_prompt"])
    negative = "".join(
        "#."[skip] if both else " " for skip, both in zip(m["skips_negative_prompt"], guided, strict=True)
    )
    lines = {"both branches": prompt} if prompt == negative else {"prompt": prompt, "negative prompt": negative}
    return [f"{strip[:high]}|{strip[high:]} {name}" for name, strip in lines.items() if strip.strip()]


def _ranks_row(plan: dict[str, Any]) -> dict[str, str]:
    mesh = plan["mesh"]
    if mesh == {"replica": 1, "cfg": 1, "ulysses": 1}:
        return {}
    videos = f", {mesh['replica']} videos at once" if mesh["replica"] > 1 else ""
    others = plan["unguided_mesh"]
    regrouped = f"; ulysses {others['ulysses']} in steps without guidance" if others else ""
    return {"ranks": f"cfg {mesh['cfg']} x ulysses {mesh['ulysses']} a video{videos}{regrouped}"}


def _of_line(item: Planned) -> str:
    return _of_lines([item.request.line])


def _of_lines(lines: list[int | None]) -> str:
    if lines[0] is None:
        return ""
    if len(lines) == 2:
        return f" (lines {lines[0]} and {lines[1]})"
    return f" (line {lines[0]})" if len(lines) == 1 else f" (line {lines[0]} and {len(lines) - 1} others)"


def _shown(path: str) -> str:
    """Returns a path relative to the current folder if it lies within, else unchanged."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
