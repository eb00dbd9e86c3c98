"""Defines which processes make a video, on what device, and where they hold the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from wanfast.runtime.config.option import CALIBRATE, COMPILED, GPUS, Option, Part, at_least, between
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Device, Switch
from wanfast.runtime.facts.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class RanksConfig(Part):
    """This part says which processes work, on what device, and where they hold the weights."""

    device: Annotated[Device, Option("Where to run.", GPUS, also=COMPILED, default="cuda if there is a driver")]
    num_gpus: Annotated[
        int,
        Option(
            "Ranks on this machine: one a GPU, or processes with --device cpu. auto uses all GPUs.",
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
            "Number of machines. Start wanfast on each, with the same options.",
            GPUS,
            of_this_run=True,
            check=between(1, 1024, "use the number of machines, 1 to 1024"),
        ),
    ] = 1
    node_rank: Annotated[int, Option("Which of --nnodes this machine is, from 0.", GPUS, of_this_run=True)] = 0
    rdzv_endpoint: Annotated[
        str | None, Option("HOST:PORT of machine 0, where several machines meet.", GPUS, of_this_run=True)
    ] = None
    cfg_parallel: Annotated[
        int | None,
        Option(
            "Ranks that share the branches of guidance, 1 or 2.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
            default="2 if there are enough ranks",
            check=at_least(1, "use 1 or more, or leave it out"),
        ),
    ] = None
    ulysses: Annotated[
        int | None,
        Option(
            "Ranks that share the tokens of a branch.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
            default="as many as fit",
            check=at_least(1, "use 1 or more, or leave it out"),
        ),
    ] = None
    dit_fsdp: Annotated[
        Switch,
        Option(
            "Shard the experts over a video's ranks; auto: if the experts do not fit.",
            GPUS,
            also=COMPILED,
            of_these_ranks=True,
        ),
    ] = "auto"
    t5_fsdp: Annotated[
        Switch,
        Option(
            "Shard UMT5 over a video's ranks; auto: if UMT5 does not fit.", GPUS, also=CALIBRATE, of_these_ranks=True
        ),
    ] = "auto"
    expert_offload: Annotated[
        Switch,
        Option(
            "Hold the idle expert in host memory; auto: if the GPUs cannot hold both experts, not even sharded.",
            GPUS,
            of_these_ranks=True,
            also=COMPILED,
        ),
    ] = "auto"
    rank_timeout: Annotated[
        float,
        Option(
            "Seconds that ranks wait for each other before the run ends.",
            GPUS,
            of_this_run=True,
            also=COMPILED,
            check=between(1, 86400, "use 1 to 86400 seconds"),
        ),
    ] = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}: number the --nnodes {self.nnodes} machines from 0")
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ConfigError("--nnodes needs --rdzv-endpoint: HOST:PORT of the first machine, the same on all")
        if self.rdzv_endpoint is not None:
            if self.nnodes == 1:
                raise ConfigError("--rdzv-endpoint is for several machines: add --nnodes, or drop it")
            if not re.fullmatch(r"[^\s:]+:\d{1,5}", self.rdzv_endpoint):
                raise ConfigError(f"--rdzv-endpoint {self.rdzv_endpoint!r} is not HOST:PORT: write it as node0:29500")
        if self.dit_fsdp == "on" and self.expert_offload == "on":
            raise ConfigError(
                "--dit-fsdp on and --expert-offload on exclude each other, because shards stay on their GPUs: drop one "
                "of the two"
            )

    @property
    def mesh(self) -> Mesh:
        """The mesh of the ranks of all machines; a degree that is not decided yet counts as 1."""
        cfg, ulysses = self.cfg_parallel or 1, self.ulysses or 1
        return Mesh(replica=self.num_gpus * self.nnodes // (cfg * ulysses), cfg=cfg, ulysses=ulysses)
