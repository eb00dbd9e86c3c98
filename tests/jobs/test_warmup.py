"""Tests `wanfast warmup`: its artifact serves another process with empty caches, and only a matching one is used."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from tests.compiling import compile_before
from tests.configs import effective_config
from tests.conftest import Machine, Outcome
from tests.forked import REAL_LAUNCHERS, ForkedPopen
from tests.small_model import plan_small_model
from wanfast.commands import warmup
from wanfast.commands.report import Report
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe, compilation, loading
from wanfast.runtime.engine.compilation import cache_inputs
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.choices import Attention
from wanfast.runtime.jobs import warmup as rank_half
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning import devices
from wanfast.runtime.planning.next_step import warmup_command
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store import attention_plans, code, model_files
from wanfast.runtime.store.artifacts import Artifact, ArtifactStore, key_of

Wanfast = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]
SHAPE = (
    "--model",
    "tiny",
    "--device",
    "cpu",
    "--size",
    "64x64",
    "--frames",
    "5",
    "--image",
    "cat.png",
    "--precision",
    "fp32",
)
EAGER = ("generate", *SHAPE, "--prompt", "a cat", "--seed", "1", "--steps", "2", "--json")
GENERATE = (*EAGER, "--compile")
TWO = ("--num-gpus", "2", "--ulysses", "2", "--cfg-parallel", "1")
RANKS = {"1": (), "2": TWO, "2, sharded": (*TWO, "--dit-fsdp", "on")}

# After the document, this prints the counts of cache hits and misses.
COUNTED = """
import sys, torch
from torch._dynamo.utils import counters
from wanfast.cli import main
torch._dynamo.reset()
torch._dynamo.config.error_on_recompile = ONE_GRAPH  # for both experts
counters.clear()
try:
    main(sys.argv[1:])
finally:
    print({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}, file=sys.stderr)
"""


def in_a_process_of_its_own(folder: Path, *arguments: str, forked: bool = True, one_graph: bool = True) -> Outcome:
    """Runs with Inductor's caches empty, like on a machine that never compiled."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    shutil.rmtree(folder / "inductor", ignore_errors=True)
    environment = os.environ | caches | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"ONE_GRAPH = {one_graph}\n{COUNTED}", *arguments]
    if forked:
        compilation._import_compiler(None)  # once, for all processes to come
        compile_before()
    popen = ForkedPopen if forked else subprocess.Popen
    with popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as process:
        out, err = process.communicate()
    return Outcome(process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.long), "2, sharded"])
def test_another_process_starts_from_what_was_stored(wanfast: Wanfast, workdir: Path, ranks: str) -> None:
    """Its video is that of blocks that are not compiled, also where ranks exchange tokens inside the graph."""
    warmed = in_a_process_of_its_own(workdir, "warmup", *SHAPE, *RANKS[ranks], "--json")
    assert warmed.exit_code == 0, warmed.err
    assert any("compiling" in file.read_text() for file in workdir.glob("artifacts/runs/*/progress/*.json"))
    folder = Path(warmed.document["output"])
    assert folder.parent == workdir / "artifacts" / "inductor" and not warmed.document["was_there"]
    assert warmed.document["compiled_anew"] == 1
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["manifest.json", *(f"rank-{rank}.bin" for rank in range(int(ranks[0])))]

    made = in_a_process_of_its_own(workdir, *GENERATE, *RANKS[ranks], forked=ranks != "1")
    assert made.exit_code == 0, made.err
    assert made.document["compile_cache"] == folder.name
    assert made.document["compiled_anew"] == 0  # on every rank
    assert "wanfast warmup" not in made.err
    assert made.document["plan"]["compile"] == "default"
    assert wanfast(*EAGER, "--output", "eager.mp4").exit_code == 0
    check_same_frames(workdir / "out.mp4", workdir / "eager.mp4")
    if ranks == "1":  # with several ranks the parent has no counters
        assert "{'hit': 1, 'miss': 0, 'bypass': 0}" in made.err
        again = in_a_process_of_its_own(workdir, "warmup", *SHAPE, "--json")
        assert again.document["was_there"] and again.document["output"] == str(folder)
        assert again.document["compiled_anew"] == 0

        kept = folder / "rank-0.bin"
        kept.write_bytes(kept.read_bytes()[:-1] + b"!")  # of the same size
        cold = in_a_process_of_its_own(workdir, *GENERATE, "--overwrite")
        assert f"note: {folder} was changed after it was made: it is made again" in cold.err
        check_cold_run(cold, workdir)


