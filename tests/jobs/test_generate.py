"""Tests `wanfast generate` with the tiny model up to the file: the same code path as A14B, on a CPU."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shlex
import shutil
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome
from wanfast.commands import report
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.engine import pipeline, pixels, prompt_embeds, session
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.jobs import generate
from wanfast.runtime.media import video_file
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning import completed
from wanfast.runtime.store import model_files

Wanfast = Callable[..., Outcome]
SMALL = ("--size", "64x64", "--frames", "5", "--steps", "4", "--device", "cpu")
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", *SMALL)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "artifacts")


def test_a_video_its_json_and_its_contact_sheet(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*GOOD, "--contact-sheet", "--json")
    assert outcome.exit_code == 0, outcome.err
    assert visible(workdir) == ["cat.png", "out.json", "out.mp4", "out.png"]

    frames = iio.imread("out.mp4", plugin="pyav")
    assert frames.shape == (5, 48, 64, 3)
    assert iio.immeta("out.mp4", plugin="pyav")["fps"] == 16
    assert Image.open("out.png").size == (4 * 64, 2 * 48)

    document = json.loads((workdir / "out.json").read_text(encoding="utf-8"))
    assert document == outcome.document
    assert document["output_sha256"] == sha256(workdir / "out.mp4")
    assert document["effective"]["video"]["image_sha256"] == sha256(workdir / "cat.png")
    assert set(document["seconds"]) == {"text", "load", "encode", "denoise", "decode", "write", "total"}
    assert document["peak_memory_bytes"] > 1e6
    assert document["versions"]["torch"]
    assert "the video is 64x48, not 64x64" in outcome.err

    (run,) = (workdir / "artifacts" / "runs").glob("*/")
    asked = json.loads((run / "job.json").read_text())["jobs"][0]["effective"]
    asked["models"]["attention"] = "flash"
    assert asked == document["effective"]
    assert json.loads((run / "result.json").read_text()) == [document]
    assert json.loads((run / "results/0.json").read_text()) == document


def test_from_reproduces_the_video_bit_for_bit(wanfast: Wanfast, workdir: Path) -> None:
    assert wanfast(*GOOD, "--solver", "dpm++", "--guidance-high-noise", "2").exit_code == 0
    refused = wanfast("generate", "--from", "out.json")
    assert refused.exit_code == 2 and "--overwrite" in refused.err
    assert wanfast("generate", "--from", "out.json", "--output", "again.mp4").exit_code == 0
    assert sha256(workdir / "again.mp4") == sha256(workdir / "out.mp4")
    assert wanfast("generate", "--from", "out.json", "--output", "other.mp4", "--seed", "2").exit_code == 0
    assert sha256(workdir / "other.mp4") != sha256(workdir / "out.mp4")


def test_every_number_reaches_the_video(wanfast: Wanfast, workdir: Path) -> None:
    """Each option that shapes the video changes it when only that option changes."""
    changes = {
        "plain": [],
        "prompt": ["--prompt", "a dog"],
        "negative": ["--negative-prompt", "blurred"],
        "steps": ["--steps", "5"],
        "shift": ["--shift", "3"],
        "high": ["--guidance-high-noise", "1"],
        "low": ["--guidance-low-noise", "1"],
        "solver": ["--solver", "euler"],
        "precision": ["--precision", "fp32"],
        "fps": ["--fps", "8"],
    }
    lines = []
    for name, arguments in changes.items():
        options = dict(zip((a[2:].replace("-", "_") for a in arguments[::2]), arguments[1::2], strict=True))
        numbers = {"steps": int, "shift": float, "guidance_high_noise": float, "guidance_low_noise": float, "fps": int}
        lines.append(json.dumps({k: numbers.get(k, str)(v) for k, v in options.items()} | {"output": f"{name}.mp4"}))
    (workdir / "jobs.jsonl").write_text("\n".join(lines))
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 0, outcome.err
    assert len({sha256(workdir / f"{name}.mp4") for name in changes}) == len(changes)


def noted(event: str) -> None:
    """Appends an event to a file, because a list runs in a process of its own."""
    with Path("artifacts/events").open("a") as stream:
        stream.write(f"{event}\n")


def events() -> list[str]:
    return Path("artifacts/events").read_text().splitlines()


def test_jobs_load_the_models_once_and_outlive_bad_lines(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_models = session.load_models
    monkeypatch.setattr(session, "load_models", lambda *a: noted("load") or load_models(*a))

    class NotFull(video_file.Mp4Writer):
        def __init__(self, path: Path, fps: int) -> None:
            if "full.mp4" in path.name:
                raise ConfigError("--output full.mp4: no space left on the disk: free some")
            super().__init__(path, fps)

    monkeypatch.setattr(video_file, "Mp4Writer", NotFull)
    lines = ['{"seed": 1}', '{"frames": 6}', '{"output": "full.mp4"}', '{"seed": 2}']
    (workdir / "jobs.jsonl").write_text("\n".join(lines))
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--json")
    assert outcome.exit_code == 6
    assert events() == ["load"]
    assert visible(workdir) == [
        "cat.png", "jobs.jsonl", "out-0001.json", "out-0001.mp4", "out-0004.json", "out-0004.mp4"
    ]  # fmt: skip
    assert [("error" in result) for result in outcome.document["results"]] == [False, True, True, False]
    assert "error (line 2): --frames 6" in outcome.err
    assert "error (line 3): --output full.mp4: no space" in outcome.err


def test_known_prompts_need_no_text_encoder(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanfast(*GOOD).exit_code == 0
    monkeypatch.setattr(prompt_embeds, "build_umt5", lambda *a, **k: pytest.fail("UMT5 was loaded"))
    assert wanfast(*GOOD, "--output", "again.mp4").exit_code == 0
    # bf16 embeddings differ from fp32 ones, so the key is another one
    with pytest.raises(pytest.fail.Exception):
        wanfast(*GOOD, "--output", "fp32.mp4", "--precision", "fp32")


def test_lines_may_name_models_of_their_own(
    wanfast: Wanfast, workdir: Path, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forget_cuda_graphs", "free_memory", "prepare"):
        work = getattr(session.hardware, name)
        monkeypatch.setattr(session.hardware, name, lambda *a, name=name, work=work: noted(name) or work(*a))
    (workdir / "jobs.jsonl").write_text(f'{{"output": "a.mp4"}}\n{{"output": "b.mp4", "model": "{tiny_copy}"}}\n')
    assert wanfast(*GOOD, "--jobs", "jobs.jsonl").exit_code == 0
    assert sha256(workdir / "a.mp4") == sha256(workdir / "b.mp4")
    freed = ["forget_cuda_graphs", "free_memory"]
    assert events() == ["prepare", *freed, "prepare"]  # the last models are freed by the end of the process
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--num-gpus", "2", "--dry-run", "--json", "--overwrite")
    assert outcome.exit_code == 0  # on several ranks too


def test_lines_share_models_that_are_loaded_alike(wanfast: Wanfast) -> None:
    document = wanfast(*GOOD, "--dry-run", "--json").document
    config = EffectiveConfig.from_json(document["effective"])
    own = (
        {"precision": "fp32"}, {"quantize": "int8-dynamic"}, {"quantize": "int8-dynamic", "quantize_on_the_fly": True},
        {"attention": "math"}, {"tf32": True}, {"compile": True}, {"compile": True, "compile_mode": "max-autotune"},
        {"artifacts_dir": "elsewhere"}, {"model": "a14b"},
    )  # fmt: skip
    kinds = {config.replace(**options).models for options in own}
    assert len(kinds | {config.models}) == len(own) + 1
    for name, value in {"seed": 9, "size": "96x96", "steps": 3, "prompt": "a dog", "output": "b.mp4"}.items():
        assert config.replace(**{name: value}).models == config.models


@pytest.mark.parametrize("damaged", [lambda data: data[:10], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_changed_embeddings_are_made_again(wanfast: Wanfast, workdir: Path, damaged: Callable[[bytes], bytes]) -> None:
    assert wanfast(*GOOD).exit_code == 0
    file = next((workdir / "artifacts/prompt_embeds").rglob("embeds.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(damaged(whole))
    outcome = wanfast(*GOOD, "--output", "again.mp4")
    assert outcome.exit_code == 0
    assert f"note: {file.parent} was changed after it was made: it is made again" in outcome.err
    assert file.read_bytes() == whole
    assert (workdir / "again.mp4").read_bytes() == (workdir / "out.mp4").read_bytes()


def test_a_group_can_share_all_that_a_run_writes(wanfast: Wanfast, workdir: Path) -> None:
    there, before = set(workdir.rglob("*")), os.umask(0o002)
    try:
        assert wanfast(*GOOD, "--contact-sheet").exit_code == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in set(workdir.rglob("*")) - there}
    assert len(modes) > 10 and modes == {path: 0o775 if path.is_dir() else 0o664 for path in modes}


@pytest.mark.parametrize(
    ("name", "kind", "code"), [("job.json", "error", 2), ("result.json", "note", 0), ("0.json", "note", 0)]
)
def test_a_disk_that_fills_up_is_one_line(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, code: int
) -> None:
    """The disk of the artifacts is full from the file `name` of the run folder on; a video that is made stays."""
    open_ = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name.strip(".").startswith(name) and "w" in mode:
            raise OSError(28, "No space left on device")
        return open_(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == code and (workdir / "out.mp4").exists() == (code == 0)
    said = outcome.err.strip().splitlines()[-1]
    assert said.startswith(f"{kind}: --artifacts-dir {workdir}/artifacts/runs/") and name in said
    assert "cannot be written (No space left on device); free some space" in said


@pytest.fixture
def tiny_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(model_files.TINY, tmp_path_factory.mktemp("copy") / "tiny"))


def test_broken_weights_name_the_file_and_leave_no_video(wanfast: Wanfast, workdir: Path, tiny_copy: Path) -> None:
    here = [*GOOD, "--model", str(tiny_copy)]
    file = tiny_copy / "transformer_2/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file)
    outcome = wanfast(*here)
    assert (outcome.exit_code, outcome.out) == (4, "")
    assert "missing tensor 'proj_out.bias'" in outcome.err and str(file) in outcome.err

    file.write_bytes(b"\0" * 100)
    assert wanfast(*here).exit_code == 4
    file.unlink()
    outcome = wanfast(*here)
    assert outcome.exit_code == 3 and "transformer_2" in outcome.err
    (tiny_copy / "wanfast.json").write_text('{"colour": "red"}')
    assert wanfast(*here).exit_code == 4
    assert visible(workdir) == ["cat.png"]


def test_other_weights_than_those_of_the_run_are_said(wanfast: Wanfast, tiny_copy: Path) -> None:
    assert wanfast(*GOOD, "--model", str(tiny_copy)).exit_code == 0
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    assert "the weights changed" in wanfast("generate", "--from", "out.json", "--output", "b.mp4", "--dry-run").err


def test_other_engines_than_those_of_the_run_are_said(wanfast: Wanfast, workdir: Path) -> None:
    """As where the folder `cudnn` of the artifacts was removed, on a GPU."""
    made = wanfast(*GOOD, "--json").document
    for engines in (None, "0123456789ab"):
        (workdir / "out.json").write_text(json.dumps(made | {"cudnn_engines": engines}))
        for options, same in (([], True), (["--seed", "5"], False)):
            outcome = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--overwrite", *options)
            assert outcome.exit_code == 0, outcome.err
            assert ("cuDNN uses other engines than in the earlier run" in outcome.err) == (engines is not None and same)


def test_an_image_that_changes_after_the_plan_is_refused(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_models = session.load_models

    def load_and_change(*arguments: object) -> object:
        Image.new("RGB", (64, 48)).save("cat.png")
        return load_models(*arguments)

    monkeypatch.setattr(session, "load_models", load_and_change)
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 2 and "changed since the plan" in outcome.err
    assert visible(workdir) == ["cat.png"]


def test_interrupted_leaves_nothing_and_exits_130(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(video: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pixels, "_as_bytes", interrupt)
    outcome = wanfast(*GOOD, "--json")
    assert outcome.exit_code == outcome.document["exit_code"] == 130
    assert "interrupted" in outcome.err
    assert visible(workdir) == ["cat.png"]


@pytest.mark.parametrize(("options", "named"), [((), True), (("--overwrite",), False)], ids=["new", "overwrite"])
def test_an_interrupted_list_says_how_to_go_on(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], named: bool
) -> None:
    (workdir / "jobs.jsonl").write_text('{"seed": 1}\n{"seed": 2}\n')
    line = (*GOOD, "--steps", "1", "--jobs", "jobs.jsonl", *options)
    monkeypatch.setattr(sys, "argv", ["wanfast", *line])
    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        outcome = wanfast(*line)
    again = f"; to continue, run `{shlex.join(['wanfast', *line])} --skip-existing`" if named else ""
    assert outcome.exit_code == 130 and f"note: videos made: 1 of 2{again}\n" in outcome.err
    if named:
        rest = wanfast(*line, "--skip-existing")
        assert rest.exit_code == 0 and "out-0001.mp4: the video exists, skipped" in rest.out
        assert (workdir / "out-0002.mp4").exists()


def test_terminated_leaves_nothing_and_exits_143(workdir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "wanfast", *GOOD, "--steps", "1000"],
        cwd=workdir,
        env=os.environ | {"PYTHONPATH": str(Path(generate.__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(workdir.glob("artifacts/runs/*/job.json")):  # until the run has begun
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "terminated" in err
    assert visible(workdir) == ["cat.png"]


@pytest.mark.parametrize("where", ["load_models", "prompt_embeds"])
def test_weights_that_do_not_fit_are_said(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(session, where, lambda *arguments, **named: torch.empty(1 << 60))
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 2 and "--precision bf16: the weights do not fit into memory: end other" in outcome.err


def test_a_video_that_a_cpu_cannot_allocate_is_one_line(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_as_bytes", lambda video: torch.empty(1 << 60))
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 2 and len(outcome.err.strip().splitlines()) <= 3, outcome.err
    assert "does not fit into memory beside the weights" in outcome.err


def test_the_text_encoder_is_gone_before_the_experts_come(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = []
    build_umt5, load_models = prompt_embeds.build_umt5, session.load_models

    def build(*arguments: object, **options: object) -> object:
        encoder = build_umt5(*arguments, **options)
        encoders.append(weakref.ref(encoder))
        return encoder

    def load(*arguments: object) -> object:
        assert len(encoders) == 1 and encoders[0]() is None
        return load_models(*arguments)

    monkeypatch.setattr(prompt_embeds, "build_umt5", build)
    monkeypatch.setattr(session, "load_models", load)
    assert wanfast(*GOOD).exit_code == 0


def test_text_is_encoded_once_a_prompt_and_expert(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode_text = WanDiT.encode_text
    monkeypatch.setattr(WanDiT, "encode_text", lambda self, text: calls.append(self) or encode_text(self, text))
    assert wanfast(*GOOD).exit_code == 0
    assert len(calls) == 4 and len(set(map(id, calls))) == 2


def test_noise_is_drawn_where_asked(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    draw = pipeline.draw_noises
    monkeypatch.setattr(pipeline, "draw_noises", lambda *a: devices.append(a[3]) or draw(*a[:3], "cpu"))
    monkeypatch.setattr(session.hardware, "prepare", lambda *a: None)
    monkeypatch.setattr(completed, "default_device", lambda: "cuda")
    assert wanfast(*GOOD).exit_code == 0
    config = json.loads(Path("out.json").read_text())["effective"]
    assert (devices, config["video"]["noise_device"]) == (["cpu"], "cpu")
    # and on a GPU, tests/gpu makes a video with either


def test_the_boundary_is_the_models_own(wanfast: Wanfast, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((tiny_copy / "wanfast.json").read_text())
    (tiny_copy / "wanfast.json").write_text(json.dumps(facts | {"boundary": 0.95}))
    timesteps: dict[int, list[float]] = {}
    forward = WanDiT.forward

    def recorded(self: WanDiT, *arguments: torch.Tensor, **named: object) -> object:
        timesteps.setdefault(id(self), []).append(float(arguments[2]))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(WanDiT, "forward", recorded)
    outcome = wanfast(
        *GOOD, "--model", str(tiny_copy), "--guidance-high-noise", "1", "--guidance-low-noise", "1", "--json"
    )
    assert list(timesteps.values()) == [[999], [937, 833, 624]] == list(outcome.document["plan"]["timesteps"].values())


def test_embeddings_are_those_of_this_text_encoder(wanfast: Wanfast, tiny_copy: Path) -> None:
    here = [*GOOD, "--model", str(tiny_copy)]

    def embeddings() -> int:
        return len(list(Path("artifacts/prompt_embeds").rglob("embeds.safetensors")))

    assert wanfast(*here).exit_code == 0
    assert embeddings() == 2
    encoder = tiny_copy / "text_encoder/model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(encoder).items()}, encoder)
    assert wanfast(*here, "--output", "b.mp4").exit_code == 0
    assert embeddings() == 4
    tokenizer = tiny_copy / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert wanfast(*here, "--output", "c.mp4").exit_code == 0
    assert embeddings() == 4  # the same ids
    document = json.loads(tokenizer.read_text())
    document["normalizer"] = {"type": "Lowercase"}
    tokenizer.write_text(json.dumps(document))
    assert wanfast(*here, "--output", "d.mp4", "--prompt", "A CAT").exit_code == 0
    made = embeddings()
    document["normalizer"] = None
    tokenizer.write_text(json.dumps(document))
    assert wanfast(*here, "--output", "e.mp4", "--prompt", "A CAT").exit_code == 0
    assert embeddings() > made


def test_models_of_another_kind_are_refused(wanfast: Wanfast, tiny_copy: Path) -> None:
    here = [*GOOD, "--model", str(tiny_copy)]
    facts = json.loads((tiny_copy / "wanfast.json").read_text())
    facts["dit"]["in_channels"] = 20
    (tiny_copy / "wanfast.json").write_text(json.dumps(facts))
    outcome = wanfast(*here)
    assert outcome.exit_code == 2 and "use an I2V or a T2V model" in outcome.err
    facts["dit"]["in_channels"] = 36
    (tiny_copy / "wanfast.json").write_text(json.dumps(facts))
    (tiny_copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    outcome = wanfast(*here)
    assert outcome.exit_code == 4 and "weight_map" in outcome.err


def test_a_store_that_cannot_be_written_is_said(wanfast: Wanfast, workdir: Path) -> None:
    for folder in ("/proc/nowhere", "cat.png"):
        outcome = wanfast(*GOOD, "--artifacts-dir", folder)
        assert outcome.exit_code == 2
        assert outcome.err.strip().splitlines()[-1].startswith(f"error: --artifacts-dir {Path(folder).absolute()}")
    assert visible(workdir) == ["cat.png"]


def test_a_store_that_takes_no_embeddings_costs_no_video(wanfast: Wanfast, workdir: Path) -> None:
    """The embeddings are in memory, and only the next video needs the artifact."""
    (workdir / "artifacts").mkdir()
    (workdir / "artifacts/prompt_embeds").write_text("a file, not a folder")
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 0 and (workdir / "out.mp4").exists(), outcome.err
    assert outcome.err.count("2 of 2 texts are not stored; a later video encodes them again") == 1


def test_a_text_that_cannot_be_stored_costs_no_other(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first text does not fit on the disk, the second does."""
    save, tried = prompt_embeds._save, []

    def full(embeds: torch.Tensor, folder: Path) -> None:
        tried.append(folder)
        if len(tried) == 1:
            raise OSError(28, "No space left on device")
        save(embeds, folder)

    monkeypatch.setattr(prompt_embeds, "_save", full)
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 0 and len(tried) == 2, outcome.err
    assert len(list(workdir.glob("artifacts/prompt_embeds/*/manifest.json"))) == 1
    assert outcome.err.count("1 of 2 texts are not stored") == 1 and "No space left on device" in outcome.err


