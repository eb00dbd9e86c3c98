"""Tests the stream of a key's videos, and what the server tells a page of itself."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from sqlalchemy.exc import SQLAlchemyError

from tests import lora_files
from tests.server.running import SMALL, STAR, Running, data_url, running, until
from wanfast.server import app, changes
from wanfast.server.keys import Keys
from wanfast.server.store import Overview, Store

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
Next = Callable[[], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"{ALICE}\n{BOB}\n")
    keys = Keys.read(folder / "keys")
    with pytest.MonkeyPatch.context() as patched, running(folder, keys=keys) as server:
        patched.setattr(changes, "LOOK_S", 0.02)
        yield server


@pytest.fixture(autouse=True)
def _clean(server: Running) -> Iterator[None]:
    yield
    server.maker.holds.clear()
    until(lambda: not any(server.store.counts().values()))


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def create(server: Running, key: str = ALICE, **fields: Any) -> str:
    given = {"prompt": "a star", "input_reference": data_url(STAR.read_bytes()), **fields}
    answer = server.ask("POST", "/v1/videos", json.dumps(given).encode(), as_(key))
    assert answer.status == 200, answer.body
    return str(answer.document["id"])


@contextmanager
def following(server: Running, key: str = ALICE) -> Iterator[Next]:
    """Opens a stream, and yields a function that returns the next change; None at the end."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.request("GET", "/v1/videos/events", headers=as_(key))
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.headers["Content-Type"] == "application/x-ndjson"

    def following_line() -> Any:
        line = answer.readline()
        return json.loads(line) if line.strip() else line or None

    yield following_line
    answer.close()
    connection.close()


def test_a_stream_tells_what_changes_and_nothing_twice(server: Running) -> None:
    server.maker.holds.set()
    running_one, queued = create(server), create(server, prompt="later", priority=-1)
    of_another = create(server, BOB, prompt="a secret")
    until(lambda: server.ask("GET", f"/v1/videos/{running_one}", headers=as_(ALICE)).document["stage"])
    with following(server) as change:
        first = change()
        assert (first["status"], first["queued"], first["deleted"]) == ("ready", 2, [])
        assert [(video["id"], video["status"]) for video in first["videos"]] == [
            (running_one, "in_progress"), (queued, "queued")
        ]  # fmt: skip
        assert first["videos"][1]["queue_position"] == 1  # the job of another key comes before it
        shown = server.ask("GET", f"/v1/videos/{queued}", headers=as_(ALICE)).document
        assert first["videos"][1] == shown
        assert server.ask("DELETE", f"/v1/videos/{queued}", headers=as_(ALICE)).status == 200
        second = change()
        assert (second["videos"], second["deleted"], second["queued"]) == ([], [queued], 1)
        server.maker.holds.clear()
        while (last := change())["queued"] or not last["videos"] or last["videos"][0]["status"] != "completed":
            assert all(video["id"] == running_one for video in last["videos"])
    assert of_another not in json.dumps([first, second, last])


