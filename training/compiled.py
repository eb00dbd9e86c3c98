"""Compares the ways of compiling the experts on this machine, and prints the names of those that are right.

    python3 -m training.compiled                      # those that may be right and faster than none; some 4 minutes
    python3 -m training.compiled timed no_fusion      # only these ways
    python3 -m training.compiled --smoke aot_eager    # toy sizes, on a CPU

A line of JSON on stderr shows each way and each number of tokens in a batch. `differences` are the relative
differences between the gradients with and without compilation, one for each batch; bf16 alone gives a few percent.
`worst` is the parameter with the largest difference. `ms` is the time of one forward and backward; it is too large
while other programs use the GPU. A way is right if all its differences are below 0.25, the limit of `training/loop.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import torch
from torch import Tensor

from training import train_experts
from training.loop import MAX_DIFFERENCE, captured, prepare_torch, relative_difference
from training.spec import SPEC
from training.train_experts import KINDS, Clips, Kind, TinyModel, flow_loss, noised
from training.ways import WAYS, compile_blocks

_BATCHES = 24  # of each kind; in one run, a way with wrong gradients was right in 24 batches, and wrong in a later one
_COMPARED = (KINDS[0], KINDS[1], KINDS[3], KINDS[4])  # the others have the same numbers of tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"one of {', '.join(WAYS)}; by default those between default and none"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to check that this program runs")
    parser.add_argument("--here", action="store_true", help="compare the only WAY in this process")
    options = parser.parse_args()
    if unknown := [name for name in options.ways if name not in WAYS]:
        parser.error(f"WAY {unknown[0]!r}: use one of {', '.join(WAYS)}")
    names = options.ways or list(WAYS)[1 : list(WAYS).index("none")]  # the default was wrong before
    if options.here:
        for line in compare(names[0], train_experts.TOY if options.smoke else _COMPARED):
            print(json.dumps(line), flush=True)
        return
    smoke = ["--smoke"] if options.smoke else []
    with ThreadPoolExecutor(4) as pool:
        right = list(pool.map(lambda name: is_right(name, smoke), names))
    for name, is_good in zip(names, right, strict=True):
        if is_good:
            print(name)


def is_right(name: str, flags: Sequence[str]) -> bool:
    """Compares a way in a new process, prints what it printed to stderr, and returns whether its gradients are right.

    A way that raises an error is not right.
    """
    command = [sys.executable, "-m", "training.compiled", name, "--here", *flags]
    # A cached kernel would hide the way that compiled it.
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    differences = [value for line in done.stdout.splitlines() for value in json.loads(line)["differences"]]
    return done.returncode == 0 and all(value <= MAX_DIFFERENCE for value in differences)


def compare(way: str, kinds: Sequence[Kind]) -> list[dict[str, object]]:
    """Returns one comparison for each kind of batches, on random clips and slightly random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_torch()
    model = TinyModel(SPEC).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():  # some parameters are zero at first, and gradients behind them would be zero too
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, device=device)
    compile_blocks((model.high_noise, model.low_noise), way)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    loss = flow_loss(model)

    def compute(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        torch._foreach_zero_(gradients)
        terms = loss(*batch)
        terms["loss"].backward()
        return terms

    found = []
    for kind in kinds:
        draw = noised(SPEC, [random_clips(kind, device)], [kind.batch], [0])
        batches = [draw(step, generator) for step in range(_BATCHES)]
        started = perf_counter()
        run = captured(compute, batches[0]) if device == "cuda" else compute
        run(batches[0])
        _wait(device)
        first, differences, worst = perf_counter() - started, [], (0.0, "")
        for batch in batches:
            run(batch)
            ours = [gradient.clone() for gradient in gradients]
            with torch.compiler.set_stance("force_eager"):
                compute(batch)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, gradients, strict=True)]
            differences.append(round(relative_difference(ours, gradients), 4))
            worst = max(worst, max(zip(errors, names, strict=True)))
        _wait(device)
        started = perf_counter()
        for batch in batches:
            run(batch)
        _wait(device)
        found.append(
            {
                "way": way,
                "clips": kind.batch,
                "size": kind.form.size,
                "differences": differences,
                "worst": worst,
                "first_s": round(first, 1),
                "ms": round((perf_counter() - started) / _BATCHES * 1e3, 1),
            }
        )
    return found


def random_clips(kind: Kind, device: str, count: int = 64) -> Clips:
    """Returns clips of random latents and random captions, of the sizes of a kind."""
    generator = torch.Generator().manual_seed(0)
    T, (w, h) = (kind.form.frames + 3) // 4, (side // 8 for side in kind.form.size)
    z, y = (torch.randn(count, c, T, h, w, generator=generator).bfloat16().to(device) for c in (16, 20))
    ids = torch.randint(3, 900, (count + 1, 40), generator=generator).to(device)
    return Clips(z, y, ids, torch.randint(5, 40, (count + 1,), generator=generator).to(device))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