def test_another_program_may_write_the_output_meanwhile(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bytes = pixels._as_bytes
    monkeypatch.setattr(pixels, "_as_bytes", lambda v: Path("out.mp4").write_text("theirs") and as_bytes(v))
    outcome = wanfast(*GOOD)
    assert outcome.exit_code == 2 and "meanwhile" in outcome.err
    assert Path("out.mp4").read_text() == "theirs"
    assert visible(workdir) == ["cat.png", "out.mp4"]


def test_a_gpu_that_is_not_there_is_said(wanfast: Wanfast) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outcome = wanfast(*GOOD, "--device", "cuda")
    assert outcome.exit_code == 2 and "--device cuda" in outcome.err


def test_a_pipe_gets_one_line(wanfast: Wanfast) -> None:
    outcome = wanfast(*GOOD)
    assert len(outcome.out.strip().splitlines()) == 1
    assert outcome.out.startswith("out.mp4: 64x48, 5 frames, seed 1, ")


def on_a_terminal(workdir: Path, *, stdout_too: bool) -> tuple[str, str]:
    """Makes a video in `workdir` with stderr on a terminal; returns what the terminal shows, and what a pipe gets."""
    controller, terminal = pty.openpty()
    environment = os.environ | {
        "PYTHONPATH": str(Path(generate.__file__).parents[3]),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "wanfast", *GOOD],
        stdout=terminal if stdout_too else subprocess.PIPE,
        stderr=terminal,
        cwd=workdir,
        env=environment,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(controller)
    out = process.communicate()[0]
    assert process.returncode == 0, shown.decode()
    return shown.decode(), (out or b"").decode()


def test_a_terminal_gets_plan_progress_and_summary(workdir: Path) -> None:
    text, _ = on_a_terminal(workdir, stdout_too=True)
    for words in ("plan", "2 high noise + 2 low noise", "4/4", "s/step", "done", "peak memory", "decode"):
        assert words in text, text


def test_bars_on_a_terminal_leave_stdout_to_its_pipe(workdir: Path) -> None:
    text, out = on_a_terminal(workdir, stdout_too=False)
    assert "4/4" in text and "done" in text and "out.mp4" not in text
    assert out.startswith("out.mp4: 64x48, 5 frames, seed 1, ") and len(out.splitlines()) == 1
