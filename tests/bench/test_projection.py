"""Tests the projection: the fit of documents that a known model makes, and the checks once files of four GPUs exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.bench import results as results_files
from tests.bench.results import ROOT

model_of = results_files.program("cost_model")
CostModel, Shared, mesh_of = model_of.CostModel, model_of.Shared, model_of.mesh_of
TOKENS = 75_600
KNOWN = CostModel(
    attention_flop_s=7e14,
    linear_flop_s=8e14,
    norm_token_s=2e-6,
    exchange_token_s=1e-5,
    encode=Shared(0.1, 0.5),
    decode=Shared(0.2, 1.2),
    vae_tokens=TOKENS,
    text_s=1.5,
    start_s=12.0,
)


def forward(model: CostModel, ranks: int) -> dict[str, Any]:
    """Returns what benchmarks/forward.py --ranks prints if a forward takes what the model says."""
    sizes = [size for size in (1, 2, 4, 8) if size <= ranks]
    ms = {size: model.forward_s(TOKENS, size) * 1000 for size in sizes}
    ways = {"one" if size == 1 else f"ulysses {size}": {"ms": ms[size]} for size in sizes}
    terms = model.forward(TOKENS, 1)
    shares = {"attention": terms["attention"], "linears": terms["linears"], "everything else": terms["norms"]}
    shares = {name: seconds / ms[1] * 1000 for name, seconds in shares.items()}
    profiles = {"one": {"shares": {**shares, "exchanges": 0.0}}}
    return {"tokens": TOKENS, "ranks": ranks, "ways": ways, "profiles": profiles}


def vae(model: CostModel, ranks: int) -> dict[str, Any]:
    works = {"encode": model.encode, "decode bf16": model.decode}
    alone = {f"{name}, one rank": work.on(1) for name, work in works.items()}
    shared = {name: work.on(ranks) for name, work in works.items()}
    return {"size": "1280x720", "frames": 81, "ranks": ranks, "seconds": alone | shared}


def video(model: CostModel, num_gpus: int, slower: float = 1.0) -> dict[str, Any]:
    """Returns what benchmarks/whole_video.py prints; denoising is slower than the model by a factor."""
    terms = model.video(TOKENS, mesh_of(num_gpus), steps=2)
    denoise = slower * sum(terms[name] for name in model_of.OF_A_FORWARD)
    beyond = terms["VAE"] + terms["text"] + terms["start"]
    row = {"seconds": {"text": terms["text"], "denoise": denoise}, "beyond_denoising_s": beyond}
    options = ["--steps", "2", "--num-gpus", str(num_gpus)]
    return {"options": options, "size": [1280, 720, 81], "videos": {"new": [row]}}


FITTED = model_of.fit(forward(KNOWN, 2), forward(KNOWN, 1), vae(KNOWN, 2), video(KNOWN, 2))


def test_a_fit_finds_the_numbers_of_the_model_that_made_the_documents() -> None:
    for name, value in vars(KNOWN).items():
        found = getattr(FITTED, name)
        if isinstance(value, Shared):
            assert vars(found) == pytest.approx(vars(value)), name
        else:
            assert found == pytest.approx(value), name


def test_terms_follow_the_ranks() -> None:
    """Eight GPUs compute both branches at once, on four ranks each; a rank sends 3/16 of all tokens."""
    one, eight = (KNOWN.video(TOKENS, mesh_of(number)) for number in (1, 8))
    for name in ("attention", "linears", "norms"):
        assert eight[name] == pytest.approx(one[name] / 8)
    assert one["exchange"] == 0
    assert eight["exchange"] == pytest.approx(40 * 1e-5 * TOKENS * 3 / 16)
    assert eight["VAE"] == pytest.approx(0.3 + 1.7 / 8)
    assert (eight["text"], eight["start"]) == (1.5, 12.0)


def test_checks_say_how_far_measurements_are() -> None:
    assert model_of.checks(FITTED) == []
    found = model_of.checks(FITTED, forward=forward(KNOWN, 4), vae=vae(KNOWN, 4), video=video(KNOWN, 4, slower=1.25))
    assert [check["what"] for check in found] == [
        "a forward, ulysses 4",
        "the VAE, 4 ranks",
        "40 steps, 4 GPUs",
        "a whole video, 4 GPUs",
    ]
    assert [check["error"] for check in found[:3]] == pytest.approx([0, 0, -0.2], abs=1e-4)
    steps, whole = found[2]["measured_s"], found[3]["measured_s"]
    assert whole - steps == pytest.approx(KNOWN.vae_s(TOKENS, 4) + 13.5, abs=0.01)
    assert found[3]["error"] == pytest.approx((0.8 * steps + whole - steps) / whole - 1, abs=1e-4)


@pytest.fixture
def program() -> Any:
    return results_files.program("projection")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return results_files.results_of_two(tmp_path)


def test_without_four_gpus_the_picture_and_the_page_say_so(program: Any, results: Path) -> None:
    document = program.projection(results)
    assert document["error_on_4"] is document["error_on_8"] is None
    assert (document["checks_on_4"], document["checks_on_8"], document["checked_on"]) == ([], [], {"4": {}, "8": {}})
    assert program.picture(document).count("not checked on 4") == 2  # the bars of 4 and of 8
    assert "fitted; 390 s with the steps that were measured" in program.picture(document)
    assert "**The projection is not checked on 4**" in "\n".join(program.tables(document))


def test_files_of_four_gpus_are_taken_by_their_names(program: Any, results: Path) -> None:
    """The kind of GPU with four of them is fitted on one GPU and two of the same run."""
    for name, document in (
        ("forward-4xh100", forward(KNOWN, 4)),
        ("vae-4xh100", vae(KNOWN, 4)),
        ("whole-video-random-4xh100", video(KNOWN, 4, slower=1.25)),
    ):
        (results / f"{name}.json").write_text(json.dumps(document))
    document = program.projection(results)
    assert document["gpu"] == "h100"
    assert document["fitted_on"]["forward"] == document["fitted_on"]["profile"] == "forward-4xh100.json"
    assert document["fitted_on"]["vae"] == "vae-2xh200.json"
    assert document["checks_on_2"] == []  # those videos are of an H200
    assert document["fit"]["attention_flop_s"] == pytest.approx(7e14)
    assert len(document["checks_on_4"]) == 4
    assert document["error_on_4"] == document["checks_on_4"][-1]["error"] < -0.1
    shown, lines = program.picture(document), "\n".join(program.tables(document))
    assert "not checked" not in shown + lines
    assert f"projected, {document['error_on_4']:+.1%} on 4 GPUs" in shown and 'fill="black"' in shown
    assert "`benchmarks/results/whole-video-random-4xh100.json`" in lines and "a whole video, 4 GPUs" in lines


def test_files_of_eight_gpus_check_it_too(program: Any, results: Path) -> None:
    """The kind of GPU with eight of them counts, and no file of another kind checks it."""
    for name, document in (
        ("forward-4xh100", forward(KNOWN, 4)),
        ("vae-8xh200", vae(KNOWN, 8)),
        ("whole-video-random-8xh200", video(KNOWN, 8, slower=1.25)),
    ):
        (results / f"{name}.json").write_text(json.dumps(document))
    document = program.projection(results)
    assert document["gpu"] == "h200" and document["checks_on_4"] == []
    assert document["checked_on"]["8"] == {"vae": "vae-8xh200.json", "video": "whole-video-random-8xh200.json"}
    assert [check["what"] for check in document["checks_on_8"]] == [
        "the VAE, 8 ranks",
        "40 steps, 8 GPUs",
        "a whole video, 8 GPUs",
    ]
    assert document["error_on_8"] == document["checks_on_8"][-1]["error"]
    *_, four, eight = re.split(r"(?=<text[^>]*>\d GPU)", program.picture(document))
    assert "not checked on 4" in four and 'fill="black"' not in four
    assert f"projected, {document['error_on_8']:+.1%} to what was measured" in eight and 'fill="black"' in eight
    lines = "\n".join(program.tables(document))
    assert "not checked on 4" in lines and "Checked on 8 by `benchmarks/results/vae-8xh200.json`" in lines
    assert f"{abs(document['error_on_8']) * 100:.1f} %" in lines and "checks_on_8/2/error" in lines


def test_a_kind_with_eight_gpus_alone_is_fitted_on_their_run(program: Any, results: Path) -> None:
    (results / "forward-8xh100.json").write_text(json.dumps(forward(KNOWN, 8)))
    document = program.projection(results)
    assert (document["gpu"], document["fitted_on"]["forward"]) == ("h100", "forward-8xh100.json")
    assert [check["what"] for check in document["checks_on_8"]] == ["a forward, ulysses 8"]
    assert document["error_on_8"] == pytest.approx(0, abs=1e-4) and 'fill="black"' not in program.picture(document)


def test_eight_gpus_have_another_colour(program: Any, results: Path) -> None:
    _, *bars = re.split(r"(?=<text[^>]*>\d GPU)", program.picture(program.projection(results)))
    assert [bar.count(program.ORANGE[0]) for bar in bars] == [0, 0, 0, 1]
    assert [bar.count(program.BLUE[0]) for bar in bars] == [1, 1, 1, 0]


def test_a_document_that_lacks_a_figure_is_one_line(program: Any, results: Path) -> None:
    document = forward(KNOWN, 2)
    del document["ways"]["ulysses 2"]
    (results / "forward-2xh200.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match=r"lacks 'ulysses 2': measure it again, for example by `python benchmarks/"):
        program.projection(results)
    (results / "vae-2xh200.json").unlink()
    with pytest.raises(SystemExit, match=r"none of vae-2xh200 is there: measure it"):
        program.projection(results)


def test_the_page_and_the_picture_are_those_of_the_results(program: Any) -> None:
    document = program.projection(ROOT / program.RESULTS)
    assert json.loads((ROOT / program.OWN).read_text()) == json.loads(json.dumps(document))
    assert (ROOT / "docs/projection.svg").read_text() == program.picture(document)
    page = (ROOT / "docs/projection.md").read_text()
    assert program.with_block(page, "tables", program.tables(document)) == page
