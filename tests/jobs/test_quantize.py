"""Tests the commands `wanfast quantize` and `generate --quantize`: stored artifacts, and refusals of changed ones."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from tests import sparse_model
from tests.conftest import Outcome
from tests.forked import ForkedPopen
from tests.parity import likeness
from wanfast.runtime.errors import MissingArtifactError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.jobs import quantize
from wanfast.runtime.store import identity, model_files, quantized
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.quantized import QuantizedExpert
from wanfast.runtime.weights import checkpoint

Wanfast = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]
TINY = ("--model", "tiny", "--device", "cpu")
SCHEME = ("--scheme", "int8-dynamic")
SMALL = ("--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--size", "64x64", "--frames", "5", "--steps", "2")
GENERATE = ("generate", *TINY, *SMALL, "--quantize", "int8-dynamic", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an artifacts folder that `quantize` filled."""
    folder = tmp_path_factory.mktemp("made")
    process = start("quantize", *TINY, *SCHEME, "--json", cwd=folder)
    err = process.communicate()[1]
    assert process.returncode == 0, err
    return folder / "artifacts"


@pytest.fixture
def kept(made: Path, workdir: Path) -> Path:
    """Copies it into the working folder; returns the high-noise expert's artifact."""
    shutil.copytree(made, workdir / "artifacts")
    return artifact_of(workdir, "high_noise")


def artifact_of(folder: Path, expert: str) -> Path:
    manifests = (folder / "artifacts" / "quantized").glob("*/manifest.json")
    (found,) = (file for file in manifests if json.loads(file.read_text())["inputs"]["expert"] == expert)
    return found.parent


def start(*arguments: str, cwd: Path) -> ForkedPopen:
    command = [sys.executable, "-m", "wanfast", *arguments]
    return ForkedPopen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def test_what_is_stored_makes_the_video_of_what_is_quantized_while_loading(
    wanfast: Wanfast, workdir: Path, kept: Path
) -> None:
    outcome = wanfast(*GENERATE, "--verify")
    assert outcome.exit_code == 0, outcome.err
    document = outcome.document
    assert document["effective"]["models"]["quantize"] == document["plan"]["quantize"] == "int8-dynamic"
    shards = sum(file.stat().st_size for file in kept.glob("*.safetensors"))
    assert document["loading"]["high_noise"]["bytes"] == shards
    assert wanfast("generate", "--from", "out.json", "--output", "again.mp4").exit_code == 0
    assert (workdir / "again.mp4").read_bytes() == (workdir / "out.mp4").read_bytes()
    fly = wanfast(*GENERATE, "--quantize-on-the-fly", "--output", "fly.mp4")
    assert fly.exit_code == 0, fly.err
    assert (workdir / "fly.mp4").read_bytes() == (workdir / "out.mp4").read_bytes()
    assert fly.document["loading"]["high_noise"]["bytes"] > 1.4 * shards  # the tiny model's files are in bf16
    assert wanfast(*GENERATE[:-3], "--output", "plain.mp4").exit_code == 0
    assert (workdir / "plain.mp4").read_bytes() != (workdir / "out.mp4").read_bytes()


def test_two_ranks_share_what_is_stored(wanfast: Wanfast, workdir: Path, kept: Path) -> None:
    assert wanfast(*GENERATE, "--output", "one.mp4").exit_code == 0
    outcome = wanfast(*GENERATE, "--num-gpus", "2", "--ulysses", "2", "--cfg-parallel", "1", "--output", "two.mp4")
    assert outcome.exit_code == 0, outcome.err
    assert outcome.document["effective"]["ranks"]["dit_fsdp"] == "off"
    assert outcome.document["quantized"]["high_noise"] == kept.name
    assert likeness("two.mp4", "one.mp4") >= 45


def test_goes_on_with_the_expert_that_is_missing(wanfast: Wanfast, workdir: Path, kept: Path) -> None:
    shutil.rmtree(kept)
    outcome = wanfast("quantize", *TINY, *SCHEME, "--json")
    assert [result["was_there"] for result in outcome.document["results"]] == [False, True]
    lines = outcome.err.strip().splitlines()  # a pipe gets no progress bars
    assert len(lines) == 4 and all("relative error of the weights 0.00" in line for line in lines[::2])
    assert all(Path(line.split(": ")[0]).is_file() for line in lines[1::2])  # the plots of the errors
    assert kept.is_dir()
    assert [result["expert"] for result in outcome.document["results"]] == ["high_noise", "low_noise"]


