"""Tests the video API by OpenAI's own client, and by plain requests for what this client does not do."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import openai
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.types import Message

import wanfast
from tests.server.running import STAR, Running, colour, data_url, running, until
from wanfast.server import app
from wanfast.server.fields import IMAGES, Fields
from wanfast.server.keys import EVERYBODY
from wanfast.server.store import Store, StoredJob

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def _clean(server: Running) -> Iterator[None]:
    yield
    server.maker.holds.clear()
    until(lambda: not any(server.store.counts().values()))


def test_a_video_from_its_creation_to_its_end(server: Running) -> None:
    client = server.client()
    seed = 77
    made = client.videos.create_and_poll(
        prompt="The star goes right.", input_reference=STAR, model="tiny", size="64x48", poll_interval_ms=20,
        extra_body={"seed": seed, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "fps": 8},
    )  # fmt: skip
    assert (made.object, made.status, made.progress, made.error) == ("video", "completed", 100, None)
    assert (made.size, made.seconds, made.model, made.prompt) == ("64x48", "0.625", "tiny", "The star goes right.")
    assert made.completed_at and made.expires_at == made.completed_at + 3600 and made.created_at <= made.completed_at
    extra = made.model_extra or {}
    assert extra["seed"] == seed and extra["plan"]["steps"] == {"high_noise": 2, "low_noise": 2}
    assert {"encode", "denoise", "decode", "write", "total"} == set(extra["seconds_by_stage"])
    asked = server.maker.made[-1]
    assert asked["picture"] == STAR.read_bytes() and not Path(asked["image"]).exists()
    assert (asked["guidance_high_noise"], asked["guidance_low_noise"], asked["fit"]) == (3.0, 3.0, "crop")
    video = client.videos.download_content(made.id).read()
    with av.open(io.BytesIO(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (len(frames), container.streams.video[0].average_rate) == (5, 8)
    assert frames[0].shape == (48, 64, 3) and abs(int(frames[0].mean()) - colour(seed)) < 3
    thumbnail = client.videos.download_content(made.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (64, 48)
    deleted = client.videos.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert not list(server.files.folder.glob("video_*"))


def test_the_example_of_the_page_runs(server: Running, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(wanfast.__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (workdir / "wanfast/assets/examples").mkdir(parents=True)
    (workdir / "wanfast/assets/examples/star.png").write_bytes(STAR.read_bytes())
    monkeypatch.setattr(openai.resources.videos.Videos, "_sleep", lambda self, seconds: time.sleep(0.02))
    exec(example.replace("http://127.0.0.1:8000", server.url))
    assert (workdir / "client.mp4").read_bytes()[4:8] == b"ftyp"
    for video in server.client().videos.list():
        server.client().videos.delete(video.id)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_with_curl_run(server: Running, workdir: Path) -> None:
    page = (Path(wanfast.__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    at_once, queued = (block for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) if "curl" in block)
    (workdir / "wanfast").symlink_to(Path(wanfast.__file__).parent)

    def ran(example: str) -> str:
        command = ("bash", "-ec", example.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ran(at_once)
    assert (workdir / "curl.mp4").read_bytes()[4:8] == b"ftyp"
    assert server.maker.made[-1]["picture"] == STAR.read_bytes() and server.maker.made[-1]["seed"] == 1
    said = ran(queued.replace("seconds=1", "seconds=0.25"))  # the clips of this server have 5 frames
    assert (workdir / "queued.mp4").read_bytes()[4:8] == b"ftyp" and '"deleted":true' in said
    assert server.maker.made[-1]["picture"] == STAR.read_bytes() and "last_image" in server.maker.made[-1]
    for video in server.client().videos.list():
        server.client().videos.delete(video.id)


def test_the_page_names_each_field() -> None:
    page = (Path(wanfast.__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| field | meaning |")
    rows = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == {*Fields.model_fields, *IMAGES}


def test_videos_are_listed_in_pages(server: Running) -> None:
    client = server.client()
    made = [server.create() for _ in range(5)]
    assert [video.id for video in client.videos.list(limit=2, order="asc") if video.id in made] == made
    page = client.videos.list(limit=3)
    assert [video.id for video in page.data] == made[:1:-1] and page.has_more
    document = server.ask("GET", f"/v1/videos?limit=2&after={made[2]}").document
    assert (document["object"], document["first_id"], document["last_id"]) == ("list", made[1], made[0])
    for video in made:
        server.ended(video)
        client.videos.delete(video)
    assert server.ask("GET", "/v1/videos").document == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_all_videos_are_deleted_while_they_are_listed(server: Running) -> None:
    client = server.client()
    for _ in range(5):
        server.create()
    for video in client.videos.list(limit=2):  # the next page follows a video that is deleted
        client.videos.delete(video.id)
    assert client.videos.list().data == []


def test_a_picture_may_be_a_data_url(server: Running) -> None:
    by_form = server.client().videos.create(prompt="a", extra_body={"input_reference": data_url(STAR.read_bytes())})
    by_json = server.create()
    for video in (by_form.id, by_json):
        assert server.ended(video)["status"] == "completed"
        assert server.maker.made[-1]["picture"] == STAR.read_bytes()


def test_what_is_left_out_is_the_servers_own(server: Running) -> None:
    video = server.ended(server.create())
    assert (video["size"], video["seconds"], video["model"]) == ("64x64", "0.3125", "tiny")
    assert (video["plan"]["frames"], sum(video["plan"]["steps"].values())) == (5, 3)
    seeds = {server.show(server.create())["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_seconds_are_whole_groups_of_four_frames(server: Running) -> None:
    assert server.ended(server.create(seconds="0.25"))["plan"]["frames"] == 5
    assert server.show(server.create(seconds=0.25))["seconds"] == "0.25"
    for seconds in ("4", 8, "12"):
        answer = server.ask("POST", "/v1/videos", prompt="a", seconds=seconds, input_reference=data_url(b"x"))
        assert (answer.status, answer.error["param"]) == (400, "seconds")
        assert "at most 13 frames on this server" in answer.error["message"]


def test_a_running_video_shows_its_progress_and_a_queued_one_its_place(server: Running) -> None:
    server.maker.holds.set()
    running_ = server.create()
    until(lambda: server.show(running_)["stage"] == "high noise")
    first, second = server.create(), server.create(priority=5)
    shown = server.ask("GET", f"/v1/videos/{running_}")
    assert shown.document["status"] == "in_progress" and shown.headers["openai-poll-after-ms"] == "1000"
    assert [server.show(video)["queue_position"] for video in (running_, second, first)] == [None, 0, 1]
    assert server.ask("GET", f"/v1/videos/{running_}/content").error["code"] == "not_ready"
    server.maker.holds.clear()
    assert [server.ended(video)["status"] for video in (running_, first, second)] == ["completed"] * 3


def test_a_running_video_is_cancelled_by_cancel_and_by_delete(server: Running) -> None:
    server.maker.holds.set()
    before = server.metric('wanfast_failures_total{code="cancelled"}')
    for how in ("cancel", "delete"):
        video = server.create()
        until(lambda video=video: server.show(video)["status"] == "in_progress")
        if how == "cancel":
            shown = server.ask("POST", f"/v1/videos/{video}/cancel").document
            assert (shown["status"], shown["error"]["code"]) == ("failed", "cancelled")
        else:
            server.client().videos.delete(video)
        until(server.maker.cancelled.is_set)
    server.maker.holds.clear()
    assert server.ended(server.create())["status"] == "completed"
    assert server.metric('wanfast_failures_total{code="cancelled"}') == before + 2


def test_sync_answers_with_the_video(server: Running) -> None:
    picture = data_url(STAR.read_bytes())
    answer = server.ask("POST", "/v1/videos/sync", prompt="a", input_reference=picture)
    assert answer.status == 200 and answer.headers["content-type"] == "video/mp4" and answer.body[4:8] == b"ftyp"
    server.maker.errors.append(ZeroDivisionError())
    answer = server.ask("POST", "/v1/videos/sync", prompt="a", input_reference=picture)
    assert (answer.status, answer.error["code"]) == (500, "server_error")


def test_sync_looks_seldom_at_the_database(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, find = list[str](), Store.find
    monkeypatch.setattr(Store, "find", lambda store, video, owner: (looks.append(video), find(store, video, owner))[1])
    server.maker.holds.set()
    with ThreadPoolExecutor(1) as pool:
        picture = data_url(STAR.read_bytes())
        waiting = pool.submit(server.ask, "POST", "/v1/videos/sync", prompt="a", input_reference=picture)
        time.sleep(1.3)
        server.maker.holds.clear()
        assert waiting.result().status == 200 and 2 <= len(looks) <= 5


def leave_sync(server: Running, **headers: str) -> None:
    """Sends a request to /v1/videos/sync, and closes the connection before the answer."""
    body = json.dumps({"prompt": "a", "input_reference": data_url(STAR.read_bytes())}).encode()
    given = {"Content-Type": "application/json", **headers}
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/videos/sync", body, given), timeout=0.5)


def test_a_video_of_sync_is_cancelled_if_its_client_leaves(server: Running) -> None:
    server.maker.holds.set()
    before = server.metric('wanfast_failures_total{code="cancelled"}')
    leave_sync(server)
    until(lambda: server.ask("GET", "/v1/videos?limit=1").document["data"][0]["status"] == "failed")
    until(server.maker.cancelled.is_set)
    assert server.metric('wanfast_failures_total{code="cancelled"}') == before + 1


@pytest.mark.parametrize(("headers", "status"), [((), "failed"), (((b"idempotency-key", b"k"),), "in_progress")])
def test_a_video_of_sync_is_cancelled_if_its_task_is(
    server: Running, headers: tuple[tuple[bytes, bytes], ...], status: str
) -> None:
    """Ray Serve cancels the task of a request whose client has left."""

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def leave(job: StoredJob) -> None:
        waiting = asyncio.create_task(
            app._awaited(Request({"type": "http", "headers": headers}, never), job, server.parts)
        )
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    server.maker.holds.set()
    video = server.create()
    until(lambda: server.show(video)["status"] == "in_progress")
    job = server.store.find(video, EVERYBODY)
    assert job
    asyncio.run(leave(job))
    assert server.show(video)["status"] == status


def test_a_video_of_sync_with_a_key_is_not_cancelled_if_its_client_leaves(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client may send the request again, and another request may wait for the same video."""
    monkeypatch.setattr(app, "_LOOK_S", 0.1)
    server.maker.holds.set()
    headers = {"Idempotency-Key": "sync"}
    leave_sync(server, **headers)
    with ThreadPoolExecutor(1) as pool:
        picture = data_url(STAR.read_bytes())
        waiting = pool.submit(
            server.ask, "POST", "/v1/videos/sync", headers=headers, prompt="a", input_reference=picture
        )
        leave_sync(server, **headers)
        time.sleep(0.3)  # the server notices within a tenth of a second that a client has left
        server.maker.holds.clear()
        assert waiting.result().status == 200


