"""Trains the tiny model, all stages or one stage at a time.

until python -m training --folder runs/tiny; do :; done     # all stages, in calls of about eight minutes on one GPU
python -m training --folder runs/tiny --stage vae --minutes 8
python -m training --folder runs/tiny --stage decoder --minutes 8
python -m training --folder runs/tiny --stage experts --minutes 8
python -m training --folder runs/tiny --stage export        # the model folder, FOLDER/tiny
python -m training --folder /tmp/try --smoke                # every stage with toy sizes, on a CPU
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch

from training import train_experts, train_vae
from training.export import export
from training.loop import Schedule, load_ema, make_deterministic, steps_made
from training.spec import SPEC
from wanfast.quality.world import Renderer
from wanfast.runtime.facts.model_spec import ModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and logs")
    parser.add_argument("--stage", choices=["vae", "decoder", "experts", "export", "all"], default="all")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of this call, all stages; 8 by default")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--decoder-steps", type=int, default=400)
    parser.add_argument("--expert-steps", type=int, default=16000)
    parser.add_argument("--clips", type=int, default=32000, help="encoded clips that the experts learn from")
    parser.add_argument("--batch", type=int, default=96, help="clips per step for each expert")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to check that every stage runs")
    options = parser.parse_args()
    if options.smoke:
        options.vae_steps, options.decoder_steps, options.expert_steps, options.clips, options.batch = 4, 4, 4, 4, 2
    options.deadline = monotonic() + options.minutes * 60
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_deterministic()
    stages = ["vae", "decoder", "experts", "export"] if options.stage == "all" else [options.stage]
    for stage in stages:
        for before in _NEEDED[stage]:
            if steps_made(options.folder / f"{before}.pt") < vars(options)[_STEPS[before]]:
                sys.exit(f"--stage {stage} needs the finished --stage {before}: run --stage {before} first")
        fit = {"vae": fit_vae, "decoder": fit_decoder, "experts": fit_experts, "export": write}[stage]
        if not fit(options, device):
            sys.exit(f"--stage {stage} is not finished: run the same command again")


_STEPS = {"vae": "vae_steps", "decoder": "decoder_steps", "experts": "expert_steps"}
_NEEDED: dict[str, tuple[str, ...]] = {
    "vae": (),
    "decoder": ("vae",),
    "experts": ("vae",),
    "export": ("vae", "decoder", "experts"),
}


def fit_vae(options: argparse.Namespace, device: str) -> bool:
    schedule = Schedule(steps=options.vae_steps, learning_rate=1e-3, deadline=options.deadline)
    batch = 2 if options.smoke else 32
    if not train_vae.fit(SPEC.vae, schedule, options.folder, device, batch=batch, side=64, frames=9):
        return False
    if (options.folder / "vae.json").exists():
        return True
    measured = train_vae.measure_latents(
        train_vae.load(SPEC.vae, options.folder, device), Renderer(device), clips=8 if options.smoke else 256
    )
    facts = {"latents_mean": measured.latents_mean, "latents_std": measured.latents_std}
    (options.folder / "vae.json").write_text(json.dumps(facts) + "\n")
    return True


def fit_decoder(options: argparse.Namespace, device: str) -> bool:
    schedule = Schedule(
        steps=options.decoder_steps, learning_rate=2e-4, deadline=options.deadline, warmup=20, log_every=10
    )
    was_done = steps_made(options.folder / "decoder.pt") >= options.decoder_steps
    if was_done or not train_vae.fit_decoder(SPEC.vae, schedule, options.folder, device, batch=4, side=64):
        return was_done
    vae = train_vae.load(SPEC.vae, options.folder, device)
    psnr = train_vae.held_out_psnr(vae, Renderer(device), clips=2 if options.smoke else 64)
    print(f"vae: held-out PSNR {psnr:.2f} dB", flush=True)
    return True


def measured_spec(folder: Path) -> ModelSpec:
    """Returns the spec with the latent statistics of the trained VAE."""
    facts = json.loads((folder / "vae.json").read_text())
    statistics = {key: tuple(facts[key]) for key in ("latents_mean", "latents_std")}
    return replace(SPEC, vae=replace(SPEC.vae, **statistics))


def fit_experts(options: argparse.Namespace, device: str) -> bool:
    spec = measured_spec(options.folder)
    vae = train_vae.load(spec.vae, options.folder, device)
    vae.spec = spec.vae
    inputs = b"".join((options.folder / name).read_bytes() for name in ("vae.pt", "vae.json"))
    digest = hashlib.sha256(inputs).hexdigest()[:12]
    stored = options.folder / f"clips-{options.clips}-{digest}.pt"
    if stored.exists():
        clips = train_experts.Clips(**torch.load(stored, map_location=device, weights_only=True))
    else:
        clips = train_experts.encode_clips(vae, Renderer(device), options.clips)
        torch.save(vars(clips), stored.with_suffix(".partial"))
        stored.with_suffix(".partial").replace(stored)
    print(f"experts: {len(clips.z)} clips, latents {list(clips.z.shape[1:])}", flush=True)
    schedule = Schedule(steps=options.expert_steps, learning_rate=1e-3, deadline=options.deadline, ema=0.9995)
    return train_experts.fit(spec, clips, schedule, options.folder, device, options.batch)


def write(options: argparse.Namespace, device: str) -> bool:
    spec = measured_spec(options.folder)
    model = train_experts.TinyModel(spec).to(device)
    load_ema(model, options.folder / "experts.pt")
    export(spec, model, train_vae.load(spec.vae, options.folder, device), options.folder / "tiny")
    return True


if __name__ == "__main__":
    main()