def test_who_waited_for_another_process_is_not_its_maker(
    wanfast: Wanfast, workdir: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact appears between the first look and the lock."""
    monkeypatch.setattr(ArtifactStore, "find", lambda *arguments, **options: None)
    outcome = wanfast("quantize", *TINY, *SCHEME, "--json")
    assert [result["was_there"] for result in outcome.document["results"]] == [True, True]


def test_without_it_the_command_is_named(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*GENERATE)
    assert outcome.exit_code == 3
    assert "run `wanfast quantize --model tiny --scheme int8-dynamic`" in outcome.err
    assert not list(workdir.glob("out*"))
    dry = wanfast(*GENERATE, "--dry-run")
    assert dry.exit_code == 0 and any("run `wanfast quantize" in note for note in dry.document["plan"]["notes"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "no index"])
def test_what_was_changed_is_refused(wanfast: Wanfast, workdir: Path, kept: Path, damage: str) -> None:
    shard = next(kept.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[-500] ^= 1
        shard.write_bytes(content)
    elif damage == "foreign":
        other = artifact_of(workdir, "low_noise")
        shutil.rmtree(kept)
        shutil.copytree(other, kept)
    else:
        next(kept.glob("*.index.json")).unlink()
    outcome = wanfast(*GENERATE, *(["--verify"] if damage == "flipped" else []))
    assert outcome.exit_code == 4 and f"{kept} was changed after it was made" in outcome.err, outcome.err
    assert not list(workdir.glob("out*"))
    again = wanfast("quantize", *TINY, *SCHEME)  # verifies the stored artifact
    assert again.exit_code == 4 and str(kept) in again.err


def test_without_torchao_the_artifact_of_the_latest_version_is_taken(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model_files.locate("tiny", "artifacts")
    store = ArtifactStore(workdir / "artifacts")
    expert = QuantizedExpert(store, files, "high_noise", "int8-dynamic", "tiny")
    made = {
        version: store.publish(
            "quantized", expert.inputs(version, "cpu"), lambda folder: (folder / "file").touch()
        ).folder
        for version in ("0.9.0", "0.18.0", "0.18.0.dev1", "not a version")
    }
    monkeypatch.setattr(quantized, "torchao_version", lambda: None)
    assert expert.find() == made["0.18.0"]
    monkeypatch.setattr(quantized, "torchao_version", lambda: "0.10.0")
    with pytest.raises(
        MissingArtifactError, match=r"only with torchao 0\.9\.0, 0\.18\.0\.dev1, 0\.18\.0, but 0\.10\.0 is installed"
    ):
        expert.require()


@pytest.mark.parametrize("option", ["--model", "--artifacts-dir"])
@pytest.mark.parametrize("value", ["", " "], ids=["empty", "blank"])
@pytest.mark.parametrize("command", ["quantize", "generate", "doctor"])
def test_an_empty_place_is_refused(wanfast: Wanfast, workdir: Path, command: str, option: str, value: str) -> None:
    own = {"quantize": (*TINY, *SCHEME), "generate": (*TINY, *SMALL), "doctor": ("--model", "tiny")}
    outcome = wanfast(command, *own[command], option, value)
    assert outcome.exit_code == 2 and outcome.err.startswith(f"error: {option} has an empty value"), outcome.err
    assert outcome.err.count("\n") == 1 and [path.name for path in workdir.iterdir()] == ["cat.png"]


def test_another_torchao_is_named(wanfast: Wanfast, workdir: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by = quantized.torchao_version()
    monkeypatch.setattr(quantized, "torchao_version", lambda: "9.9.9")
    outcome = wanfast(*GENERATE)
    assert outcome.exit_code == 3 and f"only with torchao {made_by}, but 9.9.9 is installed" in outcome.err
    monkeypatch.setattr(quantized, "torchao_version", lambda: None)
    assert wanfast(*GENERATE).exit_code == 0  # what is kept runs without torchao
    for arguments in (("quantize", *TINY, *SCHEME), (*GENERATE, "--quantize-on-the-fly", "--output", "fly.mp4")):
        outcome = wanfast(*arguments)
        assert outcome.exit_code == 2 and "pip install 'wanfast[quantize]'" in outcome.err


def test_a_full_disk_leaves_nothing(wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(quantize.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        outcome = wanfast("quantize", *TINY, *SCHEME)
        assert outcome.exit_code == 2 and "are needed, but 10.0 kB are free" in outcome.err

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(quantize, "save_file", full)
    outcome = wanfast("quantize", *TINY, *SCHEME)
    assert outcome.exit_code == 2 and "No space left on device" in outcome.err and "--artifacts-dir" in outcome.err
    assert [path.suffix for path in (workdir / "artifacts" / "quantized").iterdir()] == [".lock"]


def test_what_stops_it_is_one_line(wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "file").write_text("not a folder")
    outcome = wanfast("quantize", *TINY, *SCHEME, "--artifacts-dir", str(workdir / "file"))
    assert outcome.exit_code == 2 and "--artifacts-dir" in outcome.err and outcome.err.count("\n") < 4
    with monkeypatch.context() as patched:
        patched.setattr(quantize, "find_spec", lambda name: None)
        outcome = wanfast("quantize", *TINY, *SCHEME)
        assert outcome.exit_code == 2 and "needs matplotlib" in outcome.err and not (workdir / "artifacts").exists()

    class Failing:
        def get_slice(self, key: str) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.SafetensorsReader, "__init__", lambda self, file: vars(self).update(file=file))
    for name, value in {"_handle": Failing(), "_bytes_read": 0}.items():
        monkeypatch.setattr(checkpoint.SafetensorsReader, name, value, raising=False)
    outcome = wanfast("quantize", *TINY, *SCHEME)
    assert outcome.exit_code == 4 and "model.safetensors: " in outcome.err and "Input/output error" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "bf16", "--quantize-on-the-fly"], "--quantize-on-the-fly needs --quantize"),
        (["--quantize-on-the-fly"], "--quantize-on-the-fly needs --quantize"),
        (["--verify"], "--verify reads what"),
        (["--verify", "--quantize", "fp8-rowwise", "--quantize-on-the-fly"], "exclude each other"),
        (["--quantize", "fp8-rowwise", "--precision", "fp32"], "needs --precision bf16"),
        (["--quantize", "fp8-rowwise", "--num-gpus", "2", "--dit-fsdp", "on"], "--dit-fsdp on and --quantize"),
    ],
    ids=str,
)
def test_what_excludes_each_other(wanfast: Wanfast, workdir: Path, options: list[str], words: str) -> None:
    outcome = wanfast("generate", *TINY, *SMALL, "--dry-run", *options)
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err


def test_two_at_once_make_one(workdir: Path) -> None:
    both = [start("quantize", *TINY, *SCHEME, "--expert", "high", "--json", cwd=workdir) for _ in "ab"]
    results = [json.loads(process.communicate()[0].splitlines()[-1])["results"][0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert results[0]["output"] == results[1]["output"]
    assert len(list((workdir / "artifacts" / "quantized").glob("*/manifest.json"))) == 1
    assert not list((workdir / "artifacts" / "quantized").glob("*.partial"))


# Files and parts are a 32nd as large as they are. After the command, this prints by how much memory grew at most.
PIECES = """
import resource, sys
from pathlib import Path
from wanfast.cli import main
from wanfast.runtime.jobs import quantize
from wanfast.runtime.weights import checkpoint
quantize.SHARD_BYTES >>= 5
quantize._CHUNK_VALUES >>= 5
checkpoint._REMAP_BYTES >>= 5
def resident(kind):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(kind)) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
try:
    main(sys.argv[1:])
