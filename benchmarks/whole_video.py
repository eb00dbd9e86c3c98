"""Makes whole videos at the A14B's size without its weights, through the command line.

    python benchmarks/whole_video.py --random --steps 4 --size 1280x720 --num-gpus 2   # other options go to `generate`
    python benchmarks/whole_video.py --steps 2 --size 1280x720 --expert-offload on
    python benchmarks/whole_video.py --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu          # a quick check
    python benchmarks/whole_video.py --random --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu       # another

With --random the weights are random bf16 values. Their files lie in memory if there is room: 28.6 GB for both experts,
which are one file, and 11.4 GB for UMT5. A first video is not counted: it hashes the weights, writes bytecode and fills
caches. Three commands are then measured: a prompt whose embedding is stored, a new prompt, and a list of three videos.
Each row has the wall time of the command and the leader's seconds in each stage. `outside_s` is the wall time outside
of all stages. `beyond_denoising_s` is the wall time without denoising, which hardly depends on --steps. In a list, a
video's wall time begins when the video before it is written, and ends when the video itself is written. From the second
video of a list on, `outside_s` does not leave out the stage `write`, because the video before is written meanwhile. The
summary `beyond_denoising_s` leaves out the first video of each list, because it includes the start. `end_s` is the time
from the last video to the end of the command. The VAE's last layer is scaled down, so that x264 gets smooth frames. The
image is cropped, so that a video has exactly --size. --long adds a video with more steps. --noise adds a video whose
frames are noise. Both have the stored prompt.

`step_s` has the leader's seconds of each step. `guided_step_s` and `unguided_step_s` are medians of steps with guidance
and without, and `unguided_share` is their ratio. `regrouping_s` says for each regrouping of the ranks how much longer
its step takes than the median of its kind: --guidance-gate 0.5 has steps of both kinds. The first step, which compiles,
and steps that skip a forward count in none of these.

Without --random the files of the experts and of the text encoder are holes, which read as zeros without a disk. One run
shows whether the video fits, which weights are in which memory, the shortest possible time of reading the weights (from
the page cache), and the VAE's time. It does not show the time of a step, because a GPU computes faster with zeros.
`gpu_used_bytes` is the largest amount of used memory that the driver reported for the first GPU, asked twice a second.
`vae_alone` measures the VAE without experts. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import KNOWN, PICTURE, end_by_signals, scratch_place, write_apart

from wanfast.bench.model_folder import of_layers, write_vae
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine import host
from wanfast.runtime.machine.gpus import set_environment, visible_gpus
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.planning.past_runs import forwards_in_turn
from wanfast.runtime.planning.plan_json import read_guided
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_vae

FIGURES = ("seconds", "first_step_s", "step_s", "compiled_anew", "peak_memory_bytes", "loading")
VIDEOS = 3  # of a list
KINDS = {True: "guided_step_s", False: "unguided_step_s"}  # whether a step has guidance


@dataclass
class Run:
    """Holds what one command printed, and when it started and ended."""

    documents: list[dict[str, Any]]  # one a video
    started: float
    ended: float
    gpu_used_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers",
        type=int,
        default=A14B.dit.num_layers,
        help="number of layers of each expert, and of UMT5, which has at most 24",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the model, which is written if it is missing; by default a temporary folder",
    )
    parser.add_argument("--random", action="store_true", help="use random weights, and make several videos")
    parser.add_argument(
        "--noise", action="store_true", help="with --random: also make a video of noise, slow to encode"
    )
    parser.add_argument("--long", type=int, metavar="STEPS", help="with --random: also make a video with STEPS steps")
    parser.add_argument("--rounds", type=int, default=1, help="with --random: how often the commands are measured")
    parser.add_argument(
        "--vae-alone",
        action=argparse.BooleanOptionalAction,
        help="also measure the VAE without experts; by default if there is a GPU and no --random",
    )
    options, others = parser.parse_known_args()
    end_by_signals()
    if not options.random and (options.noise or options.long or options.rounds > 1):
        parser.error("--noise, --long and --rounds need --random")
    set_environment()  # torch reads this setting at its first use of a GPU
    place = scratch_place(options)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        folder = options.folder or Path(scratch) / "model"
        started = time.perf_counter()
        if not folder.exists():
            write_apart(folder, options)
        facts = {"layers": options.layers, "options": others, "place": str(place)}
        facts |= {"write_s": round(time.perf_counter() - started, 1)}
        measure = _measure_random if options.random else _measure_holes
        facts |= measure(folder, Path(scratch), options, others)
        alone = torch.cuda.is_available() and not options.random if options.vae_alone is None else options.vae_alone
        facts |= {"vae_alone": _vae_alone(folder, facts["size"])} if alone else {}
        print(json.dumps(facts | {"commit": commit(), "versions": versions()}))


def _measure_holes(folder: Path, scratch: Path, _: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    given = [f"--prompt={KNOWN}", "--seed=1", f"--output={scratch}/out.mp4", *others]
    run = _generate(folder, scratch, given, sampled=True)
    (made,) = run.documents
    return (
        {name: made[name] for name in FIGURES} | of_steps(made) | _facts(made) | {"gpu_used_bytes": run.gpu_used_bytes}
    )


def _measure_random(folder: Path, scratch: Path, options: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    def one(prompt: str, name: str, *more: str) -> list[dict[str, Any]]:
        given = [f"--prompt={prompt}", "--seed=1", f"--output={scratch / name}.mp4", *others, *more]
        return _rows(name, _generate(folder, scratch, given))

    def listed(name: str) -> list[dict[str, Any]]:
        jobs = scratch / f"{name}.jsonl"
        videos = ({"seed": seed, "output": str(scratch / f"{name}-{seed}.mp4")} for seed in range(VIDEOS))
        jobs.write_text("".join(json.dumps(video | {"prompt": KNOWN}) + "\n" for video in videos))
        return _rows(name, _generate(folder, scratch, [f"--jobs={jobs}", *others]))

    first = _generate(folder, scratch, [f"--prompt={KNOWN}", f"--output={scratch}/first.mp4", *others])
    rows: dict[str, list[dict[str, Any]]] = {"first": _rows("first", first), "known": [], "new": [], "list": []}
    for turn in range(options.rounds):
        rows["known"] += one(KNOWN, f"known-{turn}")
        rows["new"] += one(f"a new cat, number {turn}", f"new-{turn}")
        rows["list"] += listed(f"list-{turn}")
    if options.long:
        rows["long"] = one(KNOWN, "long", f"--steps={options.long}")
    if options.noise:
        write_vae(folder, of_layers(options.layers), smoothness=1)
        one(KNOWN, "noise-first")  # hashes the new VAE
        rows["noise"] = one(KNOWN, "noise")
    counted = {name: found for name, found in rows.items() if name not in ("first", "list")}
    counted |= {"list": [row for index, row in enumerate(rows["list"]) if index % VIDEOS]}
    beyond = {name: _spread([row["beyond_denoising_s"] for row in found]) for name, found in counted.items()}
    facts = {"rounds": options.rounds} | _facts(first.documents[0])
    return facts | {"beyond_denoising_s": beyond, "videos": rows}


def _facts(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "placement": made["plan"]["placement"],
        "size": [made["plan"][name] for name in ("width", "height", "frames")],
        "hardware": made["hardware"] | {"gpus": len(visible_gpus()), "cores": host.cores()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    spread = max(values) - min(values)
    return {"median": round(statistics.median(values), 3), "spread": round(spread, 3), "of": len(values)}


def _rows(name: str, run: Run) -> list[dict[str, Any]]:
    """Returns the figures of each video of one command; the first one has its start, and an only one its end."""
    written = [Path(made["plan"]["outputs"][1]).stat().st_mtime for made in run.documents]
    begins, ends = [run.started, *written], written if len(written) > 1 else [run.ended]
    rows = []
    for made, begun, ended in zip(run.documents, begins, ends, strict=False):
        stages = {stage: value for stage, value in made["seconds"].items() if stage != "total"}
        wall, own = ended - begun, {stage: value for stage, value in stages.items() if stage != "write" or not rows}
        row = {"wall_s": wall, "outside_s": wall - sum(own.values()), "beyond_denoising_s": wall - stages["denoise"]}
        steps = of_steps(made)
        rows.append({key: round(value, 3) for key, value in row.items()} | {name: made[name] for name in FIGURES})
        rows[-1] |= steps
        print(f"{name:12}", row | stages | steps, file=sys.stderr, flush=True)
    rows[-1]["end_s"] = round(run.ended - written[-1], 3)
    return rows


def of_steps(made: dict[str, Any]) -> dict[str, Any]:
    """Returns the medians of steps with guidance and without, and what each regrouping of the ranks adds to its step.

    `made`: the JSON document of a video. A figure for which no step was measured is missing.
    """
    plan, clips = made["plan"], made["plan"]["clips"]
    guided, turns = read_guided(plan) * clips, forwards_in_turn(plan)
    whole = {
        kind: max((each for each, of in zip(turns, guided, strict=True) if of == kind), default=0) for kind in KINDS
    }
    regroups = [
        index for index in range(1, len(guided)) if plan["unguided_mesh"] and guided[index] != guided[index - 1]
    ]
    counted = [index for index in range(1, len(guided)) if turns[index] == whole[guided[index]]]
    found: dict[str, Any] = {}
    for kind, name in KINDS.items():
        steps = [made["step_s"][index] for index in counted if guided[index] == kind and index not in regroups]
        found |= {name: round(statistics.median(steps), 4)} if steps else {}
    if len(found) == len(KINDS):
        found["unguided_share"] = round(found[KINDS[False]] / found[KINDS[True]], 4)
    added = [
        round(made["step_s"][index] - found[KINDS[guided[index]]], 4)
        for index in regroups
        if index in counted and KINDS[guided[index]] in found
    ]
    return found | ({"regrouping_s": added} if added else {})


def _generate(folder: Path, scratch: Path, given: list[str], *, sampled: bool = False) -> Run:
    """Runs the command with bytecode in the scratch folder, as a machine that may write it would have it."""
    places = (f"--model={folder}", f"--image={PICTURE}", f"--artifacts-dir={scratch}/artifacts")
    command = [sys.executable, "-m", "wanfast", "generate", *places, "--fit=crop", "--json", *given]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")
    used = 0
    with (scratch / "printed.json").open("w+") as out:
        started = time.time()
        process = subprocess.Popen(command, stdout=out, env=environment)
        try:
            while process.returncode is None:
                used = max(used, _gpu_used_bytes()) if sampled else 0
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5 if sampled else None)
            ended = time.time()
        finally:
            process.terminate()
            process.wait()
        out.seek(0)
        lines = out.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(process.returncode)  # the process has printed its error
    printed = json.loads(lines[-1])
    return Run(printed.get("results", [printed]), started, ended, used)


@torch.inference_mode()
def _vae_alone(folder: Path, size: list[int]) -> dict[str, dict[str, float]]:
    """Returns the seconds of two calls, after one that starts cuDNN, and torch's peak memory.

    The peaks (held and reserved) exclude weights and input.
    """
    files = model_files.locate(str(folder), "")
    hardware.prepare("cuda", "bf16", None)
    vae, (width, height, frames) = build_vae(files, "cuda"), size
    clip = torch.randn(1, 3, frames, height, width, device="cuda").clamp_(-1, 1)
    latent, found = vae.encode(clip), {}
    vae.decode(latent)
    for name, work, x in (("encode", vae.encode, clip), ("decode", vae.decode, latent)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        watch = Stopwatch("cuda")
        for span in ("first", "second"):
            with watch.span(span):
                work(x)
        found[name] = watch.seconds | {
            "held_bytes": torch.cuda.max_memory_allocated() - held,
            "reserved_bytes": torch.cuda.max_memory_reserved() - reserved,
        }
    return found


def _gpu_used_bytes() -> int:
    """Returns the used memory of the first GPU; 0 without a GPU."""
    return sum(gpu.total_bytes - gpu.free_bytes for gpu in visible_gpus()[:1])


if __name__ == "__main__":
    main()
