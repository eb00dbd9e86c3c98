"""Tests whole generations by rank groups over gloo: final latents and files equal those of one rank."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from tests.compiling import compiler
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import SPEC, blank_inputs, frames_of, plan_small_model
from wanfast.bench.model_folder import randomise
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.distributed.vae_parallel import SplitRows
from wanfast.runtime.engine import compilation, loading, pixels, prompt_embeds
from wanfast.runtime.engine import pipeline as pipeline_module
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS, Expert
from wanfast.runtime.facts.mesh import Mesh, choose_mesh
from wanfast.runtime.media import images
from wanfast.runtime.models import convolution
from wanfast.runtime.models import vae as vae_module
from wanfast.runtime.models.dit import Block, WanDiT
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights import experts
from wanfast.runtime.weights.experts import OffloadedExperts, ResidentExperts


@pytest.fixture
def planned(small_model: Path, workdir: Path) -> tuple[Plan, ModelFiles]:
    """Returns a plan with two steps of either expert, unequal guidance and 48 tokens."""
    return plan_small_model(small_model)


def final_latents(plan: Plan, files: ModelFiles, ranks: Ranks) -> torch.Tensor:
    return latents_of([plan], files, ranks)[0]


@torch.inference_mode()
def latents_of(plans: Sequence[Plan], files: ModelFiles, ranks: Ranks) -> list[torch.Tensor]:
    """Returns the final latents of each plan; they share the first one's models, texts, image and noise."""
    plan = plans[0]
    config = plan.config
    embeds = prompt_embeds.prompt_embeds(
        [config.video.prompt, config.video.negative_prompt], files, config, ranks, Stopwatch("cpu")
    ).embeds
    pipeline = loading.load_models(files, config, ranks, Stopwatch("cpu"))
    held = pipeline.experts.take("high_noise")[0].parameters()
    assert {isinstance(parameter, DTensor) for parameter in held} == {config.ranks.dit_fsdp == "on"}
    condition = pipeline.encode_condition(given_images(plan), plan.geometry)
    text = {"prompt": embeds[config.video.prompt], "negative_prompt": embeds[config.video.negative_prompt]}

    def latents(other: Plan) -> torch.Tensor:
        draw = partial(next, pipeline.noises(plan))
        return pipeline.denoise(other, draw(), condition, text, other.residuals(), lambda index, expert: None, draw)

    return [latents(other).clone() for other in plans]


def given_images(plan: Plan) -> torch.Tensor:
    """Returns the images [n, 3, H, W] that a plan names, as its pipeline gets them."""
    loaded = [images.load_image(path).pixels for path in plan.config.video.images.values()]
    fitted = [pixels.fit_image(image, plan.geometry.width, plan.geometry.height) for image in loaded]
    return torch.stack(fitted) if fitted else torch.empty(0, 3, 0, 0)


def with_options(plan: Plan, **options: object) -> Plan:
    return dataclasses.replace(plan, config=plan.config.replace(**options))


def shown(value: Mesh | str) -> str:
    return f"cfg{value.cfg}-ulysses{value.ulysses}" if isinstance(value, Mesh) else value


@pytest.mark.parametrize(
    ("mesh", "fsdp"), [(Mesh(ulysses=4), "on"), (Mesh(cfg=2), "off"), (Mesh(cfg=2, ulysses=2), "on")], ids=shown
)
def test_every_mesh_gives_the_latents_of_one_rank(planned: tuple[Plan, ModelFiles], mesh: Mesh, fsdp: str) -> None:
    """A test below has a mesh of 8 ranks, and whole weights on 4 and 8."""
    plan, files = planned
    expected = final_latents(plan, files, Ranks("cpu"))
    plan = with_options(plan, dit_fsdp=fsdp, t5_fsdp=fsdp, artifacts_dir=f"artifacts-{fsdp}")
    got = on_ranks(mesh, lambda ranks: final_latents(plan, files, ranks))
    error = max(relative_error(latents, expected) for latents in got)
    print(f"{shown(mesh)}, FSDP {fsdp}: relative error of the final latents {error:.1e}")
    assert error <= 1e-5
    assert all(torch.equal(latents, got[0]) for latents in got)  # otherwise the ranks would drift apart


