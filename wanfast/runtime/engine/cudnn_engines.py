"""Stores which cuDNN engines the VAE's convolutions use, so that a repeated video has the same bits.

While the first video of a size is made, a search finds the fastest engine for each convolution. The artifact
`cudnn/<key>` stores the choice, and later runs use it. The key contains everything that the choice depends on: GPU,
cuDNN and its front end, video size, number of ranks, precision and this code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.machine.packages import version_of
from wanfast.runtime.models import convolution
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import ArtifactStore, noting
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.json_files import read_object

KIND = "cudnn"
_FILE = "engines.json"
_CODE = ("runtime/models/vae.py", "runtime/models/convolution.py")


@contextmanager
def kept_engines(plan: Plan, ranks: Ranks) -> Iterator[dict[str, str]]:
    """Makes the VAE use the stored cuDNN engines in the `with` block, and stores new engines when the block ends.

    New engines are those that a search found in the block. Yields an empty mapping, and fills it when the block ends.
    The mapping then holds the engines that all ranks used. A key is the shape of a convolution; for each rank except
    the leader, "rank N: " stands before the shape. On a CPU, or if cuDNN's front end is not installed, the mapping
    stays empty.
    """
    used: dict[str, str] = {}
    if ranks.device != "cuda" or not convolution.HAS_FRONT_END:
        yield used
        return
    store, inputs = ArtifactStore(Path(plan.config.models.artifacts_dir)), _inputs(plan, ranks)
    stored = ranks.lead(lambda: _stored(store, inputs))  # other ranks may see another disk
    convolution.choose(stored.get(str(ranks.rank), {}))
    convolution.forget_uses()
    yield used
    of_all: dict[str, dict[str, str]] = {}
    for rank, now in enumerate(ranks.gather(convolution.used())):
        used |= {f"rank {rank}: {shape}" if rank else shape: engine for shape, engine in now.items()}
        of_all[str(rank)] = now
    ranks.lead(lambda: _add(store, inputs, of_all))


def digest(engines: dict[str, str]) -> str | None:
    """Returns a short hash of {shape: engine} for the JSON beside a video, or None if the mapping is empty."""
    text = json.dumps(engines, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if engines else None


def _stored(store: ArtifactStore, inputs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns {rank: {shape: engine}}, which is empty if nothing is stored."""
    folder = store.find(KIND, inputs, verify=True, damaged="miss")
    return read_object(folder / _FILE, f"remove {folder}") if folder else {}


def _add(store: ArtifactStore, inputs: dict[str, Any], engines: dict[str, dict[str, str]]) -> None:
    """Stores the engines of shapes that are not stored yet.

    An engine that is stored stays, because another rank group may have stored its own meanwhile. A video that is made
    is not lost because the engines cannot be stored.
    """
    with noting("the next video searches for cuDNN's engines again, so its last bits may differ from this video's"):
        stored = _stored(store, inputs)
        both = {rank: engines.get(rank, {}) | stored.get(rank, {}) for rank in engines | stored}
        if both == stored:
            return
        if stored:
            store.discard(KIND, inputs)
        text = json.dumps(both, indent=2, sort_keys=True) + "\n"
        store.publish(KIND, inputs, lambda new: cast(None, (new / _FILE).write_text(text)), {}, damaged="miss")


def _inputs(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    geometry, models = plan.geometry, plan.config.models
    return {
        "gpus": ranks.gather(torch.cuda.get_device_name()),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "front_end": version_of("nvidia-cudnn-frontend"),
        "size": [geometry.width, geometry.height],
        "one_frame": geometry.frames == 1,
        "ranks": ranks.size,
        "vae": plan.spec.vae.to_json(),
        "vae_precision": models.vae_precision,
        "tf32": torch.backends.cudnn.allow_tf32,
        "code": digest_of_code(*_CODE),
    }