def test_ranges_of_a_video_are_served(server: Running) -> None:
    video = server.ended(server.create())["id"]
    whole = server.ask("GET", f"/v1/videos/{video}/content").body
    part = server.ask("GET", f"/v1/videos/{video}/content", headers={"Range": "bytes=10-19"})
    assert (part.status, part.body) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert server.ask("GET", f"/v1/videos/{video}/content?variant=spritesheet").error["param"] == "variant"


def test_a_repeated_key_is_the_same_video(server: Running) -> None:
    picture = data_url(STAR.read_bytes())

    def post(prompt: str) -> tuple[int, dict[str, object]]:
        headers = {"Idempotency-Key": "k1"}
        answer = server.ask("POST", "/v1/videos", headers=headers, prompt=prompt, input_reference=picture)
        return answer.status, answer.document

    first, second, other = post("a"), post("a"), post("b")
    assert first[1]["id"] == second[1]["id"] and first[1]["seed"] == second[1]["seed"]
    assert (other[0], other[1]["error"]["code"]) == (409, "idempotency_key_reused")


def test_models_and_unsupported_calls(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    video = server.create()
    for path in (f"{video}/remix", f"{video}/edits", f"{video}/extensions", f"{video}/characters"):
        answer = server.ask("POST", f"/v1/videos/{path}", prompt="a")
        assert (answer.status, answer.error["code"]) == (501, "not_implemented")
    client = server.client().videos
    for call in (
        lambda: client.remix(video, prompt="b"),
        lambda: client.edit(video=b"mp4", prompt="b"),
        lambda: client.extend(video=b"mp4", prompt="b", seconds="4"),
        lambda: client.create_character(name="b", video=b"mp4"),
        lambda: client.get_character("char_1"),
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            call()
        assert refused.value.status_code == 501
    assert server.ask("POST", f"/v1/videos/{video}/nothing").status == 404


def test_the_description_of_the_api_names_all_fields(server: Running) -> None:
    description = server.ask("GET", "/openapi.json").document
    body = description["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    for kind in ("application/json", "multipart/form-data"):
        assert {"prompt", "input_reference", "last_image", "seconds", "seed"} <= body[kind]["schema"][
            "properties"
        ].keys()
    assert server.ask("GET", "/docs").status == 200
