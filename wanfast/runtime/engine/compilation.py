"""This module compiles the experts block by block, and stores torch.compile's caches so that other processes load them.

A block is compiled with `fullgraph`, so that a graph break is an error and not a slow path. A block is compiled for one
shape (`dynamic=False`). All blocks of both experts share one graph. With --attention fa3-fp8 there is a second graph:
all layers with attention in float8 share it.
In mode `default`, cuBLAS computes the matrix products. The two `max-autotune` modes measure whether Triton or cuBLAS
computes the products faster; this measurement takes half a minute. The mode `max-autotune` also captures each block as
a CUDA graph, in the second forward at each video size. A captured graph reads weights at fixed addresses, so it must be
captured again after weights have moved.

The artifact `inductor/<key>` holds what Inductor, AOTAutograd, Triton and the autotuner cached, with one file for each
rank. A rank cannot use another rank's file, because graphs contain the names of a rank's process groups. The key
contains everything that the kernels depend on. For example, another torch, GPU, video size or version of this code
gives another key.
A process that loads the artifact still traces the blocks. The artifact does not hold these operators, because
torch.compile does not trace through them: the int8 product, the quantization of the text embeddings, FlashAttention-4,
and sparse attention with its router. Other compilers, such as Triton, compile these operators. Each of these compilers
has its own cache on the machine, which holds most of the compiled code.
Source: torch.compiler.save_cache_artifacts.
"""

from __future__ import annotations

import dataclasses
import importlib
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Attention, CompileMode
from wanfast.runtime.machine.packages import version_of
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.fused import make_operators
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import Artifact, ArtifactStore, note, noting
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.sharing import who_can_write

KIND = "inductor"
_GRAPHS = 128  # that one process holds; torch's own limit is 8, and a list may have more shapes
_GRAPHS_OF_A_SHAPE = 4  # at most: ranks that regroup double them, and so does attention in float8
_compiled: set[str] = set()  # the keys for which this process may hold graphs
# The code that becomes the graphs, and the code that compiles them.
_CODE = (
    "runtime/models/*.py", "runtime/distributed/*.py", "runtime/engine/compilation.py", "runtime/jobs/warmup.py",
    "runtime/weights/builders.py", "runtime/weights/quantization.py", "runtime/store/quantized.py",
    "runtime/device/hardware.py",
)  # fmt: skip


@contextmanager
def compiler_imported_meanwhile(config: EffectiveConfig) -> Iterator[None]:
    """If --compile is on, imports torch's compiler in a thread while the `with` block loads weights.

    With FSDP or --quantize-on-the-fly, nothing is imported. FSDP and torchao import parts of the compiler themselves,
    and two threads must not import the compiler at the same time.
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
    """Imports the compiler, and does other work that all graphs share and the first compiled forward would wait for.

    `gpu`: the GPU of the process, because a new thread starts with GPU 0.
    """
    importlib.import_module("torch._inductor.compile_fx")
    on_gpu = nullcontext() if gpu is None else torch.cuda.device(gpu)
    with on_gpu, suppress(AttributeError):  # private names of torch: without them the first forward only waits longer
        torch.compiler.list_backends()  # reads the entry points of every installed package
        codecache = torch._inductor.codecache
        codecache.torch_key()  # hashes of torch's and Triton's files, parts of every graph's key
        codecache.CacheBase.get_system()
        if gpu is not None:
            importlib.import_module("triton").runtime.driver.active.get_current_target()  # a C compiler builds it once


def make_traceable() -> None:
    """Registers the operators of a block with torch, so that torch.compile can trace a block."""
    make_operators()
    # For Dynamo, `rearrange` becomes one node, because tracing through it is slow. AOTAutograd traces through it later,
    # so the compiled graph stays the same.
    torch._dynamo.allow_in_graph(rearrange)  # type: ignore[no-untyped-call]


def make_room_for_graphs(key: str) -> bool:
    """Frees all graphs if the graphs of `key` might exceed torch's limit, which is an error; returns whether it did.

    `key`: the hash of `cache_inputs`. Freed graphs are compiled again when they are needed.
    """
    is_full = key not in _compiled and _GRAPHS_OF_A_SHAPE * len(_compiled) >= _GRAPHS
    if is_full:
        torch.compiler.reset()
        _compiled.clear()
    _compiled.add(key)
    return is_full


def compile_blocks(model: WanDiT, mode: CompileMode) -> None:
    """Makes every block of `model` run compiled; the first forward of the model compiles the blocks."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    make_traceable()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)
    if mode == "max-autotune":  # a forward's graphs form one chain: each holds what the next one reads
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())  # type: ignore[no-untyped-call]


