"""Projects the seconds of a whole video on more GPUs, by a cost model that is fitted to runs on one and two GPUs.

docs/projection.md has the formulas and their assumptions. The seconds of a video are the sum of seven terms. Four terms
are parts of a forward: attention, linears, norms and exchange. Each of the four depends on the number of tokens and on
the number of ranks that share the tokens. The VAE's term depends on the number of tokens and on the number of all
ranks. The terms of the text and of the start are the same on any number of GPUs.

The exchange on two GPUs is the time of a forward on two GPUs, minus half of the time on one GPU. On more GPUs, the
exchange is proportional to the number of tokens that a rank sends.
This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from wanfast.runtime.facts.flop import attention_flop, linear_flop
from wanfast.runtime.facts.mesh import Mesh, choose_mesh
from wanfast.runtime.facts.model_spec import A14B

Printed = Mapping[str, Any]  # what a benchmark printed
Terms = dict[str, float]  # name of a term -> seconds

OF_A_FORWARD = ("attention", "linears", "norms", "exchange")
TERMS = (*OF_A_FORWARD, "VAE", "text", "start")
STEPS = 40
NOT_CHECKED = "not checked on 4"


@dataclass(frozen=True)
class Shared:
    """Holds the seconds of a task in two parts.

    Each rank repeats the first part; the ranks share the work of the second part.
    """

    repeated_s: float
    divided_s: float

    @classmethod
    def fitted(cls, one_s: float, two_s: float) -> Shared:
        """Splits the time of a task into the part that each rank repeats and the part that the ranks share.

        The task takes `one_s` on one GPU and `two_s` on two GPUs.
        """
        divided = 2 * (one_s - two_s)
        return cls(one_s - divided, divided)

    def on(self, ranks: int) -> float:
        """Returns the seconds of the task on this number of ranks."""
        return self.repeated_s + self.divided_s / ranks


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Holds the numbers that `fit` computed from measurements.

    Names that end in `_flop_s` are rates of one GPU in FLOP/s. Names that end in `_token_s` are seconds for one token.
    """

    attention_flop_s: float
    linear_flop_s: float
    norm_token_s: float
    exchange_token_s: float  # for a token that a rank sends
    encode: Shared  # of `vae_tokens`
    decode: Shared
    vae_tokens: int
    text_s: float = 0.0
    start_s: float = 0.0

    def forward(self, tokens: int, ulysses: int) -> Terms:
        """Returns {term of the cost model: seconds} for one forward in which `ulysses` ranks share the tokens."""
        return {
            "attention": attention_flop(A14B.dit, tokens) / self.attention_flop_s / ulysses,
            "linears": linear_flop(A14B.dit, tokens) / self.linear_flop_s / ulysses,
            "norms": self.norm_token_s * tokens / ulysses,
            "exchange": self.exchange_token_s * tokens * sent(ulysses),
        }

    def forward_s(self, tokens: int, ulysses: int) -> float:
        """Returns the seconds of one forward."""
        return sum(self.forward(tokens, ulysses).values())

    def vae_s(self, tokens: int, ranks: int) -> float:
        """Returns the seconds of encoding and decoding; both are proportional to the number of tokens."""
        return (self.encode.on(ranks) + self.decode.on(ranks)) * tokens / self.vae_tokens

    def video(self, tokens: int, mesh: Mesh, steps: int = STEPS) -> Terms:
        """Returns {term of the cost model: seconds} for one video that is made with guidance.

        If `mesh.cfg` is 2, both branches of guidance run at the same time.
        """
        forwards = 2 * steps / mesh.cfg
        of_steps = {name: forwards * seconds for name, seconds in self.forward(tokens, mesh.ulysses).items()}
        return {**of_steps, "VAE": self.vae_s(tokens, mesh.group_size), "text": self.text_s, "start": self.start_s}


def on_more_gpus(
    model: CostModel, seconds: Terms, forwards: float, tokens: int, meshes: tuple[Mesh, Mesh]
) -> dict[str, float]:
    """Returns the seconds of each stage on the second mesh of `meshes`, projected from `seconds` on the first mesh.

    `seconds`: the measured seconds of the stages "encode", "denoise" and "decode". `forwards` and
    `tokens`: the number of the video's forwards, and the number of its tokens.
    Encoding and decoding change by the factor that `model` predicts. For a forward, `model` predicts only the time of
    the exchange. All other time of the measured forward is proportional to 1 / (number of ranks that share the tokens).
    So the measured video may use kernels to which `model` was not fitted.
    """
    before, after = meshes
    exchange = [model.forward(tokens, mesh.ulysses)["exchange"] for mesh in meshes]
    work_s = (seconds["denoise"] * before.cfg / forwards - exchange[0]) * before.ulysses
    return {
        "encode": seconds["encode"] * model.encode.on(after.group_size) / model.encode.on(before.group_size),
        "denoise": forwards / after.cfg * (work_s / after.ulysses + exchange[1]),
        "decode": seconds["decode"] * model.decode.on(after.group_size) / model.decode.on(before.group_size),
    }


def sent(ulysses: int) -> float:
    """Returns the number of tokens that a rank sends in one exchange, divided by the number of all tokens.

    A rank has 1/ulysses of all tokens. The rank keeps 1/ulysses of its tokens, and sends the rest to other ranks.
    """
    return (ulysses - 1) / ulysses**2


def mesh_of(num_gpus: int, cfg: int | None = None) -> Mesh:
    """Returns the mesh that wanfast chooses for one video; `cfg` is the value of --cfg-parallel, if it is given."""
    return choose_mesh(num_gpus, A14B.dit.num_heads, cfg_parallel=cfg)