finally:
    print("GREW", resident("VmHWM") - before, file=sys.stderr)
"""


@pytest.fixture
def holes(workdir: Path) -> Path:
    """Writes an expert of holes, a quarter as wide as the A14B's, with four layers; its hashes are on record."""
    spec = replace(A14B.dit, dim=1280, ffn_dim=3456, num_heads=10, num_layers=4)
    sparse_model.write(workdir / "sparse", spec, shard_bytes=200_000_000)
    for number, file in enumerate(sorted((workdir / "sparse").rglob("*.safetensors"))):
        identity._remember(identity._state(file), f"{number:064x}", workdir / "artifacts")
    return workdir / "sparse"


def in_pieces(folder: Path, scheme: str) -> ForkedPopen:
    """Starts to quantize an expert by PIECES."""
    command = ["quantize", "--model", str(folder), "--scheme", scheme, "--expert", "high", "--device", "cpu", "--json"]
    popen = [sys.executable, "-c", PIECES, *command]
    return ForkedPopen(popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_an_interrupt_leaves_nothing_half_done(workdir: Path, holes: Path) -> None:
    """The interrupt comes between the first file and the last."""
    process = in_pieces(holes, "int8-dynamic")
    store = workdir / "artifacts" / "quantized"
    while not list(store.glob("*.partial/*.safetensors")):  # until it writes
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "interrupted: no half-written file is left" in process.communicate()[1]
    assert process.returncode == 130
    assert [path.suffix for path in store.iterdir()] == [".lock"]


def test_only_pieces_are_in_memory(workdir: Path, holes: Path) -> None:
    """More layers need no more memory; the whole source would take 0.3 GB more, and the whole result 0.1 GB more."""
    process = in_pieces(holes, "int8-weight-only")
    out, err = process.communicate()
    assert process.returncode == 0, err
    grew = int(err.split("GREW ")[1])
    (result,) = json.loads(out.splitlines()[-1])["results"]
    print(f"{result['source_bytes'] / 1e9:.2f} GB -> {result['bytes'] / 1e9:.2f} GB, grew by {grew / 1e9:.2f} GB")
    assert result["source_bytes"] > 0.4e9 and result["bytes"] < 0.4 * result["source_bytes"]
    assert grew < 0.34e9