def cache_inputs(plan: Plan, exact: Attention) -> dict[str, Any]:
    """Returns everything that a block's compiled kernels depend on: the `inputs` of `save_caches` and `load_caches`.

    The plan's `attention` must name the kernel that runs, not `auto`. `exact`: the kernel of the attention calls that
    stay exact.
    """
    config, models = plan.config, plan.config.models
    on_gpu = config.ranks.device == "cuda"
    in_fp8 = plan.fp8 and {"hadamard": plan.fp8.hadamard, "check": models.attention_check}  # are parts of the graph
    return {
        "block": {name: size for name, size in dataclasses.asdict(plan.spec.dit).items() if name != "num_layers"},
        "tokens": plan.geometry.tokens,
        "precision": models.precision,
        "quantize": models.quantize,
        "attention": models.attention,
        "exact_attention": exact,
        "fp8_attention": in_fp8,
        "tf32": models.tf32,
        "mode": models.compile_mode,
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
        "sources": digest_of_code(*_CODE, words=True),
    }


def check_caches() -> None:
    """Raises ConfigError if torch's compiler caches are disabled, because then there is nothing to store."""
    inductor = importlib.import_module("torch._inductor.config")
    if inductor.force_disable_caches or not inductor.fx_graph_cache:
        raise ConfigError(
            "warmup: torch's compiler caches are disabled: unset TORCHINDUCTOR_FORCE_DISABLE_CACHES and "
            "TORCHINDUCTOR_FX_GRAPH_CACHE"
        )


def save_caches(store: ArtifactStore, inputs: dict[str, Any], ranks: Ranks) -> Artifact:
    """Stores the compiler caches of all ranks as one artifact, with a file for each rank.

    `inputs`: the result of `cache_inputs`; its hash is the artifact's key. A damaged artifact with the same key is
    replaced. Raises ConfigError if the artifact cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "nothing was compiled"
    parts = ranks.gather(saved[0])

    def write(folder: Path) -> None:
        for rank, part in enumerate(parts):
            (folder / _file(rank)).write_bytes(part)

    return ranks.lead(lambda: store.publish(KIND, inputs, write, inputs["versions"], damaged="miss"))


def load_caches(store: ArtifactStore, inputs: dict[str, Any], ranks: Ranks, *, is_named: bool) -> str | None:
    """Loads the artifact of `inputs` into this process's compiler caches, and returns the artifact's key.

    Returns None on all ranks if any rank cannot load the artifact. Then the first forward compiles the blocks, which
    takes less than a minute. `is_named`: whether the user named the folder of artifacts, by --artifacts-dir or by
    WANFAST_ARTIFACTS. The artifact is not loaded in these cases, and all except the first print a note:

    * The artifact is missing.
    * The artifact is damaged: for example, the hash of a file differs from the hash in the manifest.
    * `is_named` is false, and other users can write to the artifact. Code of these users could run in this process.
    * torch cannot use a file of the artifact. The artifact is then also removed.
    """
    folder = ranks.together(lambda: store.find(KIND, inputs, verify=True, damaged="miss"))
    if not all(ranks.gather(folder is not None)):
        return None
    assert folder is not None
    stranger = None if is_named else who_can_write([store.root, folder.parent, folder, *folder.iterdir()])
    if any(ranks.gather(stranger)):
        fix = "if you trust this folder, give it by --artifacts-dir"
        note(f"{stranger or folder}: compiled code is not loaded from this folder: {fix}")
        return None
    file = folder / _file(ranks.rank)
    if all(ranks.gather(file.is_file() and torch.compiler.load_cache_artifacts(file.read_bytes()) is not None)):
        return folder.name
    note(f"{folder}: torch cannot use this stored cache, so the blocks are recompiled")
    ranks.lead(lambda: _discard(store, inputs))
    return None


def _discard(store: ArtifactStore, inputs: dict[str, Any]) -> None:
    with noting("every run recompiles the blocks until this folder is removed"):
        store.discard(KIND, inputs)


def compiled_anew() -> int:
    """Returns the number of graphs that this process compiled because no cache held them."""
    counters = torch._dynamo.utils.counters["inductor"]
    return int(counters["fxgraph_cache_miss"] + counters["fxgraph_cache_bypass"])


def _processor() -> str:
    """Names the CPU and its vector instructions: Inductor's C++ depends on them, and its cache ignores them."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return f"{platform.machine()} {pick_vec_isa()}"


def _file(rank: int) -> str:
    return f"rank-{rank}.bin"
