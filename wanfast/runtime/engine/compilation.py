"""torch.compile of the experts, a block at a time, and its caches as an artifact that other processes start from.

Inductor fuses what stands between the matrix products and attention: norms, modulation, rotation, gates, residuals. A
block is compiled whole (`fullgraph`: a break is an error, not a slow path) and for one shape (`dynamic=False`); one
graph serves all blocks of both experts. `default` leaves the products to cuBLAS; the two `max-autotune` modes time
Triton's products against them, which takes half a minute. `max-autotune` itself also records each block as a CUDA
graph, from the second forward of a size on, for the weights where they lie: they had better stay there.

The artifact `inductor/<key>` holds, for each rank of a group, what Inductor, AOTAutograd, Triton and the autotuner kept
of the graph: about everything but the tracing. What operators that the compiler does not look into compile for
themselves is not in it: int8's product, the quantization of the text, FlashAttention-4. Its key names all that the
kernels depend on, so that another torch, GPU, size or version of this code finds another artifact or none. Ranks have
files of their own, because their graphs name their own groups. Source: torch.compiler.save_cache_artifacts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, CorruptArtifactError
from wanfast.runtime.facts.choices import CompileMode
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.machine.packages import version_of
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store.artifacts import ArtifactStore

KIND = "inductor"
_SIZES = 64  # token counts that one process may see: torch gives up at 8, and a list of videos can have more
# Below runtime/: what the graphs are made of, and how they are compiled.
_SOURCES = ("models/*.py", "distributed/*.py", "engine/compilation.py", "weights/quantization.py", "store/quantized.py")


@contextmanager
def compiler_imported_meanwhile(config: EffectiveConfig) -> Iterator[None]:
    """By a thread, if blocks are to be compiled: it takes seconds, in which the weights can be read.

    Not where FSDP or torchao come in, which import parts of it themselves: two threads must not.
    """
    if not config.models.compile or config.ranks.dit_fsdp == "on" or config.models.quantize_on_the_fly:
        yield
        return
    gpu = torch.cuda.current_device() if config.ranks.device == "cuda" else None
    with ThreadPoolExecutor(1) as thread:
        imported = thread.submit(_import_compiler, gpu)
        yield
        imported.result()


def _import_compiler(gpu: int | None) -> None:
    """And what the first compiled forward would wait for else, the same for all graphs of a process.

    `gpu`: the process's, since a thread's own would be the first.
    """
    importlib.import_module("torch._inductor.compile_fx")
    on_gpu = nullcontext() if gpu is None else torch.cuda.device(gpu)
    with on_gpu, suppress(AttributeError):  # names of torch's own, without which it only waits later
        torch.compiler.list_backends()  # reads what every installed package has to offer
        codecache = torch._inductor.codecache
        codecache.torch_key()  # hashes of torch's and Triton's files, parts of every graph's key
        codecache.CacheBase.get_system()
        if gpu is not None:
            importlib.import_module("triton").runtime.driver.active.get_current_target()  # built by a C compiler once


def compile_blocks(model: WanDiT, mode: CompileMode) -> None:
    """From now on every block of the model runs compiled; the first forward compiles."""
    torch._dynamo.config.recompile_limit = _SIZES
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)
    if mode == "max-autotune":  # its graphs are one chain a forward, in which each keeps what the next one reads
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())  # type: ignore[no-untyped-call]


def cache_inputs(config: EffectiveConfig, spec: DiTSpec, tokens: int) -> dict[str, Any]:
    """All that the kernels of a block depend on; `config.models.attention` is the kernel that runs."""
    on_gpu = config.ranks.device == "cuda"
    return {
        "block": {name: size for name, size in dataclasses.asdict(spec).items() if name != "num_layers"},
        "tokens": tokens,
        "precision": config.models.precision,
        "quantize": config.models.quantize,
        "attention": config.models.attention,
        "tf32": config.models.tf32,
        "mode": config.models.compile_mode,
        "mesh": {"cfg": config.ranks.cfg_parallel, "ulysses": config.ranks.ulysses},
        "dit_fsdp": config.ranks.dit_fsdp,
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "cuda": torch.version.cuda,
        },
        "sources": _digest_of_sources(),
    }


def check_caches() -> None:
    """Raises ConfigError if torch is told to keep nothing."""
    inductor = importlib.import_module("torch._inductor.config")
    if inductor.force_disable_caches or not inductor.fx_graph_cache:
        raise ConfigError(
            "warmup: torch keeps nothing of what it compiles: unset TORCHINDUCTOR_FORCE_DISABLE_CACHES and "
            "TORCHINDUCTOR_FX_GRAPH_CACHE"
        )


def save_caches(store: ArtifactStore, inputs: dict[str, Any], ranks: Ranks) -> Path:
    """Publish what this process and its peers compiled; the artifact's folder. Raises ConfigError."""
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "nothing was compiled"
    parts = ranks.gather(saved[0])

    def write(folder: Path) -> None:
        for rank, part in enumerate(parts):
            (folder / _file(rank)).write_bytes(part)

    return ranks.lead(lambda: store.publish(KIND, inputs, write, inputs["versions"]))


def load_caches(store: ArtifactStore, inputs: dict[str, Any], ranks: Ranks) -> str | None:
    """Fill this process's caches from the artifact of `inputs`; its key, or None if there is none.

    Raises CorruptArtifactError: what is loaded is run, so its bytes are held against the manifest's hash first.
    """

    def read() -> tuple[str, bytes] | None:
        folder = store.find(KIND, inputs, verify=True)
        if folder is None:
            return None
        try:
            return folder.name, (folder / _file(ranks.rank)).read_bytes()
        except FileNotFoundError as error:
            raise CorruptArtifactError(f"{error.filename} is missing: remove {folder}, and warm up again") from None

    found = ranks.together(read)
    if found is None:
        return None
    key, saved = found
    if torch.compiler.load_cache_artifacts(saved) is None:
        raise CorruptArtifactError(f"{store.path(KIND, inputs)}: torch cannot read it: remove it, and warm up again")
    return key


def compiled_anew() -> int:
    """Graphs that this process compiled so far, because no cache held them."""
    counters = torch._dynamo.utils.counters["inductor"]
    return int(counters["fxgraph_cache_miss"] + counters["fxgraph_cache_bypass"])


def _processor() -> str:
    """With its vector instructions: Inductor's C++ is made for them, and its cache does not tell them apart."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return f"{platform.machine()} {pick_vec_isa()}"


def _file(rank: int) -> str:
    return f"rank-{rank}.bin"


def _digest_of_sources() -> str:
    here = Path(__file__).parents[1]
    files = sorted(file for pattern in _SOURCES for file in here.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
