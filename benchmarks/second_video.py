"""Times the videos of one handle at the A14B's size: the first one starts the ranks and loads, the later ones do not.

    python benchmarks/second_video.py --videos 2 --steps 2 --size 1280x720
    python benchmarks/second_video.py --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu   # a quick check

The files of the experts and of the text encoder are holes, which read as zeros, as in `whole_video.py`. So the figures
are true for loading, memory, the start and the end of a video, but not for the time of a step. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import wanfast
from wanfast.bench.model_folder import of_layers, write_model
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine.packages import commit, versions

PICTURE = Path(__file__).parents[1] / "wanfast/assets/examples/cat.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers",
        type=int,
        default=A14B.dit.num_layers,
        help="number of layers of each expert, and of UMT5, which has at most 24",
    )
    parser.add_argument("--videos", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-gpus", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:  # /tmp may be memory, which holes occupy once read
        write_model(Path(scratch) / "model", of_layers(options.layers))
        print(json.dumps(_measure(Path(scratch), options)))


def _measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    largest = {"size": options.size, "frames": options.frames}
    placed = {"device": options.device, "num_gpus": options.num_gpus, "artifacts_dir": scratch / "artifacts"}
    videos = []
    started = time.perf_counter()
    with wanfast.open(model=scratch / "model", **placed, **largest) as handle:
        for seed in range(options.videos):
            video = handle.make(image=PICTURE, prompt=f"cat {seed}", seed=seed, steps=options.steps, **largest)
            facts = {name: video.document[name] for name in ("seconds", "loading", "peak_memory_bytes")}
            ended = time.perf_counter()
            videos.append({"waited_s": round(ended - started, 3), "frames": video.frames.shape, **facts})
            print(videos[-1], file=sys.stderr)
            started = time.perf_counter()
    known = {"hardware": video.document["hardware"], "versions": versions(), "commit": commit()}
    asked = {"layers": options.layers, **largest, "steps": options.steps, "placement": video.plan["placement"]}
    return {**asked, **known, "videos": videos, "close_s": round(time.perf_counter() - started, 3)}


if __name__ == "__main__":
    main()