def test_sharded_weights_of_two_precisions_give_what_whole_ones_give(planned: tuple[Plan, ModelFiles]) -> None:
    """In bf16 a block has bf16 products and float32 norms; one FSDP2 unit holds both."""
    plan, files = planned
    plan = with_options(plan, precision="bf16")
    whole = on_ranks(Mesh(ulysses=2), lambda ranks: final_latents(plan, files, ranks))
    plan = with_options(plan, dit_fsdp="on", t5_fsdp="on", artifacts_dir="artifacts-sharded")
    sharded = on_ranks(Mesh(ulysses=2), lambda ranks: final_latents(plan, files, ranks))
    assert torch.equal(sharded[0], whole[0])


@pytest.mark.parametrize(
    ("mesh", "fsdp"),
    [
        (Mesh(ulysses=4), "off"),
        (Mesh(cfg=2, ulysses=4), "off"),
        pytest.param(Mesh(ulysses=8), "on", marks=pytest.mark.long),
    ],
    ids=shown,
)
def test_tokens_that_the_ranks_do_not_divide(mesh: Mesh, fsdp: str, small_model: Path, workdir: Path) -> None:
    Image.linear_gradient("L").resize((61, 97)).convert("RGB").save("tall.png")
    options = {"image": "tall.png", "size": "96x48", "prompt": "a", "seed": 1, "precision": "fp32", "device": "cpu"}
    plan, files = resolve({"model": str(small_model), "steps": 2, **options})
    assert plan.geometry.tokens % mesh.ulysses
    expected = final_latents(plan, files, Ranks("cpu"))
    plan = with_options(plan, dit_fsdp=fsdp, t5_fsdp=fsdp, artifacts_dir=f"artifacts-{fsdp}")
    got = on_ranks(mesh, lambda ranks: final_latents(plan, files, ranks))
    assert relative_error(got[0], expected) <= 1e-5
    assert all(torch.equal(latents, got[0]) for latents in got)


def test_branches_are_not_mixed_up(planned: tuple[Plan, ModelFiles]) -> None:
    """With the prompts exchanged, the parallel result differs by more than the other tests' bound."""
    plan, files = planned
    expected = final_latents(plan, files, Ranks("cpu"))
    exchanged = with_options(plan, prompt=plan.config.video.negative_prompt, negative_prompt=plan.config.video.prompt)
    got = on_ranks(Mesh(cfg=2), lambda ranks: final_latents(exchanged, files, ranks))
    assert relative_error(got[0], expected) > 1e-3


def test_steps_without_guidance_work_in_parallel_too(planned: tuple[Plan, ModelFiles]) -> None:
    plan, files = planned
    plan = with_options(plan, guidance_high_noise=1.0)
    expected = final_latents(plan, files, Ranks("cpu"))
    assert relative_error(on_ranks(Mesh(cfg=2), lambda ranks: final_latents(plan, files, ranks))[1], expected) <= 1e-5


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    def work(ranks: Ranks) -> str:
        def fails_on_one() -> None:
            if ranks.rank == 1:
                raise ConfigError("--output: the disk is full")

        try:
            ranks.together(fails_on_one)
        except ConfigError as error:
            return str(error)
        return "no error"

    assert on_ranks(Mesh(cfg=2, ulysses=2), work) == ["--output: the disk is full"] * 4


