"""Makes one whole video at the A14B's size without its weights, to measure memory, loading and the VAE.

    python benchmarks/whole_video.py --steps 2 --size 1280x720                       # other options go to `generate`
    python benchmarks/whole_video.py --steps 2 --size 1280x720 --expert-offload on
    python benchmarks/whole_video.py --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu   # a quick check

The files of the experts and the text encoder are holes, which read as zeros without a disk; the VAE's weights are
random. The run shows whether the video fits, what is held where and when, the best reading time from the page cache,
and the VAE's time. It does not show a step's time, because zeros cost a GPU less. `gpu_used_bytes` is the driver's
largest figure for the first GPU during the run, sampled twice a second. `vae_alone` measures the VAE in a process
without experts. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import sparse_model
from tests.parity import randomise
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine import packages
from wanfast.runtime.machine.gpus import set_environment, visible_gpus
from wanfast.runtime.machine.packages import commit
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.builders import build_vae
from wanfast.runtime.weights.key_maps import Component, rename_back

FIGURES = ("seconds", "first_step_s", "compiled_anew", "peak_memory_bytes", "loading", "hardware")
PICTURE = Path(__file__).parents[1] / "wanfast/assets/examples/cat.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers, help="of each expert and, up to 24, of UMT5")
    parser.add_argument("--folder", type=Path, help="the model's folder, written if missing; temporary by default")
    parser.add_argument("--vae-alone", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options, others = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit through the clean-up
    set_environment()  # torch reads this setting at its first use of a GPU
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:  # /tmp may be memory, which holes occupy once read
        folder = options.folder or Path(scratch) / "model"
        if not folder.exists():
            write_model(folder, options.layers)
        made = _generate(folder, Path(scratch), others) | {"layers": options.layers, "options": others}
        alone = _vae_alone(folder, made["size"]) if options.vae_alone else None
        print(json.dumps(made | {"vae_alone": alone}))


def write_model(folder: Path, layers: int) -> None:
    """Writes the model in the Diffusers layout, as `wanfast generate --model` reads it."""
    spec = dataclasses.replace(
        A14B,
        dit=dataclasses.replace(A14B.dit, num_layers=layers),
        umt5=dataclasses.replace(A14B.umt5, num_layers=min(layers, A14B.umt5.num_layers)),
    )
    with torch.device("meta"):
        expert, umt5 = WanDiT(spec.dit), UMT5Encoder(spec.umt5)
    for part in ("transformer", "transformer_2"):
        _write_holes(folder / part / "diffusion_pytorch_model.safetensors", "dit", expert)
    _write_holes(folder / "text_encoder/model.safetensors", "umt5", umt5)
    vae = WanVAE(spec.vae)
    randomise(vae, 0)
    checkpoint.save(vae, folder / "vae/diffusion_pytorch_model.safetensors", component="vae", layout="diffusers")
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY / "tokenizer/tokenizer.json", folder / "tokenizer")
    (folder / "wanfast.json").write_text(json.dumps(spec.to_json()))


def _write_holes(file: Path, component: Component, model: nn.Module) -> None:
    file.parent.mkdir(parents=True)
    state = model.state_dict().items()
    shapes = {rename_back(component, "diffusers", name): tensor.shape for name, tensor in state}
    with file.open("wb") as stream:
        sparse_model.write_holes(stream, shapes)


def _generate(folder: Path, scratch: Path, options: list[str]) -> dict[str, Any]:
    places = (f"--model={folder}", f"--image={PICTURE}", f"--artifacts-dir={scratch}", f"--output={scratch}/out.mp4")
    command = [sys.executable, "-m", "wanfast", "generate", *places, "--prompt=a cat", "--seed=1", "--json", *options]
    used = 0
    with (scratch / "printed.json").open("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        try:
            while process.poll() is None:
                used = max(used, _gpu_used_bytes())
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
        out.seek(0)
        lines = out.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(process.returncode)  # the process has printed its error
    made = json.loads(lines[-1])
    return {name: made[name] for name in FIGURES} | {
        "placement": made["plan"]["placement"],
        "size": [made["plan"][name] for name in ("width", "height", "frames")],
        "gpu_used_bytes": used,
        "commit": commit(),
        "versions": packages.versions(),
    }


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