SPARSE = ("--attention", "sparse", "--density", "0.5")
FP8 = ("--attention", "fa3-fp8", "--attention-check")


@pytest.mark.parametrize(
    ("options", "of_run", "graphs"),
    [
        pytest.param(SPARSE, ("--dense-layers", "0"), 1, marks=pytest.mark.slow, id="sparse"),
        pytest.param(FP8, ("--fp8-steps", "1:2"), 2, marks=pytest.mark.long, id="fp8"),
    ],
)
def test_lossy_attention_starts_from_what_was_stored(
    workdir: Path, options: tuple[str, ...], of_run: tuple[str, ...], graphs: int
) -> None:
    """Whichever calls of the video are lossy. Exact attention has another artifact."""
    warmed = in_a_process_of_its_own(workdir, "warmup", *SHAPE, *options, "--json")
    assert warmed.exit_code == 0, warmed.err
    assert warmed.document["compiled_anew"] == graphs and {"first", "second", "lossy"} == {*warmed.document["seconds"]}
    assert ", forwards with lossy attention " in warmed.err
    made = in_a_process_of_its_own(workdir, *GENERATE, *options, *of_run, one_graph=graphs == 1)
    assert made.exit_code == 0, made.err
    assert made.document["compile_cache"] == Path(warmed.document["output"]).name
    assert made.document["compiled_anew"] == 0
    exact = inputs_of(precision="fp32")
    assert ArtifactStore(workdir / "artifacts").find(compilation.KIND, exact) is None


def stored_plan(key_of_run: dict[str, Any], *heads: Any) -> str:
    """Stores a plan of attention for some other run, in which all layers have these heads, and returns its key."""

    def write(folder: Path) -> None:
        document = {"bands": [0, 2], "densities": [[heads] * 5] * 2}
        errors = dict.fromkeys(("target_error", "mean_error", "largest_error"), 0.1)
        (folder / attention_plans.PLAN).write_text(json.dumps(document | errors))

    return ArtifactStore(Path("artifacts")).publish(attention_plans.KIND, key_of_run, write).folder.name


