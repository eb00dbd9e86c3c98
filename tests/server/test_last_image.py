"""Tests the last image of a request: how it is sent, where it goes, and which servers and videos take none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lora_files
from tests.server.running import SMALL, STAR, WARM_UP, StandIn, data_url, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI ended its own service

FIRST, LAST = STAR.read_bytes(), STAR.with_name("cat.jpg").read_bytes()
BOTH: dict[str, Any] = {"prompt": "a", "input_reference": data_url(FIRST), "last_image": data_url(LAST)}


def form(**files: bytes) -> bytes:
    """Returns a form with a prompt and files."""
    parts = [b'name="prompt"\r\n\r\na']
    parts += [f'name="{name}"; filename="x"\r\n\r\n'.encode() + data for name, data in files.items()]
    return b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"


def test_a_last_image_reaches_the_video(tmp_path: Path) -> None:
    """It comes in JSON, as a file of a form, or as a form of the openai client. No file of it is left."""
    with running(tmp_path) as server:
        by_json = server.ask("POST", "/v1/videos", **BOTH).document["id"]
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        by_file = server.ask("POST", "/v1/videos", form(last_image=LAST, input_reference=FIRST), headers).document["id"]
        given = {"prompt": "a", "input_reference": STAR, "extra_body": {"last_image": data_url(LAST)}}
        by_client = server.client().videos.create(**given).id
        for video in (by_json, by_file, by_client):
            assert server.ended(video)["status"] == "completed"
        assert [(made["picture"], made["last_picture"]) for made in server.maker.made] == [(FIRST, LAST)] * 3
        assert not list(server.files.folder.glob("*image"))


def test_another_last_image_is_another_request(tmp_path: Path) -> None:
    with running(tmp_path) as server:

        def status(**images: Any) -> int:
            headers = {"Idempotency-Key": "k"}
            return server.ask("POST", "/v1/videos", headers=headers, prompt="a", **images).status

        first, last = data_url(FIRST), data_url(LAST)
        assert status(input_reference=first, last_image=last) == 200
        assert status(input_reference=first, last_image=last) == 200
        assert status(input_reference=first, last_image=first) == 409
        assert status(input_reference=first) == 409
        assert status(input_reference=last, last_image=first) == 409
        assert len(server.maker.made) <= 1


def test_a_server_of_a_recipe_of_two_images_needs_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up video has two images too. Another server offers the recipe if its models fit."""
    warmed: list[dict[str, Any]] = []
    make = StandIn.make
    monkeypatch.setattr(StandIn, "make", lambda self, **options: warmed.append(options) or make(self, **options))
    lora = lora_files.write(tmp_path / "a.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)})
    with running(tmp_path, options={**SMALL, "lora": [str(lora)], "recipe": "first-last-4"}, defaults={}) as server:
        assert warmed[0]["prompt"] == WARM_UP and warmed[0]["last_image"] == warmed[0]["image"]
        refused = server.ask("POST", "/v1/videos", prompt="a", input_reference=data_url(FIRST))
        words = "last_image: is missing: the recipe first-last-4 makes videos between two images"
        assert (refused.status, refused.error["param"], refused.error["message"]) == (400, "last_image", words)
        assert server.ended(server.create(last_image=data_url(LAST)))["plan"]["recipe"] == "first-last-4"
    with running(tmp_path, options={**SMALL, "lora": [str(lora)]}) as server:
        assert "first-last-4" in server.ask("GET", "/v1/models").document["data"][0]["recipes"]
        made = server.ended(server.create(recipe="first-last-4", last_image=data_url(LAST)))
        assert made["plan"]["recipe"] == "first-last-4"


def test_a_server_that_skips_by_the_curve_that_ships_takes_no_last_image(tmp_path: Path) -> None:
    """The fix is a command of the server's machine, which is not for a client."""
    with running(tmp_path, defaults={"magcache": "E012K2R20"}) as server:
        refused = server.ask("POST", "/v1/videos", **BOTH)
        assert (refused.status, refused.error["param"]) == (400, "last_image")
        assert refused.error["message"] == (
            "--magcache E012K2R20: no curve ships for videos with last_image: ask the operator of this server"
        )


def test_a_model_of_text_alone_takes_none(tmp_path: Path, small_text_model: Path) -> None:
    options = {"model": str(small_text_model), "device": "cpu", "size": "48x32", "frames": 5}
    with running(tmp_path, options=options, max_clips=None) as server:
        refused = server.ask("POST", "/v1/videos", prompt="a", last_image=data_url(LAST))
        words = "last_image: this model makes videos from text alone: leave it out"
        assert (refused.status, refused.error["message"]) == (400, words)
        assert "last_image" not in json.dumps(server.ask("GET", "/openapi.json").document)