def fit(forward: Printed, profile: Printed, vae: Printed, video: Printed) -> CostModel:
    """Fits the cost model to documents that benchmarks printed.

    `forward`: from `benchmarks/forward.py`, the time of a forward on one GPU and on two GPUs.
    `profile`: from `benchmarks/forward.py --profile`, the share of each part of a forward on one GPU.
    `vae`: from `benchmarks/vae.py`, the times of the VAE on one GPU and on two GPUs.
    `video`: from `benchmarks/whole_video.py --random`, the times of whole videos on two GPUs. From a video's time, the
    times of text, denoising and VAE are subtracted; the rest is the time of the start.
    """
    one_s, two_s = (forward["ways"][name]["ms"] / 1000 for name in ("one", "ulysses 2"))
    tokens, shares = forward["tokens"], next(iter(profile["profiles"].values()))["shares"]  # the first is one GPU's
    part_s = {name: one_s * share / sum(shares.values()) for name, share in shares.items()}
    seconds = vae["seconds"]
    model = CostModel(
        attention_flop_s=attention_flop(A14B.dit, tokens) / part_s["attention"],
        linear_flop_s=linear_flop(A14B.dit, tokens) / part_s["linears"],
        norm_token_s=part_s["everything else"] / tokens,
        exchange_token_s=(two_s - one_s / 2) / tokens / sent(2),
        encode=Shared.fitted(seconds["encode, one rank"], seconds["encode"]),
        decode=Shared.fitted(seconds["decode bf16, one rank"], seconds["decode bf16"]),
        vae_tokens=_tokens_of_vae(vae),
    )
    whole = WholeVideo.read(video)
    text_s = whole.seconds["text"]
    start_s = whole.beyond_s - text_s - model.vae_s(whole.tokens, whole.num_gpus)
    return CostModel(**{**vars(model), "text_s": text_s, "start_s": start_s})


def tokens_of(width: int, height: int, frames: int) -> int:
    """Returns the number of tokens of a video with this size in pixels and this number of frames."""
    return (frames + 3) // 4 * (height // 16) * (width // 16)


def _tokens_of_vae(vae: Printed) -> int:
    width, height = map(int, vae["size"].split("x"))
    return tokens_of(width, height, vae["frames"])


@dataclass(frozen=True)
class WholeVideo:
    """Holds the median seconds of whole `wanfast generate` commands whose prompt has no stored embedding.

    `benchmarks/whole_video.py --random` measures these seconds.
    """

    num_gpus: int
    steps: int
    tokens: int
    seconds: Terms  # by stage
    beyond_s: float  # everything but denoising

    @classmethod
    def read(cls, document: Printed) -> WholeVideo:
        """Returns the medians of the seconds in a JSON document that `benchmarks/whole_video.py` printed."""
        options, rows = document["options"], document["videos"]["new"]
        num_gpus, steps = (
            int(options[options.index(name) + 1]) if name in options else default
            for name, default in (("--num-gpus", 1), ("--steps", STEPS))
        )
        seconds = {stage: median(row["seconds"][stage] for row in rows) for stage in ("text", "denoise")}
        beyond = median(row["beyond_denoising_s"] for row in rows)
        return cls(num_gpus, steps, tokens_of(*document["size"]), seconds, beyond)

    def whole_s(self, steps: int = STEPS) -> float:
        """Returns the seconds of a whole command with `steps` steps; only its denoising time depends on the steps."""
        return self.beyond_s + self.seconds["denoise"] * steps / self.steps


def checks(
    model: CostModel, *, forward: Printed | None = None, vae: Printed | None = None, video: Printed | None = None
) -> list[dict[str, Any]]:
    """Compares the cost model's projections with measurements that `fit` did not use.

    Each measurement is a document that a benchmark printed: `forward` by `benchmarks/forward.py`, `vae` by
    `benchmarks/vae.py`, and `video` by `benchmarks/whole_video.py --random`. A document that is None is not compared.
    If `forward` or `vae` has results for several numbers of ranks, only those for the largest number are compared.
    Returns one dict for each comparison. Its keys are "what" (a few words that name the measurement), "measured_s",
    "projected_s" and "error" (projected_s / measured_s - 1).
    """
    found = []
    if forward:
        way = f"ulysses {forward['ranks']}"
        projected = model.forward_s(forward["tokens"], forward["ranks"])
        found.append(_check(f"a forward, {way}", forward["ways"][way]["ms"] / 1000, projected))
    if vae:
        measured = vae["seconds"]["encode"] + vae["seconds"]["decode bf16"]
        projected = model.vae_s(_tokens_of_vae(vae), vae["ranks"])
        found.append(_check(f"the VAE, {vae['ranks']} ranks", measured, projected))
    if video:
        whole = WholeVideo.read(video)
        terms = model.video(whole.tokens, mesh_of(whole.num_gpus))
        projected = sum(terms[name] for name in OF_A_FORWARD)
        of_steps = whole.seconds["denoise"] * STEPS / whole.steps
        found.append(_check(f"{STEPS} steps, {whole.num_gpus} GPUs", of_steps, projected))
        found.append(_check(f"a whole video, {whole.num_gpus} GPUs", whole.whole_s(), sum(terms.values())))
    return found


def _check(what: str, measured_s: float, projected_s: float) -> dict[str, Any]:
    error = projected_s / measured_s - 1
    return {
        "what": what,
        "measured_s": round(measured_s, 3),
        "projected_s": round(projected_s, 3),
        "error": round(error, 4),
    }
