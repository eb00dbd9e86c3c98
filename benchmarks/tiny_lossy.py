"""Measures two lossy steps on the tiny model, and prints one JSON document.

    python benchmarks/tiny_lossy.py --output benchmarks/results/tiny-lossy.json      # two minutes on two cores

The first step is float8 attention without its Hadamard matrix. Attention is emulated: one video of the example star is
made with the matrix and one without, and `--attention-check` measures the mean relative error of a head. The document
has only the quotient of the two errors, because `make tiny-attention` measures the errors themselves.
The second step is the decoder in bf16. It decodes the latents of noise in bf16 and in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from wanfast.quality.metrics import psnr
from wanfast.runtime.engine.conditioning import given_clip
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_vae

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "wanfast/assets/examples"
VIDEO = (
    "--size",
    "192x192",
    "--frames",
    "33",
    "--steps",
    "8",
    "--seed",
    "1",
    "--attention",
    "fa3-fp8",
    "--attention-check",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    document = {
        "error_without_hadamard": round(error_of_a_head("--no-fp8-hadamard") / error_of_a_head("--fp8-hadamard"), 2),
        "decoder_bf16_psnr": round(decoder_psnr(), 2),
        "commit": commit(),
        "versions": versions(),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def error_of_a_head(*options: str) -> float:
    """Returns the mean relative error of a head in float8, over the whole video of the first example."""
    job = json.loads((EXAMPLES / "jobs.jsonl").read_text().splitlines()[0])
    asked = ("--model", "tiny", "--device", "cpu", "--image", str(EXAMPLES / job["image"]), "--prompt", job["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        files = ("--output", f"{folder}/video.mp4", "--artifacts-dir", f"{folder}/artifacts", "--json")
        command = [sys.executable, "-m", "wanfast", "generate", *asked, *VIDEO, *options, *files]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    document: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return float(document["attention_check"]["mean"])


@torch.inference_mode()
def decoder_psnr() -> float:
    """Returns the PSNR of a clip that is decoded in bf16 to the same clip in float32."""
    files = model_files.locate("tiny", "artifacts")
    exact, half = build_vae(files, "cpu"), build_vae(files, "cpu", "bf16")
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = exact.encode(given_clip(image, files.spec.frames))
    return psnr(half.decode(latents)[0], exact.decode(latents)[0])


if __name__ == "__main__":
    main()