def test_a_plan_of_attention_is_warmed_by_its_key(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be for any weights, steps and sizes; a plan with heads in float8 needs another package on a GPU."""
    options = {"model": "tiny", "device": "cpu", "attention": "sparse"}
    words = "no plan has this key: run `wanfast calibrate-attention`"
    with pytest.raises(MissingArtifactError, match=words):
        warmup.planned({**options, "attention_plan": "012345abcdef"})
    needed: list[str] = []
    monkeypatch.setattr(devices, "require_fp8", lambda device, option: needed.append(option))
    sparse, eight = stored_plan({"n": 1}, 0.5, None), stored_plan({"n": 2}, "fp8", 0.5)
    plan, _ = warmup.planned({**options, "attention_plan": sparse})
    assert plan.config.models.attention_plan == sparse and plan.config.models.density is None and not needed
    warmup.planned({**options, "attention_plan": eight})
    assert needed == [f"--attention-plan {eight}"]
    for asked, error, wrong in (
        ("artifact", ConfigError, "this command cannot tell which plan fits a run: use --attention-plan with one of"),
        (
            "012345abcdef",
            MissingArtifactError,
            f"no plan has this key: use --attention-plan with one of the keys .*{eight}",
        ),
    ):
        with pytest.raises(error, match=f"--attention-plan {asked}: {wrong}"):
            warmup.planned({**options, "attention_plan": asked})
    file = workdir / "artifacts" / attention_plans.KIND / eight / attention_plans.PLAN
    file.write_text(file.read_text().replace("0.5", "0.35"))
    outcome = wanfast("warmup", *SHAPE, "--attention", "sparse", "--attention-plan", eight)
    assert outcome.exit_code == 4 and "remove this folder, and run `wanfast calibrate-attention`" in outcome.err


@torch.inference_mode()
def test_a_warmup_computes_the_densities_of_its_plan(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = stored_plan({"n": 1}, "fp8", 0.5)
    plan, image_size = warmup.planned(
        {"model": "tiny", "device": "cpu", "size": "64x64", "frames": 5, "attention": "sparse", "attention_plan": key}
    )
    seen: list[Any] = []
    monkeypatch.setattr(rank_half, "_forward", lambda plan, *a: seen.append(plan.sparsity))
    monkeypatch.setattr(rank_half, "save_caches", lambda store, inputs, ranks: Artifact(workdir, made_here=True))
    monkeypatch.setattr(attention_probe, "require_fp8", lambda *a: seen.append("fp8"))
    job = dataclasses.replace(plan.job(), image_size=image_size)
    rank_half._warm(job, Ranks("cpu"), lambda stage: None)
    assert seen[0] == "fp8" and seen[1].listed(0, 0) == (0, 1) and seen[1].bands == (0, 2)


def check_same_frames(*videos: Path) -> None:
    compiled, eager = (iio.imread(video, plugin="pyav").astype(int) for video in videos)
    difference = np.abs(eager - compiled)  # the mp4 spreads a value that rounds otherwise over its block
    assert (difference > 4).mean() < 1e-3 and difference.max() <= 16, (difference.max(), (difference > 4).sum())


def check_cold_run(cold: Outcome, workdir: Path) -> None:
    """Checks that a run that compiled says what would save this."""
    assert cold.exit_code == 0, cold.err
    assert cold.document["compile_cache"] is None and "'miss': 1" in cold.err
    (line,) = [line for line in cold.err.splitlines() if "compiling took" in line]
    seconds = float(line.split("compiling took ")[1].split(" s")[0])
    assert 0.5 <= seconds <= cold.document["first_step_s"] + 0.05  # the line rounds to a tenth
    command = line.split("`")[1]
    image = workdir / "cat.png"
    expected = f"wanfast warmup --model tiny --attention flash --precision fp32 --image {image} --size 64x64 --frames 5"
    assert command == f"{expected} --device cpu"


@pytest.mark.parametrize("option", ["force_disable_caches", "fx_graph_cache"])
def test_either_option_of_torch_disables_its_caches(option: str) -> None:
    config = torch._inductor.config
    compilation.check_caches()
    with config.patch({option: not getattr(config, option)}), pytest.raises(ConfigError, match="are disabled: unset"):
        compilation.check_caches()


def test_a_torch_that_stores_nothing_is_reported_before_it_compiles(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "TORCHINDUCTOR_FX_GRAPH_CACHE"
    monkeypatch.setenv(variable, "0")
    monkeypatch.setenv(REAL_LAUNCHERS, "1")
    refused = in_a_process_of_its_own(workdir, "warmup", *SHAPE)
    assert refused.exit_code == 2 and f"and {variable}" in refused.err
    told = [file.read_text() for file in workdir.glob("artifacts/runs/*/progress/*.json")]
    assert not any("compiling" in text for text in told)


@pytest.mark.parametrize("name", ["rank-1.bin", "rank-0.bin"])
def test_an_artifact_that_is_of_no_use_is_discarded(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its hashes are right, but it lacks this rank's file, or torch cannot read the file."""
    store, inputs = ArtifactStore(tmp_path), inputs_of()
    folder = store.publish(compilation.KIND, inputs, lambda part: (part / name).write_bytes(b"x") and None).folder
    assert compilation.load_caches(store, inputs, Ranks("cpu"), is_named=True) is None
    assert f"note: {folder}: torch cannot use this stored cache" in capsys.readouterr().err and not folder.exists()


def test_a_useless_artifact_that_cannot_be_discarded_costs_no_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, inputs = ArtifactStore(tmp_path), inputs_of()
    folder = store.publish(compilation.KIND, inputs, lambda part: (part / "rank-1.bin").touch()).folder
    folder.with_suffix(".lock").unlink()
    folder.with_suffix(".lock").mkdir()  # which no process can lock
    assert compilation.load_caches(store, inputs, Ranks("cpu"), is_named=True) is None
    assert "every run recompiles the blocks until this folder is removed" in capsys.readouterr().err


def test_what_compiling_cost_is_counted_by_forwards(
    wanfast: Wanfast, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later steps that skip forwards take less time, also without any compiler."""
    steps = ("--steps", "40", "--magcache", "E024K4R10", "--magcache-rule", "both-experts")
    plan = wanfast(*GENERATE, *steps, "--dry-run").document["plan"]
    forwards = 80 - plan["magcache"]["skipped_forwards"]
    assert forwards < 40
    result = {
        "plan": plan, "effective": config(compile=True).to_json(), "compiled_anew": 1,
        "first_step_s": 2 + 5.0, "seconds": {"denoise": forwards + 5.0},
    }  # fmt: skip
    Report(as_json=False)._note_compile_time(result, "")
    assert "compiling took 5.0 s of this run" in capsys.readouterr().err


def test_the_command_names_the_ranks_that_ran() -> None:
    """Not those that were asked for: what decides anew might decide otherwise."""
    effective = config(num_gpus=8, ulysses=2, cfg_parallel=1, dit_fsdp="on", device="cuda")
    words = warmup_command(effective).split(" --")
    assert {"num-gpus 2", "ulysses 2", "cfg-parallel 1", "dit-fsdp on"} <= set(words)


def test_the_command_names_lossy_attention() -> None:
    """But not which calls are lossy, because this changes nothing that is compiled."""
    sparse = config(attention="sparse", density=0.5, dense_layers=2, lists_every=2)
    assert "--attention sparse --density 0.5" in warmup_command(sparse)
    planned = config(attention="sparse", attention_plan="012345abcdef", dense_share=0.0)
    assert "--attention sparse --attention-plan 012345abcdef" in warmup_command(planned)
    in_fp8 = config(attention="fa3-fp8", attention_check=True, fp8_hadamard=False, fp8_steps="1:2")
    command = warmup_command(in_fp8)
    assert "--attention fa3-fp8 --no-fp8-hadamard --attention-check" in command
    for name in ("--dense", "--lists-every", "--fp8-steps"):
        assert name not in warmup_command(sparse) + warmup_command(planned) + command


def test_the_compiler_is_imported_while_weights_are_read(
    small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, files = plan_small_model(small_model)
    build, began, reading, imported = loading.build_expert, Event(), Event(), Event()

    def import_compiler(gpu: int | None) -> None:
        began.set()
        assert reading.wait(10)
        imported.set()

    def build_expert(*arguments: Any, **options: Any) -> WanDiT:
        assert began.wait(10)
        reading.set()
        return build(*arguments, **options)

    monkeypatch.setattr(compilation, "_import_compiler", import_compiler)
    monkeypatch.setattr(loading, "build_expert", build_expert)
    monkeypatch.setattr(loading, "compile_blocks", lambda model, mode: compiled.append(imported.is_set()))
    compiled: list[bool] = []
    loading.load_models(files, plan.config.replace(compile=True), Ranks("cpu"), Stopwatch("cpu"))
    assert compiled == [True, True]


def test_the_compiler_is_imported_where_nothing_else_imports_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_compiler(gpu: int | None) -> None:
        raise ImportError("in a thread")

    monkeypatch.setattr(compilation, "_import_compiler", import_compiler)
    for apart in ({"compile": False}, {"dit_fsdp": "on"}, {"quantize": "int8-dynamic", "quantize_on_the_fly": True}):
        with compilation.compiler_imported_meanwhile(config(**{"compile": True, **apart})):
            pass
    with pytest.raises(ImportError, match="in a thread"), compilation.compiler_imported_meanwhile(config(compile=True)):
        pass


def config(**changes: Any) -> EffectiveConfig:
    return effective_config(**{"attention": "flash", "compile": True, **changes})


def inputs_of(dit: dict[str, int] | None = None, exact: Attention = "flash", **changes: Any) -> dict[str, Any]:
    """Returns the inputs of a video of the tiny model, with other facts of its experts (`dit`) and other options."""
    spec = model_files.locate("tiny", "").spec
    spec = dataclasses.replace(spec, dit=dataclasses.replace(spec.dit, **(dit or {})))
    return cache_inputs(Plan.of(config(**changes), spec, (64, 64)), exact)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp32"},
        {"attention": "math"},
        {"quantize": "int8-dynamic"},
        {"tf32": False},
        {"compile_mode": "max-autotune"},
        {"cfg_parallel": 2},
        {"ulysses": 2},
        {"dit_fsdp": "on"},
        {"attention": "sparse", "density": 0.5},
        {"attention": "fa3-fp8"},
    ],
    ids=str,
)
def test_all_that_kernels_depend_on_is_in_the_key(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of()
    assert inputs_of(**change) != inputs
    assert inputs_of(frames=9) != inputs
    for place, part, other in (
        (compilation, "_processor", lambda: "x86_64 VecAVX2"),
        (compilation, "version_of", lambda package: "0.0"),
        (torch, "get_num_threads", lambda: 99),
        (torch, "__version__", "0.0"),
        (platform, "python_version", lambda: "2.7"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, part, other)
            assert inputs_of() != inputs
    assert inputs_of({"ffn_dim": 8}) != inputs
    assert inputs_of(seed=2, steps=9, prompt="other") == inputs
    assert inputs_of({"num_layers": 8}) == inputs
    json.dumps(inputs)


def test_what_lossy_graphs_depend_on_is_in_the_key() -> None:
    """Not which calls are lossy, nor how: a graph of sparse attention asks the running video."""

    def key(exact: Attention = "flash", **options: Any) -> str:
        return key_of(inputs_of(exact=exact, **options))

    sparse = {"attention": "sparse", "density": 0.5}
    others = ({"density": 0.3}, {"dense_share": 0.0}, {"attention_check": True}, {"dense_layers": 3, "lists_every": 2})
    assert {key(**{**sparse, **other}) for other in others} == {key(**sparse)}
    in_fp8 = {"attention": "fa3-fp8"}
    for same in ({"fp8_hadamard": True}, {"fp8_steps": "0:1"}, {"fp8_layers": "0:1"}):  # 128 channels a head
        assert key(**in_fp8, **same) == key(**in_fp8)
    keys = {key(**in_fp8), key(**in_fp8, fp8_hadamard=False), key(**in_fp8, attention_check=True), key(**sparse)}
    assert len({*keys, key("math", **in_fp8), key("math", **sparse)}) == 6


def test_other_sources_are_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of()
    runtime = shutil.copytree(Path(compilation.__file__).parents[1], tmp_path / "runtime")
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    monkeypatch.setattr(compilation, "digest_of_code", code.digest_of_code.__wrapped__)  # remembers nothing
    assert inputs_of() == inputs
    known = {inputs["sources"]}
    for file in (
        "models/dit.py",
        "distributed/ulysses.py",
        "engine/compilation.py",
        "weights/quantization.py",
        "store/quantized.py",
    ):
        (runtime / file).write_text((runtime / file).read_text() + "# another\n")
        known.add(inputs_of()["sources"])
    assert len(known) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "gone.png"], "--image"),
        (["--frames", "6"], "--frames 6"),
        (["--num-gpus", "4", "--ulysses", "3"], "--ulysses 3 does not fit"),
        (["--attention", "fa3"], "--attention fa3 needs a GPU"),
        (["--tf32"], "--tf32 needs a GPU"),
        (["--attention", "sparse"], "--attention sparse needs --density or --attention-plan"),
        (["--attention", "sparse", "--density", "1", "--attention-plan", "artifact"], "exclude each other"),
        (["--fp8-hadamard"], "--fp8-hadamard needs --attention fa3-fp8"),
    ],
    ids=str,
)
def test_what_cannot_be_warmed_is_refused(wanfast: Wanfast, workdir: Path, options: list[str], words: str) -> None:
    outcome = wanfast("warmup", *SHAPE, *options)
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err
    assert not (workdir / "artifacts" / "inductor").exists()


def test_a_warmup_for_gpus_is_refused_without_one(wanfast: Wanfast, machine: Machine) -> None:
    machine(0, 0, host_gb=10)
    outcome = wanfast("warmup", "--size", "1280x720")
    assert outcome.exit_code == 2 and len(outcome.err.splitlines()) == 1
    assert "no GPU was found" in outcome.err and "add --device cpu" in outcome.err
    warmup.planned({"device": "cpu", "size": "1280x720"})  # one block of the experts fits into 10 GB


def test_a_signal_ends_a_warmup_whatever_it_computes(workdir: Path) -> None:
    command = [sys.executable, "-m", "wanfast", "warmup", "--device", "cpu", "--size", "640x352", "--frames", "17"]
    with ForkedPopen(command, cwd=workdir, stderr=subprocess.PIPE, text=True) as process:
        while not list(workdir.glob("artifacts/runs/*/progress/*.json")):
            time.sleep(0.1)
        process.terminate()
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - started < 20
    assert "terminated" in err


def test_code_that_others_could_have_written_is_loaded_only_from_a_named_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, inputs = ArtifactStore(tmp_path / "artifacts"), {"versions": {}, "n": 1}
    loaded: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or "info")
    folder = store.publish(
        compilation.KIND, inputs, lambda part: (part / "rank-0.bin").write_bytes(b"x") and None
    ).folder

    def load(*, is_named: bool) -> str | None:
        return compilation.load_caches(store, inputs, Ranks("cpu"), is_named=is_named)

    for path in (folder / "rank-0.bin", folder / "manifest.json", folder, folder.parent, store.root):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        assert load(is_named=False) is None and not loaded
        assert f"note: other users can write {path}: compiled code is not loaded" in capsys.readouterr().err
        assert load(is_named=True) == folder.name and loaded.pop() == b"x"
        path.chmod(mode)
    assert load(is_named=False) == folder.name and loaded.pop() == b"x"
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if os.getuid():
        assert load(is_named=False) is None and "belongs to another user" in capsys.readouterr().err
