"""Tests the size of a video, with rounding traps (WAN_SPEC's examples, made with the reference's own expression).

Also tests which documents `ModelSpec.from_json` accepts.
"""

from __future__ import annotations

import pytest

from wanfast.runtime.facts.model_spec import A14B, FactError, ModelSpec
from wanfast.runtime.facts.shapes import fit_geometry, geometry_of, inner_size, largest_geometry, middle_box


@pytest.mark.parametrize(
    ("area", "image", "size", "tokens"),
    [
        ((1280, 720), (1920, 1080), (1280, 720), 75_600),
        ((720, 1280), (1920, 1080), (1280, 720), 75_600),  # only the area counts
        ((1280, 720), (500, 500), (960, 960), 75_600),
        ((1280, 720), (4032, 3024), (1104, 816), 73_899),
        ((832, 480), (1920, 1080), (832, 464), 31_668),
        ((832, 480), (832, 480), (832, 464), 31_668),  # float rounding: the requested shape itself gives a smaller size
        ((832, 480), (480, 832), (480, 832), 32_760),  # its portrait shape does not
    ],
)
def test_size_follows_the_image(
    area: tuple[int, int], image: tuple[int, int], size: tuple[int, int], tokens: int
) -> None:
    geometry = fit_geometry(A14B, *area, 81, image)
    assert ((geometry.width, geometry.height), geometry.tokens) == (size, tokens)
    assert geometry.latent_frames == 21
    assert geometry.token_grid == (21, geometry.height // 16, geometry.width // 16)


@pytest.mark.parametrize("image", [(1920, 1080), (1080, 1920), (500, 500), (4032, 3024)])
def test_crop_and_pad_give_exactly_the_size(image: tuple[int, int]) -> None:
    for fit in ("crop", "pad"):
        geometry = geometry_of(A14B, fit, (832, 480), 81, image)
        assert ((geometry.width, geometry.height), geometry.tokens) == ((832, 480), 32_760)
        assert (geometry.latent_width, geometry.latent_height) == (104, 60)
    assert geometry_of(A14B, "area", (832, 480), 81, image) == fit_geometry(A14B, 832, 480, 81, image)


@pytest.mark.parametrize(
    ("image", "size", "middle", "inner"),
    [
        ((1600, 900), (1280, 720), (0, 0, 1600, 900), (1280, 720)),
        ((1000, 1000), (1280, 720), (0, 219, 1000, 781), (720, 720)),
        ((3000, 1000), (480, 832), (1211, 0, 1788, 1000), (480, 160)),
        ((64, 16), (16, 9984), (31, 0, 32, 16), (16, 4)),  # a part is never empty
    ],
)
def test_the_middle_and_the_inner_size(
    image: tuple[int, int], size: tuple[int, int], middle: tuple[int, ...], inner: tuple[int, int]
) -> None:
    assert middle_box(image, *size) == middle
    assert inner_size(image, *size) == inner


def test_an_older_repo_id_is_ignored_and_other_unknown_facts_are_refused() -> None:
    document = A14B.to_json()
    assert "repo_id" not in document
    assert ModelSpec.from_json(document | {"repo_id": "Wan-AI/Wan2.2-I2V-A14B"}) == A14B
    assert ModelSpec.from_json(document | {"repo_id": None}) == A14B
    with pytest.raises(FactError, match="repo"):
        ModelSpec.from_json(document | {"repo": "Wan-AI/Wan2.2-I2V-A14B"})


@pytest.mark.parametrize(("size", "tokens"), [((832, 480), 32_760), ((480, 832), 32_760), ((1280, 720), 75_600)])
def test_no_image_gives_more_tokens_than_the_largest_geometry(size: tuple[int, int], tokens: int) -> None:
    largest = largest_geometry(A14B, *size, 81)
    assert largest.tokens == tokens and (largest.width > largest.height) == (size[0] > size[1])
    found = {fit_geometry(A14B, *size, 81, (width, 1000)).tokens for width in range(250, 4001)}
    assert max(found) <= tokens and max(found) >= 0.99 * tokens
