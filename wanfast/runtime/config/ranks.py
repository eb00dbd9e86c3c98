"""Defines the options that say how many ranks work, on which device, and where they hold the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from wanfast.runtime.config.option import COMPILED, GPUS, MEASURE, Option, Part, at_least, between
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Device, Switch
from wanfast.runtime.facts.mesh import Mesh

# The options that decide the mesh, and those that decide which weights fit into memory.
_OF_MESH = (
    "model", "recipe", "num_gpus", "nnodes", "cfg_parallel", "ulysses", "guidance_high_noise", "guidance_low_noise",
    "sigmas", "switch_step",
)  # fmt: skip
_OF_MEMORY = (
    *_OF_MESH, "device", "precision", "vae_precision", "quantize", "attention", "density", "attention_plan", "compile",
    "compile_mode", "magcache", "magcache_extrapolate", "guidance_gate", "image", "last_image", "continue_from", "size",
    "fit", "frames", "dit_fsdp", "expert_offload",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RanksConfig(Part):
    """This part of a config says how many ranks work, on which device, and where they hold the weights."""

    device: Annotated[
        Device, Option("Device to run on.", GPUS, also=COMPILED, default="cuda if there is a GPU, else cpu")
    ]
    num_gpus: Annotated[
        int,
        Option(
            "Number of ranks on this machine. A rank is one GPU, or one process with --device cpu. auto uses all GPUs.",
            GPUS,
            also=COMPILED,
            asked=int | Literal["auto"],
            metavar="<int|auto>",
            check=lambda n: None if n == "auto" or 1 <= n <= 1024 else "use 1 to 1024, or auto",
        ),
    ] = 1
    nnodes: Annotated[
        int,
        Option(
            "Number of machines that make each video together. Start wanfast on each machine, with the same options "
            "except --node-rank.",
            GPUS,
            of_this_run=True,
            check=between(1, 1024, "use the number of machines, 1 to 1024"),
        ),
    ] = 1
    node_rank: Annotated[int, Option("Number of this machine, from 0 to --nnodes minus 1.", GPUS, of_this_run=True)] = 0
    rdzv_endpoint: Annotated[
        str | None, Option("HOST:PORT of machine 0, to which all machines connect.", GPUS, of_this_run=True)
    ] = None
    cfg_parallel: Annotated[
        int | None,
        Option(
            "Degree of guidance parallelism: 2 computes the two branches on different ranks, 1 computes both on the "
            "same ranks.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
            default="2 if there are enough ranks",
            follows=_OF_MESH,
            check=at_least(1, "use 1 or more, or leave it out"),
        ),
    ] = None
    ulysses: Annotated[
        int | None,
        Option(
            "Number of ranks that share the tokens of one branch of guidance.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
            default="as many as fit",
            follows=_OF_MESH,
            check=at_least(1, "use 1 or more, or leave it out"),
        ),
    ] = None
    dit_fsdp: Annotated[
        Switch,
        Option(
            "Shard the experts over the ranks of a video. auto shards them if one GPU cannot hold both. Quantized "
            "experts are never sharded.",
            GPUS,
            also=COMPILED,
            of_these_ranks=True,
            follows=_OF_MEMORY,
        ),
    ] = "auto"
    t5_fsdp: Annotated[
        Switch,
        Option(
            "Shard UMT5 over the ranks of a video. auto shards it if one GPU cannot hold it.",
            GPUS,
            also=MEASURE,
            of_these_ranks=True,
            follows=_OF_MEMORY,
        ),
    ] = "auto"
    expert_offload: Annotated[
        Switch,
        Option(
            "Hold the idle expert in host memory. auto does this if the GPUs cannot hold both experts, neither "
            "whole nor sharded.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
            follows=_OF_MEMORY,
        ),
    ] = "auto"
    rank_timeout: Annotated[
        float,
        Option(
            "Seconds that a rank waits for another rank until the run counts as hung. The run also counts as hung "
            "if no rank does anything for three times as long. A hung run fails; in a --jobs list, only the current "
            "line fails.",
            GPUS,
            of_this_run=True,
            also=COMPILED,
            check=between(1, 86400, "use 1 to 86400 seconds"),
        ),
    ] = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}: with --nnodes {self.nnodes}, use 0 to {self.nnodes - 1}")
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ConfigError(
                "--nnodes needs --rdzv-endpoint: add --rdzv-endpoint HOST:PORT on all machines, with the address of "
                "machine 0"
            )
        if self.rdzv_endpoint is not None:
            if self.nnodes == 1:
                raise ConfigError("--rdzv-endpoint is for several machines: add --nnodes, or drop --rdzv-endpoint")
            if not re.fullmatch(r"[^\s:]+:\d{1,5}", self.rdzv_endpoint):
                raise ConfigError(f"--rdzv-endpoint {self.rdzv_endpoint!r} is not HOST:PORT: write it like node0:29500")
        if self.dit_fsdp == "on" and self.expert_offload == "on":
            raise ConfigError(
                "--dit-fsdp on and --expert-offload on exclude each other, because shards stay on their GPUs: drop one "
                "of the two"
            )

    @property
    def mesh(self) -> Mesh:
        """Returns the mesh of all ranks on all machines; a cfg degree or Ulysses degree that is None counts as 1."""
        cfg, ulysses = self.cfg_parallel or 1, self.ulysses or 1
        return Mesh(replica=self.num_gpus * self.nnodes // (cfg * ulysses), cfg=cfg, ulysses=ulysses)
