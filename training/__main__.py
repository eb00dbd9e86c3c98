"""Trains the tiny model, all stages or one stage at a time, after `python -m training.photographs`.

while python -m training --folder runs/tiny; test $? = 75; do :; done   # all stages, in calls of about eight minutes
python -m training --folder runs/tiny --stage vae-short vae-long   # repeat each command while it returns 75
python -m training --folder runs/tiny --stage experts             # clips are encoded first, then the experts learn
python -m training --folder runs/tiny --stage vae-decoder         # the decoder again; latents and experts stay valid
python -m training --folder runs/tiny --stage export              # the model folder, FOLDER/tiny
python -m training --folder runs/tiny --stage lora          # a LoRA of each expert for four steps, FOLDER/tiny/loras
python -m training --folder /tmp/try --smoke                # every stage with toy sizes, on a CPU

Stages may run on different machines. `experts`, `vae-decoder` and `export` need only FOLDER/vae-finished.pt of the
VAE's first stages, `export` also needs the checkpoints of the experts, and `lora` needs only FOLDER/tiny.
With two GPUs, each expert can learn alone: `--start DIR --learning high_noise` on one GPU and `low_noise` on the other.
README.md beside this file plans the runs on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from training import clips, train_experts, train_lora, train_vae
from training.clips import FOR_VAE, Mix
from training.export import export
from training.loop import Schedule, load_ema, prepare_torch, save, steps_made
from training.photographs import PACK
from training.spec import SPEC
from training.train_experts import STAGE as EXPERT_STAGE
from training.train_experts import Clips, Kind, TinyModel, expert_of
from training.train_lora import STAGE as LORA_STAGE
from training.train_lora import Paths
from training.train_vae import DECODER_STAGE, LONG_STAGE, SHORT_STAGE, Windows
from wanfast.quality.world import camera_scene, draw_scene
from wanfast.runtime.facts.choices import EXPERTS, Expert
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.builders import build_vae

STAGES = (SHORT_STAGE, LONG_STAGE, EXPERT_STAGE, DECODER_STAGE, "export", LORA_STAGE)
_STEPS = {
    SHORT_STAGE: "short_steps",
    LONG_STAGE: "long_steps",
    EXPERT_STAGE: "expert_steps",
    DECODER_STAGE: "decoder_steps",
    LORA_STAGE: "lora_steps",
}


_UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h; a fault ends with 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of checkpoints, logs and the model")
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=STAGES, help="stages to run; by default all, in this order"
    )
    parser.add_argument("--photographs", type=Path, default=PACK, help=f"zip file of photographs; {PACK} by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of this call, in minutes; 8 by default")
    parser.add_argument("--short-steps", type=int, default=12_500)
    parser.add_argument("--long-steps", type=int, default=18_000)
    parser.add_argument("--expert-steps", type=int, default=30_000)
    parser.add_argument("--decoder-steps", type=int, default=9_000)
    parser.add_argument("--lora-steps", type=int, default=12_000)
    parser.add_argument(
        "--start", type=Path, help="model folder, or tiny: the stage experts trains its experts further, on its VAE"
    )
    parser.add_argument(
        "--learning", choices=EXPERTS, help="with --start, the only expert that the stage experts trains, without UMT5"
    )
    parser.add_argument(
        "--encode",
        type=int,
        nargs="+",
        help="the stages experts and lora only make clips or paths of these formats, and end",
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to check that every stage runs")
    options = parser.parse_args()
    if options.learning and not options.start:
        parser.error("--learning needs --start: new experts and UMT5 learn together")
    if set(options.stage) != {"export"} and not options.photographs.exists():
        parser.error(f"--photographs {options.photographs} does not exist: run python -m training.photographs")
    if options.smoke:
        for name in _STEPS.values():
            setattr(options, name, 4)
    options.deadline = monotonic() + options.minutes * 60
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_torch()
    if options.start and not (options.folder / train_vae.FINISHED).exists():
        train_vae.take(started(options), options.folder)
    stages = dict.fromkeys((SHORT_STAGE, LONG_STAGE, DECODER_STAGE), fit_vae)
    stages |= {EXPERT_STAGE: fit_experts, "export": write, LORA_STAGE: fit_lora}
    for stage in sorted(options.stage, key=STAGES.index):
        missing = missing_stage(stage, options)
        if missing:
            sys.exit(f"--stage {stage} needs the finished --stage {missing}: run --stage {missing} first")
        if not stages[stage](stage, options):
            print(f"--stage {stage} is not finished: run the same command again", file=sys.stderr)
            sys.exit(_UNFINISHED)


def missing_stage(stage: str, options: argparse.Namespace) -> str | None:
    """Returns the name of a stage that must be finished before `stage`, or None if nothing is missing."""
    folder = options.folder
    if stage == LONG_STAGE and not is_made(SHORT_STAGE, options):
        return SHORT_STAGE
    if stage in (EXPERT_STAGE, DECODER_STAGE, "export") and not (folder / train_vae.FINISHED).exists():
        return LONG_STAGE if is_made(SHORT_STAGE, options) else SHORT_STAGE
    if stage == LORA_STAGE:
        return None if (folder / "tiny").exists() else "export"
    return EXPERT_STAGE if stage == "export" and not is_made(EXPERT_STAGE, options) else None


def is_made(stage: str, options: argparse.Namespace) -> bool:
    if stage == EXPERT_STAGE:
        files = list(expert_checkpoints(options.folder).values())
        if options.learning:
            files = [options.folder / f"{train_experts.checkpoint_name(options.learning)}.pt"]
        return all(steps_made(file) >= options.expert_steps for file in files)
    finished, own = options.folder / train_vae.FINISHED, options.folder / f"{stage}.pt"
    if stage in (SHORT_STAGE, LONG_STAGE) and finished.exists():
        return True
    if stage == LONG_STAGE or (stage == DECODER_STAGE and own.exists() and is_newer(own, finished)):
        return False  # interrupted between the last step and the writing of the finished file
    return steps_made(own) >= vars(options)[_STEPS[stage]]


def expert_checkpoints(folder: Path) -> dict[Expert, Path]:
    """Returns the checkpoint of each expert: its own one if it learned alone, or that of the other, or that of both.

    The checkpoint of an expert that learned alone holds the other one as it was at the start.
    """
    own: dict[Expert | None, Path] = {
        name: folder / f"{train_experts.checkpoint_name(name)}.pt" for name in (*EXPERTS, None)
    }
    made = [name for name in (*EXPERTS, None) if own[name].exists()] or [None]
    return {expert: own[expert] if expert in made else own[made[0]] for expert in EXPERTS}


def is_newer(file: Path, other: Path) -> bool:
    return file.stat().st_mtime_ns > other.stat().st_mtime_ns


def fit_vae(stage: str, options: argparse.Namespace) -> bool:
    if is_made(stage, options):
        return True
    if stage == SHORT_STAGE:  # its rates do not decay, because the next stage continues it
        schedule = Schedule(steps=options.short_steps, muon_rate=5e-3, decay=0.0, deadline=options.deadline)
        kinds = train_vae.SHORT
    elif stage == DECODER_STAGE:
        schedule = Schedule(
            steps=options.decoder_steps, muon_rate=2e-3, adam_rate=4e-4, decay=1.0, deadline=options.deadline
        )
        kinds = train_vae.DECODER
    else:
        schedule = Schedule(steps=options.long_steps, muon_rate=4e-3, adam_rate=8e-4, deadline=options.deadline)
        kinds = train_vae.LONG
    kinds = train_vae.TOY if options.smoke else kinds
    pools = rendered(stage, kinds, options)
    if pools is None or not train_vae.fit(SPEC.vae, pools, schedule, options.folder, kinds, stage):
        return False
    if stage == LONG_STAGE:
        mix = Mix(options.photographs, options.device)  # the statistics are of the latents that the experts learn
        train_vae.finish(SPEC.vae, mix, options.folder, clips=2 if options.smoke else 256)
    if stage == DECODER_STAGE:
        train_vae.finish_decoder(options.folder)
    if stage != SHORT_STAGE:
        report(train_vae.load(SPEC.vae, options.folder, options.device), options)
    return True


def rendered(stage: str, kinds: Sequence[Windows], options: argparse.Namespace) -> list[Tensor] | None:
    """Returns the windows of all kinds, from files if they exist; None if the deadline passes before all are made."""
    mix = Mix(options.photographs, options.device, FOR_VAE)
    options.folder.mkdir(parents=True, exist_ok=True)

    return stored(
        {
            f"{stage}-windows-{number}.pt": partial(train_vae.render, mix, kind, 10_000_000 * (number + 1))
            for number, kind in enumerate(kinds)
        },
        options,
    )


def stored(makers: Mapping[str, Callable[[], Any]], options: argparse.Namespace) -> list[Any] | None:
    """Returns the contents of files, one for each {name: function that makes the contents of a missing file}.

    Returns None if `options.deadline` passes before the last file is read. Files that were made stay for the next call.
    """
    found = []
    for name, make in makers.items():
        if monotonic() > options.deadline:
            return None
        file = options.folder / name
        if not file.exists():
            save(make(), file)
        found.append(torch.load(file, map_location=options.device, weights_only=True))
    return found


def report(vae: WanVAE, options: argparse.Namespace) -> None:
    """Prints the VAE's PSNR on held-out clips: shapes over patterns, and photographs under a camera."""
    held_out = Mix(options.photographs, options.device, held_out=True)
    count = 1 if options.smoke else 32
    for form in (clips.SMALL[0],) if options.smoke else (clips.SMALL[0], clips.LARGE[0]):
        shapes = [draw_scene(k, held_out=True) for k in range(count)]
        photographs = [camera_scene(k, held_out.photographs, form.size) for k in range(count)]
        for name, scenes in (("shapes", shapes), ("photographs", photographs)):
            value = train_vae.psnr(vae, held_out, scenes, form)
            print(f"vae: {name} at {form.size[0]} pixels, held-out PSNR {value:.2f} dB", flush=True)


