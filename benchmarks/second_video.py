"""Times the videos of one handle at the A14B's size: the first one starts the ranks and loads, the later ones do not.

    python benchmarks/second_video.py --videos 2 --steps 2 --size 1280x720
    python benchmarks/second_video.py --lora --videos 4 --steps 2 --size 1280x720       # with other LoRAs, and the same
    python benchmarks/second_video.py --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu   # a quick check
    python benchmarks/second_video.py --model tiny --lora --steps 2 --size 64x64 --frames 5 --device cpu   # another

The files of the experts and of the text encoder are holes, which read as zeros, as in `whole_video.py`. So the figures
are true for loading, memory, the start and the end of a video, but not for the time of a step. `loading` holds the
seconds and the bytes of each model that a video loaded. `disk_bytes` counts what the ranks read from a disk: bytes from
the page cache do not count.
With --lora, each video has one of two LoRA files of rank 64, which change all linears of both experts. Two videos have
the first file, the next two have the second one, and so on. `another_set` compares videos that have other LoRAs than
the video before with videos that have the same LoRAs. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import wanfast
from tests import lora_files
from wanfast.bench.model_folder import of_layers, write_model
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.store import model_files

RANK = 64  # as published pairs have
PICTURE = Path(__file__).parents[1] / "wanfast/assets/examples/cat.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers",
        type=int,
        default=A14B.dit.num_layers,
        help="number of layers of each expert, and of UMT5, which has at most 24",
    )
    parser.add_argument("--model", help="a model with its own weights, such as tiny, instead of holes")
    parser.add_argument("--lora", action="store_true", help="give each video one of two LoRAs; needs 3 videos or more")
    parser.add_argument("--videos", type=int, help="number of videos  [default: 2, with --lora 4]")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-gpus", type=int, default=1)
    options = parser.parse_args()
    options.videos = options.videos or (4 if options.lora else 2)
    if options.lora and options.videos < 3:
        parser.error("--lora needs --videos 3 or more")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:  # /tmp may be memory, which holes occupy once read
        if options.model is None:
            options.model = str(Path(scratch) / "model")
            write_model(Path(options.model), of_layers(options.layers))
        print(json.dumps(_measure(Path(scratch), options)))


def _measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    largest = {"size": options.size, "frames": options.frames}
    artifacts = scratch / "artifacts"
    placed = {"device": options.device, "num_gpus": options.num_gpus, "artifacts_dir": artifacts}
    spec = model_files.locate(options.model, str(artifacts)).spec.dit
    loras = _write_loras(scratch, spec) if options.lora else []
    videos: list[dict[str, Any]] = []
    started = time.perf_counter()
    with wanfast.open(model=options.model, **placed, **largest) as handle:
        for number in range(options.videos):
            lora = [loras[number // 2 % 2]] if loras else []
            given = {"lora": list(map(str, lora))} if lora else {}
            before = _disk_bytes(artifacts)
            video = handle.make(
                image=PICTURE,
                prompt=f"cat {0 if loras else number}",
                seed=number,
                steps=options.steps,
                **largest,
                **given,
            )
            facts = {name: video.document[name] for name in ("seconds", "loading", "peak_memory_bytes")}
            facts |= {"disk_bytes": _disk_bytes(artifacts) - before, "lora": [file.name for file in lora]}
            ended = time.perf_counter()
            videos.append({"waited_s": round(ended - started, 3), "frames": video.frames.shape, **facts})
            print(videos[-1], file=sys.stderr)
            started = time.perf_counter()
    known = {"hardware": video.document["hardware"], "versions": versions(), "commit": commit()}
    asked = {"layers": spec.num_layers, **largest, "steps": options.steps, "placement": video.plan["placement"]}
    compared = {"another_set": _another_set(videos)} if loras else {}
    return {**asked, **known, **compared, "videos": videos, "close_s": round(time.perf_counter() - started, 3)}


def _write_loras(folder: Path, spec: DiTSpec) -> list[Path]:
    """Writes two LoRA files for all linears of the blocks, and returns their paths."""
    files = []
    for name in ("one", "two"):
        tensors = {}
        for module, shape in lora_files.of_blocks(spec).items():
            down, up = lora_files.factors(shape, min(RANK, *shape))
            tensors |= {
                f"diffusion_model.{module}.lora_down.weight": down.bfloat16(),
                f"diffusion_model.{module}.lora_up.weight": up.bfloat16() / RANK,
            }
        files.append(lora_files.write(folder / f"{name}.safetensors", tensors))
    return files


def _another_set(videos: list[dict[str, Any]]) -> dict[str, float]:
    """Returns what another LoRA set in the session costs: the median seconds, and the bytes that are read again."""
    pairs = list(itertools.pairwise(videos))
    same, other = ([new for old, new in pairs if (old["lora"] == new["lora"]) == kind] for kind in (True, False))
    experts = [{name: new["loading"].get(name, {}) for name in EXPERTS} for new in other]
    waited = [statistics.median(each["waited_s"] for each in found) for found in (same, other)]
    return {
        "same_s": round(waited[0], 3),
        "other_s": round(waited[1], 3),
        "difference_s": round(waited[1] - waited[0], 3),
        "load_s": round(statistics.median(each["seconds"]["load"] for each in other), 3),
        "read_bytes": max(sum(each.get("bytes", 0) for each in found.values()) for found in experts),
        "disk_bytes": max(new["disk_bytes"] for new in other),
    }


def _disk_bytes(artifacts: Path) -> int:
    """Returns the bytes that the ranks have read from disks since they started."""
    found = 0
    for file in artifacts.glob("runs/*/ranks/*/pid"):
        lines = Path("/proc", file.read_text().strip(), "io").read_text().splitlines()
        found += sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    return found


if __name__ == "__main__":
    main()
