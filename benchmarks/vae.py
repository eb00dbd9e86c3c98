"""Times the VAE at the A14B's size: encoding of an image's clip in TF32, and decoding in TF32 and in bf16.

    python benchmarks/vae.py                                # 1280x720, 81 frames, on one GPU
    git show COMMIT:wanfast/runtime/models/vae.py > before.py
    python benchmarks/vae.py --before before.py             # an older VAE in turn with ours
    python benchmarks/vae.py --ranks 2                      # on two GPUs that share the rows of each frame
    python benchmarks/vae.py --profile                      # the kernels that take the time
    python benchmarks/vae.py --size 64x64 --frames 9 --device cpu   # a quick check

Weights and image are random. All measurements run in turn, and medians are reported. With one GPU, the document also
has the PSNR of each decoded video, compared with a video that is decoded in strict float32. With several GPUs, it has
the relative error against one rank instead. The peak memory is beyond weights and input. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from in_turn import medians
from spawned import on_ranks
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.quality.metrics import psnr
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import synchronize
from wanfast.runtime.distributed.ranks import rank_group
from wanfast.runtime.engine.conditioning import given_clip
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models import convolution
from wanfast.runtime.models.vae import WanVAE

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--before", type=Path, help="vae.py of an older commit, which is timed in turn with the present one"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.ranks > 1:
        on_ranks(measure_shared, options)
        return
    hardware.prepare(options.device, "bf16", None)
    with torch.inference_mode():
        print(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document of the measurements on one device."""
    device = options.device
    clip = _clip(options)
    vaes = {kind: _vae(WanVAE(A14B.vae, dtype), device) for kind, dtype in DTYPES.items()}
    latents = vaes["tf32"].encode(clip, still_from=1)
    works: dict[str, Callable[[], Tensor]] = {
        "encode": lambda: vaes["tf32"].encode(clip, still_from=1),
        "encode in full": lambda: vaes["tf32"].encode(clip),
        **{f"decode {kind}": lambda vae=vae: _last(vae.decode_stream(latents)) for kind, vae in vaes.items()},
    }
    if options.before:
        before = _vae(_module(options.before).WanVAE(A14B.vae), device)
        works |= {
            "before: encode": lambda: before.encode(clip),
            "before: decode": lambda: _last(before.decode_stream(latents)),
        }
    found: dict[str, Any] = {"first_s": {}, "peak_bytes": {}}
    for name, work in works.items():  # the first use of each searches for engines
        found["first_s"][name], found["peak_bytes"][name] = _first(work, device)
        print(name, found["first_s"][name], found["peak_bytes"][name], flush=True)
    found["seconds"] = medians(works, options.rounds, device)
    print(found["seconds"], flush=True)
    found["same_bits"] = {
        "short and full encode": bool(torch.equal(works["encode"](), works["encode in full"]())),
        "decode again": bool(torch.equal(works["decode bf16"](), works["decode bf16"]())),
    }
    videos = {kind: vae.decode(latents).cpu() for kind, vae in vaes.items()}
    if options.before:
        videos["before, tf32"] = before.decode(latents).cpu()
    machine = {"commit": commit(), "hardware": hardware.describe(device), "versions": versions()}
    hardware.prepare(device, "fp32", None)
    exact = vaes["tf32"].decode(latents).cpu()
    found["psnr_db"] = {kind: round(psnr(video[0], exact[0]), 2) for kind, video in videos.items()}
    found["clamped"] = float((exact.abs() == 1).float().mean())
    found["engines"] = convolution.chosen()
    if options.profile:
        hardware.prepare(device, "bf16", None)
        for name in works:
            _profile(name, works[name])
    return {"size": options.size, "frames": options.frames, "rounds": options.rounds, **found, **machine}


def measure_shared(options: argparse.Namespace) -> None:
    """Times ranks that share the rows of each frame against one of them alone; the leader prints the JSON document."""
    device = options.device
    hardware.prepare(device, "bf16", None)
    with rank_group(device, Mesh(ulysses=options.ranks), 600) as ranks, torch.inference_mode():
        vaes = {kind: _vae(WanVAE(A14B.vae, dtype), device) for kind, dtype in DTYPES.items()}
        clip = _clip(options)
        latents = ranks.share(vaes["tf32"].encode(clip, still_from=1).contiguous())
        rows = ranks.rows(latents.shape[3])
        own_clip, own_latents = rows.own(clip, 3).contiguous(), rows.own(latents, 3).contiguous()

        def alone(work: Callable[[], Tensor]) -> Callable[[], Tensor | None]:
            return _together(lambda: work() if ranks.is_leader else None, device)

        def shared(vae: WanVAE) -> Tensor | None:
            return _last(rows.collect(piece, 3) for piece in vae.decode_stream(own_latents, rows))

        works: dict[str, Callable[[], Tensor | None]] = {
            "encode, one rank": alone(lambda: vaes["tf32"].encode(clip, still_from=1)),
            "encode": _together(
                lambda: rows.collect(vaes["tf32"].encode(own_clip, still_from=1, rows=rows), 3), device
            ),
        }
        for kind, vae in vaes.items():
            works[f"decode {kind}, one rank"] = alone(lambda vae=vae: _last(vae.decode_stream(latents)))
            works[f"decode {kind}"] = _together(lambda vae=vae: shared(vae), device)
        found: dict[str, Any] = {"first_s": {}, "peak_bytes": {}}
        for name, work in works.items():
            found["first_s"][name], found["peak_bytes"][name] = _first(work, device)
        found["seconds"] = medians(works, options.rounds, device)
        found["relative_error"] = {}
        for name in ("encode", "decode tf32", "decode bf16"):
            one, many = works[f"{name}, one rank"](), works[name]()
            if one is not None and many is not None:
                found["relative_error"][name] = relative_error(many, one)
        machine = {"commit": commit(), "hardware": hardware.describe(device), "versions": versions()}
        if ranks.is_leader:
            shape = {"size": options.size, "frames": options.frames, "ranks": options.ranks, "rounds": options.rounds}
            print(json.dumps({**shape, **found, **machine}), flush=True)


def _together(work: Callable[[], Tensor | None], device: str) -> Callable[[], Tensor | None]:
    """Returns `work` between two meetings of all ranks."""

    def met() -> Tensor | None:
        dist.barrier()
        result = work()
        synchronize(device)
        dist.barrier()
        return result

    return met


def _clip(options: argparse.Namespace) -> Tensor:
    width, height = map(int, options.size.split("x"))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)).to(options.device) * 2 - 1
    return given_clip(image[None], options.frames)


DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16}


def _vae(vae: Any, device: str) -> Any:
    randomise(vae, 0)
    vae.decoder.conv_out.weight.data *= 0.2  # keeps the video within [-1, 1]
    vae.decoder.conv_out.bias.data *= 0.2
    if isinstance(vae, WanVAE):
        vae.lay_out()
    return vae.to(device).requires_grad_(False)


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("vae_before", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _last(pieces: Iterable[T]) -> T:
    """Returns the last piece, and holds no others: they would count as memory that decoding needs."""
    for piece in pieces:
        last = piece
    return last


def _first(work: Callable[[], Tensor], device: str) -> tuple[float, int]:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    work()
    synchronize(device)
    seconds = time.perf_counter() - started
    return round(seconds, 3), torch.cuda.max_memory_allocated() - held if device == "cuda" else 0


def _profile(name: str, work: Callable[[], Tensor]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        torch.cuda.synchronize()
    print(name)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70))


if __name__ == "__main__":
    main()