def measured_spec(folder: Path) -> ModelSpec:
    """Returns the spec of the tiny model, with the mean and deviation of the finished VAE's latents."""
    return replace(SPEC, vae=train_vae.finished(SPEC.vae, folder))


def fit_experts(_stage: str, options: argparse.Namespace) -> bool:
    if options.expert_steps and not options.encode and is_made(EXPERT_STAGE, options):
        return True  # their clips may be of the encoder before `vae-decoder` wrote the file again
    spec = measured_spec(options.folder)
    kinds = train_experts.TOY if options.smoke else train_experts.KINDS
    order = range(len(kinds)) if options.smoke else train_experts.ORDER
    sets = encoded_sets(spec, kinds, options)
    if options.encode or sets is None:
        return sets is not None
    schedule = Schedule(
        steps=options.expert_steps,
        muon_rate=0.02,
        weight_decay=0.05,
        deadline=options.deadline,
        decay=1.0 if options.start else 0.5,
        ema=0.9995,
    )
    batches = [kind.batch for kind in kinds]
    start = started(options) if options.start else None
    return train_experts.fit(
        spec,
        sets,
        schedule,
        options.folder,
        options.device,
        batches,
        order,
        start=start,
        learning=options.learning,
    )


def started(options: argparse.Namespace) -> ModelFiles:
    return model_files.locate(str(options.start), "artifacts")