def test_prompts_are_dealt_to_the_ranks(planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned
    config = plan.config
    encoded: list[int] = []
    encode = prompt_embeds._encode
    monkeypatch.setattr(prompt_embeds, "_encode", lambda tokens, *a: encoded.append(len(tokens)) or encode(tokens, *a))
    texts = ["one", "two", "three"]

    def work(ranks: Ranks) -> tuple[int, list[float]]:
        found = prompt_embeds.prompt_embeds(texts, files, config, ranks, Stopwatch("cpu")).embeds
        return encoded[-1], [float(found[text].sum()) for text in texts]

    dealt = on_ranks(Mesh(ulysses=2), work)
    assert [count for count, _ in dealt] == [2, 1]
    assert dealt[0][1] == dealt[1][1]
    encoded.clear()
    again = prompt_embeds.prompt_embeds(texts, files, config, Ranks("cpu"), Stopwatch("cpu"))  # from the store
    assert [float(again.embeds[text].sum()) for text in texts] == dealt[0][1] and not encoded


def test_umt5_is_sharded_where_asked(planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned
    built: list[bool] = []
    build = prompt_embeds.build_umt5

    def spied(*arguments: object, sharded: bool) -> object:
        encoder = build(*arguments, sharded=sharded)
        built.append(all(isinstance(parameter, DTensor) for parameter in encoder.parameters()))
        return encoder

    monkeypatch.setattr(prompt_embeds, "build_umt5", spied)

    def work(ranks: Ranks, t5_fsdp: str) -> list[bool]:
        config = plan.config.replace(t5_fsdp=t5_fsdp, artifacts_dir=f"artifacts-{t5_fsdp}")
        prompt_embeds.prompt_embeds(["one", "two"], files, config, ranks, Stopwatch("cpu"))
        return built

    assert on_ranks(Mesh(cfg=2), lambda ranks: work(ranks, "on")) == [[True]] * 2
    assert on_ranks(Mesh(cfg=2), lambda ranks: work(ranks, "off")) == [[False]] * 2


@pytest.mark.parametrize("t5_fsdp", ["on", "off"])
def test_ranks_that_store_no_texts_all_get_them(planned: tuple[Plan, ModelFiles], t5_fsdp: str) -> None:
    plan, files = planned
    config = plan.config.replace(t5_fsdp=t5_fsdp)
    texts = ["one", "two", "three"]

    def work(ranks: Ranks) -> tuple[list[float], set[str]]:
        found = prompt_embeds.prompt_embeds(texts, files, config, ranks, Stopwatch("cpu"), most=1, stores=False)
        return [float(found.embeds[text].sum()) for text in texts], found.unstored

    first, second = on_ranks(Mesh(ulysses=2), work)
    assert first == second and first[1] == {*texts}
    assert not Path(config.models.artifacts_dir, "prompt_embeds").exists()


@torch.inference_mode()
def test_offloaded_experts_leave_the_device_to_the_decoder(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, files = planned
    plan = with_options(plan, expert_offload="on")
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    decode = WanVAE._decode
    held: list[int] = []

    def measured(self: WanVAE, *arguments: Any) -> torch.Tensor:
        held.append(sum(parameter.numel() for parameter in pipeline.experts._parameters.values()))
        return decode(self, *arguments)

    monkeypatch.setattr(WanVAE, "_decode", measured)
    image, text = blank_inputs(plan, files)
    videos = [frames_of(pipeline, plan, image, text) for _ in range(2)]
    assert held == [0] * 4  # two pieces of two videos
    assert np.array_equal(*videos)  # the weights come back


def out_of_memory(
    times: int, work: Callable[..., torch.Tensor], kind: type[RuntimeError] = torch.OutOfMemoryError
) -> Callable[..., torch.Tensor]:
    """Returns `work`, which fails the first `times` calls."""
    failures = iter(range(times))

    def failing(*arguments: object, **options: object) -> torch.Tensor:
        if next(failures, None) is not None:
            raise kind("a decoder is large: unable to find an engine to execute this computation")
        return work(*arguments, **options)

    return failing


@pytest.mark.parametrize(
    ("method", "times", "kind"), [("encode", 3, torch.OutOfMemoryError), ("_decode", 1, RuntimeError)]
)
def test_resident_experts_are_evicted_and_come_back(
    planned: tuple[Plan, ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    times: int,
    kind: type[RuntimeError],
) -> None:
    plan, files = planned
    compiler(monkeypatch, loading)
    plan = with_options(plan, compile=True)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    image, text = blank_inputs(plan, files)
    expected = frames_of(pipeline, plan, image, text)
    parameters = [parameter for expert in EXPERTS for parameter in pipeline.experts._experts[expert].parameters()]
    room = sum(parameter.nbytes for parameter in parameters[-3:])  # three at a time
    work, hosted = getattr(type(pipeline.vae), method), experts._to_host
    held: list[list[bool]] = []
    copied: list[torch.nn.Parameter] = []

    def measured(*arguments: object, **options: object) -> torch.Tensor:
        held.append([parameter.numel() > 0 for parameter in parameters])
        return work(*arguments, **options)

    def copy(new: list[torch.nn.Parameter], device: str) -> Iterator[torch.Tensor]:
        copied.extend(new)
        return hosted(new, device)

    monkeypatch.setattr(pipeline_module, "_EVICT_BYTES", room)
    monkeypatch.setattr(experts, "_to_host", copy)
    monkeypatch.setattr(pipeline_module, "free_bytes", lambda device: 1 << 30)
    for _ in range(2):
        monkeypatch.setattr(type(pipeline.vae), method, out_of_memory(times, measured, kind))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert np.array_equal(frames_of(pipeline, plan, image, text), expected)
    away = held[0].count(False)
    calls = 2 * (2 if method == "_decode" else 1)  # a video is decoded in two pieces
    assert away >= times and held == [[True] * (len(parameters) - away) + [False] * away] * calls  # needed last
    assert list(map(id, copied)) == list(map(id, parameters[: -away - 1 : -1]))  # each weight is copied once


def test_the_vae_has_its_memory_before_its_first_attempt(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos on a simulated GPU, which holds both experts, but not with all that the VAE needs."""
    plan, files = planned
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    parameters = [parameter for expert in EXPERTS for parameter in pipeline.experts._experts[expert].parameters()]
    needs = {
        "encode": memory.encode_bytes(files.spec, plan.geometry),
        "_decode": memory.decode_bytes(files.spec, plan.geometry, "fp32"),
    }
    gpu_bytes = sum(parameter.nbytes for parameter in parameters) + min(needs.values()) // 2
    calls: list[str] = []

    def free(device: str = "cuda") -> int:
        return gpu_bytes - sum(parameter.nbytes for parameter in parameters)

    def checked(name: str) -> Callable[..., torch.Tensor]:
        work = getattr(WanVAE, name)

        def call(*arguments: object, **options: object) -> torch.Tensor:
            calls.append(name)
            if free() < needs[name]:
                raise torch.OutOfMemoryError("too large")
            return work(*arguments, **options)

        return call

    monkeypatch.setattr(pipeline_module, "free_bytes", free)
    for name in needs:
        monkeypatch.setattr(WanVAE, name, checked(name))
    image, text = blank_inputs(plan, files)
    for _ in range(2):
        assert frames_of(pipeline, plan, image, text) is not None
    assert calls == 2 * ["encode", "_decode", "_decode"]  # a video is decoded in two pieces


Shared = tuple[torch.Tensor, pixels.Frames | None, int, list[str]]


@torch.inference_mode()
def by_the_vae(plan: Plan, files: ModelFiles, ranks: Ranks, *failures: Container[int]) -> list[Shared]:
    """Returns condition, frames, evicted weights and errors, for each container of numbers.

    The VAE's convolutions of these numbers fail on rank 1.
    """
    pipeline = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
    image, _ = blank_inputs(plan, files)
    g = plan.geometry
    latent = torch.randn(1, 16, g.latent_frames, g.latent_height, g.latent_width)
    return [shared(pipeline, image, latent, plan, ranks, fails_at) for fails_at in failures]


def shared(
    pipeline: VideoPipeline,
    image: torch.Tensor,
    latent: torch.Tensor,
    plan: Plan,
    ranks: Ranks,
    fails_at: Container[int],
) -> Shared:
    calls, errors, g = itertools.count(), [], plan.geometry

    def failing(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if ranks.rank == 1 and not x.is_meta and next(calls) in fails_at:
            raise torch.OutOfMemoryError("too large\nby far")
        return convolution.convolve(x, *arguments, **options)

    vae_module.convolve = failing  # in a fork
    while True:
        try:
            condition = pipeline.encode_condition(image, g)
            frames = pipeline.frames(latent, g, Stopwatch("cpu"))
            return condition, frames, len(pipeline.experts._evicted), errors
        except ConfigError as error:
            assert error.is_agreed
            errors.append(str(error))


def test_ranks_that_share_a_frame_begin_again_together(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out on one of three ranks, between two exchanges; a fourth rank has no part."""
    plan, files = planned
    monkeypatch.setattr(Ranks, "rows", lambda self, rows: SplitRows.of(self.rank, 3, rows))
    monkeypatch.setattr(pipeline_module, "_EVICT_BYTES", 1)
    torch.manual_seed(0)
    mesh = Mesh(ulysses=4)
    in_each = {0, 20, 60, 75, 110, 140}
    made = on_ranks(mesh, lambda ranks: by_the_vae(plan, files, ranks, (), in_each), timeout_s=20)
    expected, got = zip(*made, strict=True)
    assert [evicted for _, _, evicted, _ in got] == [0, len(in_each), 0, 0]
    assert all(torch.equal(own[0], other[0]) for own, other in zip(got, expected, strict=True))
    assert np.array_equal(got[0][1], expected[0][1]) and [errors for *_, errors in got] == [[]] * 4


class OtherRows:
    """Shares rows as `SplitRows` does, but is another class."""

    def __init__(self, rows: SplitRows) -> None:
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


@pytest.mark.parametrize("split", [None, OtherRows])
def test_ranks_that_share_a_frame_lose_only_the_video_that_does_not_fit(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch, split: type[OtherRows] | None
) -> None:
    """So it is with any class that shares the rows."""
    plan, files = planned
    if split is not None:
        monkeypatch.setattr(Ranks, "rows", lambda self, rows: split(SplitRows.of(self.rank, self.size, rows)))
    monkeypatch.setattr(experts, "available_host_bytes", lambda: 0)  # so nothing can be evicted
    got = on_ranks(Mesh(cfg=2), lambda ranks: by_the_vae(plan, files, ranks, {5, 100})[0], timeout_s=20)
    reason = "does not fit into memory beside the weights: use a smaller --size or fewer --frames (too large)"
    reason = f"--size 80x64 --frames 5: {reason}"
    assert [errors for *_, errors in got] == [[reason] * 2] * 2
    assert got[0][1] is not None


@pytest.fixture
def resident(planned: tuple[Plan, ModelFiles]) -> ResidentExperts:
    plan, files = planned
    experts = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu")).experts
    assert isinstance(experts, ResidentExperts)
    return experts


def test_as_much_is_evicted_as_is_asked_for_and_as_the_host_has_room_for(
    resident: ResidentExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = list(reversed(list(resident._experts["low_noise"].parameters())))
    two = last[0].nbytes + last[1].nbytes
    monkeypatch.setattr(experts, "available_host_bytes", lambda: experts._SLAB_BYTES + last[0].nbytes - 1)
    assert not resident.evict(last[0].nbytes) and not resident._evicted
    monkeypatch.setattr(experts, "available_host_bytes", lambda: experts._SLAB_BYTES + two)
    assert resident.evict(10**12) and resident._evicted == set(last[:2])
    resident.take("low_noise")
    monkeypatch.setattr(experts, "available_host_bytes", lambda: 10**12)
    assert resident.evict(two) and resident._evicted == set(last[:2])
    assert resident.evict(1) and resident._evicted == set(last[:3])
    resident.evict(10**12)
    assert not resident.evict(1)  # nothing is left
    resident.take("high_noise")
    assert resident._evicted == set(last)
    resident.take("low_noise")
    assert not resident._evicted
    monkeypatch.setattr(experts, "available_host_bytes", lambda: 0)
    assert resident.evict(10**12) and len(resident._evicted) > len(last)  # the host copy already exists


def test_a_host_that_pins_less_than_it_reports_loses_no_weight(
    resident: ResidentExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident._experts["low_noise"]
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty, slabs = torch.empty, iter(range(3))

    def pinned(*size: int, dtype: torch.dtype, **options: object) -> torch.Tensor:
        if dtype == torch.uint8 and size[0] and next(slabs, None) is None:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, dtype=dtype, **options)

    monkeypatch.setattr(experts, "_SLAB_BYTES", 1)  # one slab for each parameter
    monkeypatch.setattr(torch, "empty", pinned)
    assert resident.evict(10**12) and len(resident._evicted) == 3
    assert not resident.evict(10**12)
    resident.take("low_noise")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_an_eviction_hides_no_other_error(resident: ResidentExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(experts, "_to_host", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        resident.evict(10**12)


@pytest.mark.parametrize(
    ("options", "moves"),
    [({}, True), ({"compile": True, "compile_mode": "max-autotune"}, False), ({"dit_fsdp": "on"}, False)],
    ids=["plain", "graphs", "sharded"],
)
def test_weights_that_other_ranks_count_on_stay(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch, options: dict[str, str], moves: bool
) -> None:
    plan, files = planned
    monkeypatch.setattr(compilation, "_import_compiler", lambda gpu: None)  # no block runs
    config = plan.config.replace(**options)

    def evicts(ranks: Ranks) -> bool:
        return loading.load_models(files, config, ranks, Stopwatch("cpu")).experts.evict(1)

    assert on_ranks(Mesh(cfg=2), evicts) == [moves] * 2
    if "compile_mode" in options:
        assert evicts(Ranks("cpu"))  # one rank can record its graphs again


def test_an_error_that_is_not_of_memory_is_not_tried_again(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN also finds no engine for a product that it does not know; this was retried until nothing was left."""
    plan, files = planned
    image, text = blank_inputs(plan, files)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    monkeypatch.setattr(WanVAE, "_decode", out_of_memory(1, WanVAE._decode, RuntimeError))
    monkeypatch.setattr(ResidentExperts, "evict", lambda self, size: pytest.fail("evicted"))
    monkeypatch.setattr(pipeline_module, "free_bytes", lambda device: 60 << 30)
    with pytest.raises(RuntimeError, match="unable to find an engine") as error:
        frames_of(pipeline, plan, image, text)
    assert type(error.value) is RuntimeError


def test_a_decoder_that_does_not_fit_at_all_is_reported(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, files = planned
    image, text = blank_inputs(plan, files)
    decode = WanVAE._decode
    for times, host_bytes in ((3, 10**12), (1, 0)):  # nothing left to evict, and no host memory to evict to
        monkeypatch.setattr(experts, "available_host_bytes", lambda host_bytes=host_bytes: host_bytes)
        monkeypatch.setattr(WanVAE, "_decode", out_of_memory(times, decode))
        pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
        with pytest.raises(ConfigError, match=r"--size 80x64 --frames 5: does not fit") as caught:
            frames_of(pipeline, plan, image, text)
        assert caught.value.is_agreed  # so that only this video is lost


@torch.inference_mode()
def test_offloaded_experts_give_what_resident_ones_give(
    planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, files = planned
    expected = final_latents(plan, files, Ranks("cpu"))
    events: list[str] = []
    overwrite, forward = OffloadedExperts._overwrite, Block.forward

    def copied(self: OffloadedExperts, expert: str, chosen: Callable[[str], bool]) -> None:
        events.extend(f"{expert} {name}" for name in self._parameters if chosen(name))
        overwrite(self, expert, chosen)

    def ran(self: Block, *arguments: object) -> torch.Tensor:
        events.append("block")
        return forward(self, *arguments)

    monkeypatch.setattr(OffloadedExperts, "_overwrite", copied)
    monkeypatch.setattr(Block, "forward", ran)
    plan = with_options(plan, expert_offload="on")
    assert torch.equal(final_latents(plan, files, Ranks("cpu")), expected)
    # Each expert's weights are copied once, and each block of the second expert after that block's last forward.
    copies = [event for event in events if event != "block"]
    assert len(copies) == len(set(copies))
    steps, blocks, branches = len(plan.timesteps["high_noise"]), files.spec.dit.num_layers, 2
    for index in range(blocks):
        first = next(k for k, event in enumerate(events) if event.startswith(f"low_noise blocks.{index}."))
        assert events[:first].count("block") == steps * branches * blocks - blocks + index + 1


def test_the_default_mesh_of_this_model_uses_all_ranks() -> None:
    assert choose_mesh(8, 8) == Mesh(cfg=2, ulysses=4)


def test_an_expert_is_whole_again_after_a_step_that_broke_off(planned: tuple[Plan, ModelFiles]) -> None:
    """The step breaks off while the other expert takes its place."""
    plan, files = planned
    plan = with_options(plan, expert_offload="on")
    experts = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu")).experts
    model, overwrite_block = experts.take("high_noise", "low_noise")
    expected = [parameter.clone() for parameter in model.parameters()]
    overwrite_block(0)
    experts.take("high_noise")
    assert all(map(torch.equal, model.parameters(), expected))


def eleven_blocks() -> dict[Expert, WanDiT]:
    spec = dataclasses.replace(SPEC.dit, num_layers=11)
    experts: dict[Expert, WanDiT] = {"high_noise": WanDiT(spec), "low_noise": WanDiT(spec)}
    for seed, model in enumerate(experts.values()):
        randomise(model, seed)
    return experts


def test_a_block_hands_over_its_own_weights_alone() -> None:
    model, overwrite_block = OffloadedExperts(eleven_blocks(), "cpu").take("high_noise", "low_noise")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    overwrite_block(1)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.startswith("blocks.1.")}


def test_the_host_holds_each_expert_once() -> None:
    experts = eleven_blocks()
    OffloadedExperts(experts, "cpu")
    assert not any(parameter.numel() for model in experts.values() for parameter in model.parameters())