def test_a_stream_has_the_latest_videos_and_says_where_older_ones_follow(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MOST_VIDEOS", 2)
    videos = [create(server, BOB) for _ in range(3)]
    until(lambda: not any(server.store.counts().values()))
    with following(server, BOB) as change:
        first = change()
        assert [video["id"] for video in first["videos"]] == videos[:0:-1] and first["older"] == videos[1]
        newest = create(server, BOB)
        while not (last := change())["videos"] or last["videos"][0]["status"] != "completed":
            assert last["deleted"] == []  # one that is no longer among the latest is not deleted
        assert [video["id"] for video in last["videos"]] == [newest]
        assert last["deleted"] == [] and last["older"] is None


def test_an_empty_line_shows_that_the_connection_lives(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_BEAT_S", 0.0)
    with following(server) as change:
        assert change()["status"] == "ready"
        assert change() == b"\n"


def test_a_stream_ends_if_the_database_does_not_answer(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise SQLAlchemyError

    with following(server) as change:
        assert change()
        monkeypatch.setattr(type(server.store), "overview", broken)
        assert change() is None
    assert caplog.records == []  # uvicorn's, of an answer that broke off


def test_only_so_many_streams_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_STREAMS", 1)
    with running(tmp_path) as server:
        with following(server) as change:
            assert change()
            refused = server.ask("GET", "/v1/videos/events")
            assert (refused.status, refused.error["code"]) == (429, "too_many_streams")
            assert int(refused.headers["Retry-After"]) > 0
        until(lambda: status_of_stream(server) == 200)


def test_one_key_leaves_streams_to_the_others(server: Running) -> None:
    with ExitStack() as open_:
        for _ in range(changes.MOST_OF_A_KEY):
            assert open_.enter_context(following(server, ALICE))()
        refused = server.ask("GET", "/v1/videos/events", headers=as_(ALICE))
        assert (refused.status, refused.error["code"]) == (429, "too_many_streams")
        assert open_.enter_context(following(server, BOB))()


def test_the_streams_of_a_key_share_one_look(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "LOOK_S", 0.2)
    looks, overview = list[float](), Store.overview
    with ExitStack() as open_:
        streams = [open_.enter_context(following(server, ALICE)) for _ in range(8)]
        assert all(change()["status"] == "ready" for change in streams)

        def noted(store: Store, owner: str, most: int) -> Overview:
            if owner == server.parts.keys.owner(f"Bearer {ALICE}"):
                looks.append(time.monotonic())
            return overview(store, owner, most)

        monkeypatch.setattr(Store, "overview", noted)
        video = create(server)
        for change in streams:
            while not (last := change())["videos"] or last["videos"][0]["status"] != "completed":
                pass
            assert last["videos"][0]["id"] == video
        time.sleep(1)
        monkeypatch.undo()
    assert len(looks) > 4 and all(later - sooner > 0.15 for sooner, later in itertools.pairwise(looks))


def status_of_stream(server: Running) -> int:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.request("GET", "/v1/videos/events")
    with closing(connection), connection.getresponse() as answer:
        return answer.status


def test_a_server_that_stops_ends_its_streams(tmp_path: Path) -> None:
    with running(tmp_path) as server, following(server) as change:
        assert change()["status"] == "ready"
        server.worker.stop()
        assert change()["status"] == "stopping"
        assert change() is None


def test_a_stream_needs_a_key(server: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}):
        answer = server.ask("GET", f"/v1/videos/events?key={ALICE}", headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


def test_the_model_tells_its_defaults_and_its_recipes(server: Running, tmp_path: Path) -> None:
    (model,) = server.ask("GET", "/v1/models", headers=as_(ALICE)).document["data"]
    assert (model["recipe"], model["max_upload_bytes"]) == (None, 2_000_000)
    assert model["recipes"] == ["lightning-4", "hybrid"]  # with the LoRAs that the tiny model brings
    asked = {"size": "64x64", "num_frames": 5, "fps": 16, "num_inference_steps": 3, "flow_shift": 5.0}
    assert asked.items() <= model["defaults"].items()
    assert {"prompt", "seed", "input_reference"}.isdisjoint(model["defaults"])
    assert server.ask("GET", "/v1/models").status == 401


def test_a_recipe_is_chosen_among_those_of_the_loaded_models(tmp_path: Path) -> None:
    options = {**SMALL, "recipe": "near-exact", "quantize_on_the_fly": True}
    with running(tmp_path, options=options, defaults={}) as server:
        (model,) = server.ask("GET", "/v1/models").document["data"]
        assert (model["recipe"], model["recipes"]) == ("near-exact", ["near-exact", "fast"])
        plans = [server.ended(server.create(**recipe))["plan"] for recipe in ({}, {"recipe": "fast"})]
        assert [plan["recipe"] for plan in plans] == ["near-exact", "fast"]
        assert plans[0]["skipped_forwards"] == 0 < plans[1]["skipped_forwards"]
        for recipe, words in (
            ("exact", "use a recipe that fits the loaded models (near-exact, fast)"),
            ("fastest", "input should be"),
        ):
            given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes()), "recipe": recipe}
            refused = server.ask("POST", "/v1/videos", **given)
            assert (refused.status, refused.error["param"]) == (400, "recipe") and words in refused.error["message"]


def test_a_request_may_take_the_loras_that_the_model_brings(tmp_path: Path) -> None:
    """Each video of a server has LoRAs of its own: the next one is that of the base weights again."""
    with running(tmp_path, defaults={"steps": 2, "seed": 5}) as server:
        ended = [
            server.ended(server.create(**own)) for own in ({}, {"recipe": "lightning-4"}, {"recipe": "hybrid"}, {})
        ]
        assert [each["status"] for each in ended] == ["completed"] * 4
        assert [each["plan"]["forwards"] for each in ended] == [4, 4, 33, 4]


def test_a_server_without_recipes_says_what_a_recipe_needs(tmp_path: Path) -> None:
    own = str(lora_files.tiny_without_loras(tmp_path))
    with running(tmp_path, options={**SMALL, "model": own}) as server:
        given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes()), "recipe": "fast"}
        refused = server.ask("POST", "/v1/videos", **given)
        assert (refused.status, refused.error["param"]) == (400, "recipe")
        assert refused.error["message"] == (
            "recipe fast: the loaded models are not those of this recipe: leave out recipe, or use a handle or a "
            "server that is started with recipe fast"
        )


def test_a_request_overrides_the_defaults_that_contradict_it(tmp_path: Path) -> None:
    lora = lora_files.write(tmp_path / "a.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)})
    options = {**SMALL, "lora": [str(lora)]}
    with running(tmp_path, options=options, defaults={"steps": 6, "shift": 3.0}) as server:
        (model,) = server.ask("GET", "/v1/models").document["data"]
        assert "lightning-4" in model["recipes"]
        given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes()), "recipe": "lightning-4"}
        for field in ("num_inference_steps", "flow_shift"):
            refused = server.ask("POST", "/v1/videos", **given, **{field: 4})
            assert (refused.status, refused.error["param"]) == (400, field)
            assert refused.error["message"] == (
                f"{field}: the recipe lightning-4 has its own noise levels: leave out this field"
            )
        plan = server.ended(server.create(recipe="lightning-4"))["plan"]
        assert (plan["recipe"], sum(plan["steps"].values())) == ("lightning-4", 4)
    with running(tmp_path, defaults={"sigmas": "1,0.9,0.5"}) as server:
        assert server.ended(server.create(num_inference_steps=4))["plan"]["solver"]


@pytest.mark.parametrize("path", ["/", "/docs", "/static/page.js", "/static/page.css", "/v1/videos", "/missing"])
def test_every_answer_lets_only_the_server_s_own_scripts_run(server: Running, path: str) -> None:
    headers = server.ask("GET", path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not [name for name, value in policy.items() if "unsafe" in value or "http" in value or "data:" in value]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"


def test_the_page_needs_no_key_and_no_other_server(server: Running) -> None:
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/static/page.js", "text/javascript"),
                       ("/static/docs.js", "text/javascript"), ("/static/page.css", "text/css")):  # fmt: skip
        answer = server.ask("GET", path)
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
        assert b"://" not in answer.body