def _further(start: ModelFiles) -> int:
    """Returns a number of scenes to skip: experts that learn on get other clips than those that they have seen."""
    number = int(hashlib.sha256(json.dumps(start.fingerprints, sort_keys=True).encode()).hexdigest(), 16)
    return 1_000_000 + number % 150 * 20_000  # no kind has so many clips


def chosen(kinds: Sequence[Kind], options: argparse.Namespace) -> dict[int, Kind]:
    """Returns the kinds of which this call makes clips or paths, by their numbers: those of --encode, or all."""
    unknown = set(options.encode or ()) - set(range(len(kinds)))
    if unknown and not options.smoke:  # which has only two formats
        sys.exit(f"--encode {min(unknown)}: this stage has the formats 0 to {len(kinds) - 1}")
    return {number: kind for number, kind in enumerate(kinds) if not options.encode or number in options.encode}


def encoded_sets(spec: ModelSpec, kinds: Sequence[Kind], options: argparse.Namespace) -> list[Clips] | None:
    """Returns the encoded clips of the `chosen` kinds, from files if they exist.

    Returns None if the deadline passes before all are made.
    """
    vae = train_vae.load(spec.vae, options.folder, options.device)
    vae.spec = spec.vae
    made_of = (options.folder / train_vae.FINISHED).read_bytes() + clips.MIX.encode()
    digest = hashlib.sha256(made_of).hexdigest()[:12]
    mix = Mix(options.photographs, options.device)
    further = _further(started(options)) if options.start else 0
    first = {10_000_000 * (number + 1) + further: kind for number, kind in chosen(kinds, options).items()}

    def make(number: int, kind: Kind) -> dict[str, Tensor]:
        return vars(train_experts.encode_clips(vae, mix, kind, number))

    sets = stored(
        {f"clips-{number}-{kind.clips}-{digest}.pt": partial(make, number, kind) for number, kind in first.items()},
        options,
    )
    for kind, each in zip(first.values(), sets or (), strict=False):
        print(f"experts: {kind.clips} clips, latents {list(each['z'].shape[1:])}", flush=True)
    return sets and [Clips(**each) for each in sets]


