"""Tests broken weights: each error names the tensor and the file, and nothing is half loaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.on_ranks import on_ranks
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import DiTSpec, UMT5Spec, VAESpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.weights import checkpoint, key_maps

SPEC = UMT5Spec(vocab_size=20, dim=16, attention_dim=8, ffn_dim=24, num_heads=2, num_layers=2)


def umt5(device: str = "cpu", dtype: torch.dtype = torch.float32) -> UMT5Encoder:
    with torch.device(device):
        return UMT5Encoder(SPEC, dtype)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    checkpoint.save(umt5(), file, network="umt5", layout="original")
    return file


def load(*files: Path, dtype: torch.dtype = torch.float32) -> UMT5Encoder:
    model = umt5("meta", dtype)
    checkpoint.load(model, checkpoint.Source(files, "umt5", "original"), Ranks("cpu"))
    return model


def edited(file: Path, **changes: torch.Tensor | None) -> Path:
    """Replaces, adds or (None) removes tensors of the file."""
    tensors = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_the_dtype_asked_for_and_frozen(weights: Path, dtype: torch.dtype) -> None:
    model = load(weights, dtype=dtype)
    stored = load_file(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(dtype)), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm.weight": None}, ["missing", "'norm.weight'"]),
        ({"extra.weight": torch.ones(2)}, ["unexpected", "'extra.weight'"]),
        ({"norm.weight": torch.ones(17)}, ["'norm.weight'", "[17], not [16]"]),
    ],
)
def test_wrong_tensors_are_named(weights: Path, changes: dict[str, torch.Tensor | None], words: list[str]) -> None:
    with pytest.raises(CorruptArtifactError) as error:
        load(edited(weights, **changes))
    message = str(error.value)
    assert all(word in message for word in [*words, str(weights)]), message
    assert "\n" not in message


def test_a_missing_tensor_is_named_as_the_files_name_theirs(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    checkpoint.save(umt5(), first, network="umt5", layout="diffusers")
    save_file({"shared.weight": load_file(first)["shared.weight"]}, second)
    edited(first, **{"shared.weight": None, "encoder.final_layer_norm.weight": None})
    with pytest.raises(CorruptArtifactError) as error:
        checkpoint.load(umt5("meta"), checkpoint.Source([first, second], "umt5", "diffusers"), Ranks("cpu"))
    assert f"{tmp_path}: missing tensor 'encoder.final_layer_norm.weight' (1 missing in all)" in str(error.value)


def test_a_tensor_in_two_shards_is_an_error(weights: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    save_file({"norm.weight": torch.ones(16)}, second)
    with pytest.raises(CorruptArtifactError, match=r"second.safetensors: tensor 'norm.weight' is present twice"):
        load(weights, second)


def test_an_embedding_that_is_written_twice_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    checkpoint.save(umt5(), file, network="umt5", layout="diffusers")
    embedding = load_file(file)["shared.weight"]
    edited(file, **{"encoder.embed_tokens.weight": embedding})
    model = umt5("meta")
    checkpoint.load(model, checkpoint.Source([file], "umt5", "diffusers"), Ranks("cpu"))
    assert torch.equal(model.token_embedding.weight, embedding)


@pytest.mark.parametrize(("name", "opener"), [("model.safetensors", "_open"), ("model.pth", "_read_pth")])
def test_a_file_is_mapped_again_after_so_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opener: str
) -> None:
    checkpoint.save(umt5(), tmp_path / name, network="umt5", layout="original")
    opened: list[Path] = []
    open_ = getattr(checkpoint, opener)
    monkeypatch.setattr(checkpoint, opener, lambda file: opened.append(file) or open_(file))
    monkeypatch.setattr(checkpoint, "_REMAP_BYTES", 1000)
    load(tmp_path / name)
    assert len(opened) > 2  # once for the header, and several times for the tensors


def test_a_truncated_file_is_named(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptArtifactError, match=r"model.safetensors: .*: it is truncated"):
        load(weights)


def test_pth_is_read_without_running_it(tmp_path: Path) -> None:
    good = tmp_path / "model.pth"
    checkpoint.save(umt5(), good, network="umt5", layout="original")
    load(good)

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    bad = tmp_path / "bad.pth"
    torch.save({"norm.weight": Trap()}, bad)
    with pytest.raises(CorruptArtifactError, match=r"bad.pth"):
        load(bad)
    assert not (tmp_path / "sprung").exists()

    for name, content in (("cut.pth", good.read_bytes()[:-200]), ("text.pth", b"hello"), ("list.pth", None)):
        file = tmp_path / name
        if content is None:
            torch.save([torch.ones(1)], file)
        else:
            file.write_bytes(content)
        with pytest.raises(CorruptArtifactError, match=name):
            load(file)
    with (tmp_path / "raw.pth").open("wb") as stream:
        pickle.dump({"norm.weight": 1}, stream)
    with pytest.raises(CorruptArtifactError, match=r"raw.pth"):
        load(tmp_path / "raw.pth")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("component", "network"),
    [
        ("dit", lambda: WanDiT(DiTSpec(num_layers=2))),
        ("vae", lambda: WanVAE(VAESpec())),
        ("umt5", lambda: UMT5Encoder(UMT5Spec(num_layers=2))),
    ],
)
def test_key_maps_are_one_to_one(component, network, layout) -> None:
    with torch.device("meta"):
        names = list(network().state_dict())
    theirs = [key_maps.rename_back(component, layout, name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [key_maps.rename(component, layout, key) for key in theirs] == names


def test_true_sizes_are_the_published_ones() -> None:
    """The models have the parameters and bytes of the published files (WAN_SPEC 1 and 2)."""
    with torch.device("meta"):
        dit, vae, text = WanDiT(DiTSpec()), WanVAE(VAESpec()), UMT5Encoder(UMT5Spec())
    assert sum(p.numel() for p in dit.parameters()) == 14_288_901_184
    assert len(dit.state_dict()) == 1095
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert len(vae.state_dict()) == 194
    assert sum(p.numel() for p in text.parameters()) == 5_680_910_336


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    """One NaN once gave an all-black video without a word."""
    model = umt5()
    with torch.no_grad():
        model.blocks[1].ffn.fc1.weight[3, 5] = value
    checkpoint.save(model, tmp_path / name, network="umt5", layout="diffusers")
    blank = umt5("meta")
    with pytest.raises(CorruptArtifactError) as error:
        checkpoint.load(blank, checkpoint.Source([tmp_path / name], "umt5", "diffusers"), Ranks("cpu"))
    key = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"
    assert f"{tmp_path / name}: tensor '{key}' holds NaN or an infinity" in str(error.value)
    readers = checkpoint.stream(umt5("meta"), checkpoint.Source([tmp_path / name], "umt5", "diffusers"))
    with pytest.raises(CorruptArtifactError, match="holds NaN or an infinity"):
        for own, rows in readers:
            rows(0, len(blank.state_dict()[own]))


def test_all_ranks_raise_what_one_read(tmp_path: Path) -> None:
    """Each rank of two reads half of a large tensor."""
    values = torch.zeros(4, checkpoint._WORTH_SHARING)
    values[3, 7] = torch.nan
    save_file({"weight": values}, tmp_path / "large.safetensors")

    def work(ranks: Ranks) -> tuple[str, bool]:
        with torch.device("meta"):
            module = torch.nn.Linear(checkpoint._WORTH_SHARING, 4, bias=False)
        files = [tmp_path / "large.safetensors"]
        with pytest.raises(CorruptArtifactError) as error:
            checkpoint.load(module, checkpoint.Source(files, "dit", "original"), ranks)
        return str(error.value), error.value.is_agreed

    first, second = on_ranks(Mesh(ulysses=2), work)
    assert first == second and first[1] and "tensor 'weight'" in first[0]


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.float64, torch.bool])
def test_weights_of_another_kind_of_numbers_are_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Such values mean nothing without their scales."""
    tensors = umt5().state_dict()
    tensors["blocks.0.attn.q.weight"] = tensors["blocks.0.attn.q.weight"].to(dtype)
    write = torch.save if name.endswith(".pth") else save_file
    write(dict(tensors), tmp_path / name)
    with pytest.raises(CorruptArtifactError) as error:
        load(tmp_path / name)
    assert "tensor 'blocks.0.attn.q.weight' is stored as " in str(error.value)
    assert "not BF16 or F16 or F32: use the published weights" in str(error.value)


def test_a_pickle_of_tensors_without_values_is_refused(tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.empty(16, device="meta")}, tmp_path / "model.pth")
    with pytest.raises(CorruptArtifactError, match="does not hold a dictionary of plain tensors"):
        load(tmp_path / "model.pth")


def test_a_damaged_pickle_is_one_line(tmp_path: Path) -> None:
    """A name that is no UTF-8 once gave a traceback."""
    file = tmp_path / "model.pth"
    checkpoint.save(umt5(), file, network="umt5", layout="original")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"norm.weight", b"\x85orm.weight"))
    with pytest.raises(CorruptArtifactError, match=r"model.pth") as error:
        load(file)
    assert "\n" not in str(error.value)