def write(_stage: str, options: argparse.Namespace) -> bool:
    spec = measured_spec(options.folder)
    model, texts = TinyModel(spec).to(options.device), list[UMT5Encoder]()
    for expert, file in expert_checkpoints(options.folder).items():
        trained = TinyModel(spec).to(options.device)
        load_ema(trained, file)
        expert_of(model, expert).load_state_dict(expert_of(trained, expert).state_dict())
        texts.append(trained.umt5)
    if any(not torch.equal(*pair) for pair in zip(*(text.parameters() for text in texts), strict=True)):
        sys.exit("the experts learned with different text encoders: train both with the same --start, or both together")
    model.umt5 = texts[0]
    export(spec, model, train_vae.load(spec.vae, options.folder, options.device), options.folder / "tiny")
    return True


def fit_lora(_stage: str, options: argparse.Namespace) -> bool:
    files = model_files.locate(str(options.folder / "tiny"), "artifacts")
    model = train_experts.trained(files).to(options.device)
    kinds = train_experts.TOY if options.smoke else train_lora.KINDS
    sets = paths_of(files, model, kinds, options)
    schedule = Schedule(steps=options.lora_steps, muon_rate=5e-3, deadline=options.deadline, ema=0.9995)
    if options.encode or sets is None:
        return sets is not None
    if not train_lora.fit(model, sets, schedule, options.folder, [kind.batch for kind in kinds]):
        return False
    train_lora.export(model, options.folder, options.folder / "tiny/loras" / train_lora.RECIPE)
    return True


def paths_of(
    files: ModelFiles, model: TinyModel, kinds: Sequence[Kind], options: argparse.Namespace
) -> list[Paths] | None:
    """Returns the teacher's paths of the `chosen` kinds, from files if they exist.

    Returns None if the deadline passes before all are made.
    """
    vae, mix = build_vae(files, options.device), Mix(options.photographs, options.device)

    def make(number: int, kind: Kind) -> dict[str, Tensor]:
        clips = train_experts.encode_clips(vae, mix, kind, 10_000_000 * (number + 1) + 5_000_000)
        return vars(train_lora.paths(model, clips, kind.batch, number))

    wanted = chosen(kinds, options)
    sets = stored({f"lora-paths-{number}.pt": partial(make, number, kind) for number, kind in wanted.items()}, options)
    return sets and [Paths(**each) for each in sets]


if __name__ == "__main__":
    main()
