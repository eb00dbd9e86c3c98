"""Tests that no request gets what it should not: keys, owners, limits, pictures, addresses, paths and ids."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import re
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image
from starlette.routing import Route

from tests.server.running import STAR, Answer, Running, data_url, running, until
from wanfast.runtime.errors import ConfigError
from wanfast.server.app import create_app
from wanfast.server.files import Files
from wanfast.server.keys import EVERYBODY, Keys
from wanfast.server.settings import ServerSettings

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
MOST_BYTES = 300_000
JSON = {"Content-Type": "application/json"}
PICTURE = data_url(STAR.read_bytes())
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    file = folder / "keys"
    file.write_text(f"# of the team\n{ALICE}\n\n  {BOB}  \n")
    with running(folder, keys=Keys.read(file), most_bytes=MOST_BYTES) as server:
        yield server


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("open"), most_bytes=MOST_BYTES) as server:
        yield server


def as_(key: str, **others: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **others}


def post(server: Running, fields: Mapping[str, Any], key: str = ALICE) -> Answer:
    return server.ask("POST", "/v1/videos", json.dumps(fields).encode(), as_(key, **JSON))


def form(*parts: tuple[str, bytes]) -> bytes:
    """Returns a multipart form; each part has its headers and its bytes."""
    pieces = [f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + body for head, body in parts]
    return b"\r\n".join([*pieces, b"--b--\r\n"])


def bomb(width: int, height: int) -> bytes:
    """Returns a small PNG whose header promises this many pixels."""
    png = bytearray(picture_bytes("PNG"))
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    png[12:29] = header
    png[29:33] = zlib.crc32(header).to_bytes(4, "big")
    return bytes(png)


def picture_bytes(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    "path",
    ["/v1/videos", "/v1/videos/x", "/v1/videos/x/content", "/v1/videos/events", "/v1/models", "/metrics"],
    ids=str,
)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", f"Basic {ALICE}", ALICE, "Bearer #",
     f"Bearer {ALICE.upper()}", "Bearer \u00e9", f"Bearer {ALICE} {BOB}"],
    ids=str,
)  # fmt: skip
def test_without_a_key_nothing_is_shown(server: Running, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("utf-8").decode("latin-1")}
    answer = server.ask("GET", path, headers=headers)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_without_a_key_nothing_is_read_or_changed(server: Running) -> None:
    before = server.store.counts()
    for method, path in (("POST", "/v1/videos"), ("POST", "/v1/videos/sync"), ("DELETE", "/v1/videos/x"),
                         ("POST", "/v1/videos/x/cancel"), ("POST", "/v1/videos/x/remix")):  # fmt: skip
        assert server.ask(method, path, b"{", JSON).status == 401
    assert server.store.counts() == before
    assert server.ask("GET", "/health").status == server.ask("GET", "/ready").status == 200


OPEN = {"/", "/docs", "/static/{name}", "/openapi.json", "/health", "/ready"}  # to everybody, also without a key


def test_every_route_needs_a_key_except_those_that_are_open(server: Running) -> None:
    routes = create_app(server.parts).routes
    assert {getattr(route, "path", None) for route in routes} > OPEN
    for route in routes:
        assert isinstance(route, Route), f"{route} may hold routes that this test does not see"
        path = re.sub(r"\{\w+\}", "x", route.path)
        for method in route.methods or ():
            status = server.ask(method, path).status
            assert (status == 401) is (route.path not in OPEN), f"{method} {route.path} answers with {status}"


def test_a_named_path_is_not_taken_for_an_id(server: Running) -> None:
    """A route of a name below the route of any id would never be called."""
    routes = [route for route in create_app(server.parts).routes if isinstance(route, Route)]
    for index, route in enumerate(routes):
        path, methods = re.sub(r"\{\w+\}", "x", route.path), route.methods or set()
        above = [
            each.path for each in routes[:index] if each.path_regex.match(path) and methods & (each.methods or set())
        ]
        assert not above, f"{methods} {route.path} is never called, because {above[0]} stands above it"


def test_a_job_belongs_to_its_key(server: Running) -> None:
    server.maker.holds.set()
    video = post(server, {"prompt": "a secret", "input_reference": PICTURE}).document["id"]
    for method, path in (("GET", ""), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")):
        answer = server.ask(method, f"/v1/videos/{video}{path}", headers=as_(BOB))
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert answer.body == server.ask(method, f"/v1/videos/video_{'0' * 32}{path}", headers=as_(BOB)).body
    assert server.ask("GET", "/v1/videos", headers=as_(BOB)).document["data"] == []
    assert server.ask("GET", f"/v1/videos?after={video}", headers=as_(BOB)).status == 400
    assert [found["id"] for found in server.ask("GET", "/v1/videos", headers=as_(ALICE)).document["data"]] == [video]
    keyed = {"Idempotency-Key": "same"}
    body = json.dumps({"prompt": "a", "input_reference": PICTURE}).encode()
    ids = {server.ask("POST", "/v1/videos", body, as_(key, **JSON, **keyed)).document["id"] for key in (ALICE, BOB)}
    assert len(ids) == 2
    server.maker.holds.clear()
    until(lambda: not any(server.store.counts().values()))


def test_the_database_has_no_key(server: Running) -> None:
    post(server, {"prompt": "a", "input_reference": PICTURE})
    until(lambda: not any(server.store.counts().values()))
    stored = b"".join(file.read_bytes() for file in server.files.folder.iterdir() if file.name.startswith("jobs"))
    assert len(stored) > 4096 and ALICE.encode() not in stored
    assert server.files.folder.stat().st_mode & 0o077 == 0


def picture(value: Any) -> dict[str, Any]:
    return {"prompt": "a", "input_reference": value}


def url(address: str) -> dict[str, Any]:
    return picture({"image_url": address})


def image(data: bytes) -> dict[str, Any]:
    return picture(data_url(data))


def last(value: Any, **values: Any) -> dict[str, Any]:
    return fields(last_image=value, **values)


def fields(**values: Any) -> dict[str, Any]:
    return {"prompt": "a", "input_reference": PICTURE, **values}


BAD: dict[str, tuple[Any, int, str | None]] = {  # name -> (fields, status, param)
    "no prompt": ({"input_reference": PICTURE}, 400, "prompt"),
    "empty prompt": (fields(prompt=""), 400, "prompt"),
    "blank prompt": (fields(prompt=" \t\n"), 400, "prompt"),
    "control characters": (fields(prompt="\x00\x01"), 400, "prompt"),
    "surrogate": (fields(prompt="\ud800"), 400, "prompt"),
    "surrogate as a field": (fields(**{"\ud800": True}), 400, "?"),
    "long prompt": (fields(prompt="a" * 20_001), 400, "prompt"),
    "prompt of a list": (fields(prompt=["a"]), 400, "prompt"),
    "prompt of a number": (fields(prompt=3), 400, "prompt"),
    "long negative prompt": (fields(negative_prompt="a" * 20_001), 400, "negative_prompt"),
    "unknown model": (fields(model="sora-2"), 404, "model"),
    "model of a path": (fields(model="/etc"), 404, "model"),
    "model of a folder": (fields(model="../tiny"), 404, "model"),
    "seconds of a word": (fields(seconds="long"), 400, "seconds"),
    "seconds below zero": (fields(seconds=-4), 400, "seconds"),
    "seconds of a lot": (fields(seconds="1e308"), 400, "seconds"),
    "seconds of nan": (fields(seconds="nan"), 400, "seconds"),
    "seconds of infinity": (fields(seconds="inf"), 400, "seconds"),
    "eight seconds": (fields(seconds="8"), 400, "seconds"),
    "seconds and frames": (fields(seconds="0.25", num_frames=5), 400, "num_frames"),
    "size of words": (fields(size="wide"), 400, "size"),
    "odd size": (fields(size="65x64"), 400, "size"),
    "size of nothing": (fields(size="0x0"), 400, "size"),
    "larger size than the server's": (fields(size="128x64"), 400, "size"),
    "large size": (fields(size="9984x9984"), 400, "size"),
    "long size": (fields(size="6" * 400), 400, "size"),
    "many frames": (fields(num_frames=4001), 400, "num_frames"),
    "frames not 4n+1": (fields(num_frames=4), 400, "num_frames"),
    "frames below zero": (fields(num_frames=-3), 400, "num_frames"),
    "half a frame": (fields(num_frames=1.5), 400, "num_frames"),
    "steps of a lot": (fields(num_inference_steps=10**9), 400, "num_inference_steps"),
    "no steps": (fields(num_inference_steps=0), 400, "num_inference_steps"),
    "steps of yes": (fields(num_inference_steps=True), 400, "num_inference_steps"),
    "guidance of a lot": (fields(guidance_scale=1e9), 400, "guidance_scale"),
    "second guidance": (fields(guidance_scale_2=-1), 400, "guidance_scale_2"),
    "shift of zero": (fields(flow_shift=0), 400, "flow_shift"),
    "another boundary": (fields(boundary_ratio=0.123), 400, "boundary_ratio"),
    "fps of zero": (fields(fps=0), 400, "fps"),
    "fps of a lot": (fields(fps=10**6), 400, "fps"),
    "seed of 33 bits": (fields(seed=2**32), 400, "seed"),
    "seed below zero": (fields(seed=-1), 400, "seed"),
    "seed of many digits": (fields(seed=10**400), 400, "seed"),
    "priority of a lot": (fields(priority=10**6), 400, "priority"),
    "unknown field": (fields(output="/etc/passwd"), 400, "output"),
    "an option of the server": (fields(artifacts_dir="/tmp"), 400, "artifacts_dir"),
    "a lora": (fields(lora=["/etc/passwd"]), 400, "lora"),
    "unknown recipe": (fields(recipe="/etc"), 400, "recipe"),
    "recipe of other models": (fields(recipe="near-exact"), 400, "recipe"),
    "image of a path": (fields(image="/etc/passwd"), 400, "image"),
    "prototype": (fields(__proto__={"x": 1}), 400, "__proto__"),
    "no picture": ({"prompt": "a"}, 400, "input_reference"),
    "picture of a path": (picture("/etc/passwd"), 400, "input_reference"),
    "picture of a file id": (picture({"file_id": "file_1"}), 400, "input_reference"),
    "picture of both": (picture({**PICTURE, "file_id": "x"}), 400, "input_reference"),
    "http address": (url("http://127.0.0.1:1/x.png"), 400, "input_reference"),
    "https address": (url("https://example.com/x.png"), 400, "input_reference"),
    "file address": (url("file:///etc/passwd"), 400, "input_reference"),
    "http address with a picture": (
        url("http://127.0.0.1:1/," + PICTURE["image_url"].partition(",")[2]), 400, "input_reference"),
    "path as address": (url("/etc/passwd"), 400, "input_reference"),
    "metadata address": (url("http://169.254.169.254/latest"), 400, "input_reference"),
    "data without base64": (url("data:image/png,abc"), 400, "input_reference"),
    "wrong base64": (url("data:image/png;base64,%%%"), 400, "input_reference"),
    "empty data": (url("data:image/png;base64,"), 400, "input_reference"),
    "no picture in it": (image(b"#!/bin/sh\nrm -rf /\n"), 400, "input_reference"),
    "cut picture": (image(STAR.read_bytes()[:900]), 400, "input_reference"),
    "svg with an entity": (
        image(b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'), 400, "input_reference"),
    "eps with a program": (
        image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) run\n"), 400, "input_reference"),
    "a bomb of pixels": (image(bomb(60_000, 20_000)), 400, "input_reference"),
    "a larger bomb": (image(bomb(2**31 - 1, 2**31 - 1)), 400, "input_reference"),
    "tiny picture": (image(picture_bytes("PNG", (8, 8))), 400, "input_reference"),
    "thin picture": (image(picture_bytes("PNG", (400, 20))), 400, "input_reference"),
    "a last image alone": ({"prompt": "a", "last_image": PICTURE}, 400, "input_reference"),
    "last image of a path": (last("/etc/passwd"), 400, "last_image"),
    "last image of a file id": (last({"file_id": "file_1"}), 400, "last_image"),
    "http address of a last image": (last({"image_url": "http://127.0.0.1:1/x.png"}), 400, "last_image"),
    "file address of a last image": (last({"image_url": "file:///etc/passwd"}), 400, "last_image"),
    "wrong base64 of a last image": (last({"image_url": "data:image/png;base64,%%%"}), 400, "last_image"),
    "empty last image": (last({"image_url": "data:image/png;base64,"}), 400, "last_image"),
    "no picture in a last image": (last(data_url(b"#!/bin/sh\nrm -rf /\n")), 400, "last_image"),
    "cut last image": (last(data_url(STAR.read_bytes()[:900])), 400, "last_image"),
    "a bomb as a last image": (last(data_url(bomb(60_000, 20_000))), 400, "last_image"),
    "tiny last image": (last(data_url(picture_bytes("PNG", (8, 8)))), 400, "last_image"),
    "last image of one frame": (last(PICTURE, num_frames=1), 400, "last_image"),
    "last image of several clips": (last(PICTURE, seconds="0.75"), 400, "last_image"),
    "a cut first image beside a last one": (
        {**image(STAR.read_bytes()[:900]), "last_image": PICTURE}, 400, "input_reference"),
    "a list": ([1], 400, None),
    "a text": ("a", 400, None),
    "null": (None, 400, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_leaves_nothing(server: Running, name: str) -> None:
    body, status, param = BAD[name]
    before = _left_by_requests(server)
    answer = post(server, body)
    assert (answer.status, answer.error["param"]) == (status, param), answer.body
    _check_answer(answer, server)
    assert _left_by_requests(server) == before


def _left_by_requests(server: Running) -> tuple[list[Path], int, object]:
    """Returns what a request could have left: files, begun videos, and jobs of each state."""
    return sorted(server.files.folder.iterdir()), len(server.maker.made), server.store.counts()


def test_an_error_of_a_picture_says_what_is_wrong(server: Running) -> None:
    for data, words in (
        (STAR.read_bytes()[:900], "input_reference: is truncated or damaged"),
        (picture_bytes("PNG", (8, 8)), "input_reference: has 8x8 pixels; use an image of at least 16x16"),
        (bomb(60_000, 20_000), "scale the image to at most 64 megapixels"),
    ):
        assert words in post(server, image(data)).error["message"]


def _check_answer(answer: Answer, server: Running) -> None:
    """Checks that an error has its form, and names nothing of the machine."""
    assert set(answer.document) == {"error"} and set(answer.error) == {"message", "type", "param", "code"}
    text = answer.body.decode()
    assert "root:" not in text and "Traceback" not in text and "site-packages" not in text and "/proc" not in text
    assert str(server.files.folder) not in text and len(answer.error["message"]) < 500
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "server" not in answer.headers


RAW: dict[str, tuple[bytes, dict[str, str], int]] = {  # name -> (body, headers, status)
    "no type": (b"{}", {"Content-Type": ""}, 415),
    "xml": (b"<x/>", {"Content-Type": "application/xml"}, 415),
    "no json": (b"{", JSON, 400),
    "no text": (b"\xff\xfe", JSON, 400),
    "nan": (b'{"prompt": NaN}', JSON, 400),
    "deep json": (b"[" * 100_000, JSON, 400),
    "no boundary": (b"x", {"Content-Type": "multipart/form-data"}, 400),
    "no form": (b"x", FORM, 400),
    "two files": (
        form(('name="prompt"', b"a"), *[('name="input_reference"; filename="x"', STAR.read_bytes())] * 2), FORM, 400),
    "a file as prompt": (
        form(('name="prompt"; filename="x"', b"a"), ('name="input_reference"; filename="y"', b"b")), FORM, 400),
    "two last images": (
        form(('name="prompt"', b"a"), ('name="input_reference"; filename="x"', STAR.read_bytes()),
             *[('name="last_image"; filename="x"', STAR.read_bytes())] * 2), FORM, 400),
    "a last image twice": (
        form(('name="prompt"', b"a"), ('name="input_reference"; filename="x"', STAR.read_bytes()),
             ('name="last_image"; filename="x"', STAR.read_bytes()),
             ('name="last_image[image_url]"', PICTURE["image_url"].encode())), FORM, 400),
    "a last image as text": (
        form(('name="prompt"', b"a"), ('name="input_reference"; filename="x"', STAR.read_bytes()),
             ('name="last_image"', b"/etc/passwd")), FORM, 400),
    "a field twice": (
        form(*[('name="prompt"', b"a")] * 2, ('name="input_reference"; filename="x"', STAR.read_bytes())),
        FORM, 400),
    "a surrogate as a field twice": (
        form(*[('name="\\ud800"', b"a")] * 2),
        {"Content-Type": "multipart/form-data; boundary=b; charset=unicode_escape"}, 400),
    "many fields": (form(*[(f'name="f{n}"', b"a") for n in range(100)]), FORM, 400),
    "a path as file name": (
        form(('name="prompt"', b"a"), ('name="input_reference"; filename="../../x.png"', b"no picture")), FORM, 400),
    "a form of a browser": (b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"}, 400),
    "many fields of a browser": (
        b"&".join(b"f%d=1" % number for number in range(41)),
        {"Content-Type": "application/x-www-form-urlencoded"}, 400),
    "a body that is too large": (b'{"prompt": "' + b"a" * MOST_BYTES + b'"}', JSON, 413),
    "a file that is too large": (
        form(('name="prompt"', b"a"), ('name="input_reference"; filename="x"', b"a" * MOST_BYTES)), FORM, 413),
    "a long idempotency key": (b"{}", {**JSON, "Idempotency-Key": "k" * 256}, 400),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_a_damaged_body_is_refused(server: Running, name: str) -> None:
    body, headers, status = RAW[name]
    before = _left_by_requests(server)
    answer = server.ask("POST", "/v1/videos", body, as_(ALICE, **headers))
    assert answer.status == status, answer.body
    assert answer.error["code"] == "invalid_form" or "many fields" not in name
    _check_answer(answer, server)
    assert _left_by_requests(server) == before


@pytest.mark.parametrize(
    "body",
    [b'{"prompt": [' + b"0," * 50_000 + b"0]}", b"[" + b"[]," * 50_000 + b"[]]",
     json.dumps({f"f{number}": 1 for number in range(41)}).encode()],
    ids=["values", "lists", "fields"],
)  # fmt: skip
def test_a_body_of_many_values_is_refused_before_its_fields_are_checked(server: Running, body: bytes) -> None:
    """Bodies of 31 MB held the thread of HTTP for 11 and 28 seconds."""
    answer = server.ask("POST", "/v1/videos", body, as_(ALICE, **JSON))
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")
    assert "the body has too many values: send at most 40 fields" in answer.error["message"]
    _check_answer(answer, server)


def test_prompts_of_commas_alone_may_have_their_full_length(server: Running) -> None:
    texts = {"prompt": "a" + "," * 19_999, "negative_prompt": "," * 20_000}
    body = json.dumps({**texts, "input_reference": PICTURE, "unknown": 1}).encode()
    answer = server.ask("POST", "/v1/videos", body, as_(ALICE, **JSON))
    assert (answer.status, answer.error["param"]) == (400, "unknown")


def test_a_form_may_name_its_picture_as_it_likes(server: Running) -> None:
    """The name is never used."""
    body = form(('name="prompt"', b"a"), ('name="input_reference"; filename="../../../etc/x.png"', STAR.read_bytes()))
    answer = server.ask("POST", "/v1/videos", body, as_(ALICE, **FORM))
    assert answer.status == 200
    until(lambda: not any(server.store.counts().values()))
    assert server.maker.made[-1]["picture"] == STAR.read_bytes()


def test_a_body_without_a_length_is_limited_too(server: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    pieces = iter([b'{"prompt": "', *[b"a" * 50_000] * 20])
    with suppress(BrokenPipeError, ConnectionResetError):  # the answer came before the end
        connection.request("POST", "/v1/videos", pieces, as_(ALICE, **JSON), encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "too_large"
    connection.close()


def test_a_body_that_is_too_large_is_not_read(server: Running) -> None:
    """The server answers after the headers."""
    with socket.create_connection(tuple(urlsplit(server.url).netloc.split(":")), timeout=20) as connection:
        head = (
            f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: 9999999\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "path",
    ["/v1/videos/..%2f..%2fjobs.sqlite/content", "/v1/videos/%2e%2e/content", "/v1/videos/jobs.sqlite/content",
     "/v1/videos/video_%00/content", f"/v1/videos/video_{'0' * 31}%0a/content", "/v1/videos/video_*/content",
     "/v1/videos/' OR 1=1 --/content".replace(" ", "%20"), "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
     f"/v1/videos/video_{'0' * 32}/../../../etc/passwd", "/data/jobs.sqlite", "/static/../../etc/passwd",
     "/static/..%2f..%2fetc%2fpasswd", "/static/%2fetc%2fpasswd", "/static/%2e%2e"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_file_of_the_server_is_reached(server: Running, path: str, method: str) -> None:
    answer = server.ask(method, path, headers=as_(ALICE))
    assert answer.status in (404, 405), answer.body
    _check_answer(answer, server)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after"),
     ("after=' OR 1=1 --".replace(" ", "%20"), "after"), ("after=%00", "after"), (f"after=video_{'0' * 32}", "after")],
)  # fmt: skip
def test_a_wrong_question_is_refused(server: Running, query: str, param: str) -> None:
    answer = server.ask("GET", f"/v1/videos?{query}", headers=as_(ALICE))
    assert (answer.status, answer.error["param"]) == (400, param)
    _check_answer(answer, server)


def test_no_answer_leads_to_the_host_that_a_request_names(server: Running) -> None:
    for method, path in (("GET", "/v1/videos/"), ("POST", "/v1/videos/"), ("GET", "/docs/")):
        answer = server.ask(method, path, headers=as_(ALICE, Host="evil.example"))
        assert answer.status == 404 and "location" not in answer.headers


def test_ids_cannot_be_guessed(open_server: Running) -> None:
    ids = [open_server.create() for _ in range(20)]
    assert all(re.fullmatch("video_[0-9a-f]{32}", video) for video in ids)
    bits = [int(video[6:], 16) for video in ids]
    changed = [(first ^ second).bit_count() for first, second in itertools.pairwise(bits)]
    assert min(changed) > 30  # of 128


def test_a_bug_is_an_error_without_its_words(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("a bug at /srv/secret")

    monkeypatch.setattr(type(server.store), "page", broken)
    answer = server.ask("GET", "/v1/videos", headers=as_(ALICE))
    assert (answer.status, answer.error["code"]) == (500, "server_error") and b"secret" not in answer.body
    _check_answer(answer, server)
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403), ({"Host": "[::1"}, 400),
     ({"Host": "localhost:80"}, 200), ({"Host": "[::1]:80"}, 200),
     ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:1"}, 403)],
)  # fmt: skip
def test_pages_of_other_sites_cannot_use_a_server_without_keys(
    open_server: Running, headers: dict[str, str], status: int
) -> None:
    assert open_server.ask("GET", "/v1/videos", headers=headers).status == status


def test_a_page_of_the_server_itself_can(open_server: Running) -> None:
    assert open_server.ask("GET", "/v1/videos", headers={"Origin": open_server.url}).status == 200


def test_with_keys_any_host_name_is_answered(server: Running) -> None:
    headers = as_(ALICE, Host="videos.example", Origin="http://other.example")
    assert server.ask("GET", "/v1/videos", headers=headers).status == 200


def test_an_address_for_all_needs_keys(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "videos.example"):
        with pytest.raises(ConfigError, match="add --api-key-file FILE"):
            ServerSettings(host=host, port=1, data_dir=tmp_path)
        ServerSettings(host=host, port=1, data_dir=tmp_path, api_key_file=tmp_path / "keys")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServerSettings(host=host, port=1, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"port": -1}, "--port -1: use 0 to 65535"),
        ({"max_queue": 2_000_000}, "--max-queue 2000000: use 1 to 1000000"),
        ({"max_queue": 0}, "--max-queue 0: use 1 to"),
        ({"max_upload_mb": 0}, "--max-upload-mb 0: use 1 to 1000"),
        ({"keep_hours": 0.0}, "--keep-hours 0: use 0.001 to"),
        ({"keep_hours": float("nan")}, "--keep-hours nan"),
        ({"max_clips": 0}, "--max-clips 0: use 1 to 100"),
        ({"database": "mysql://user:secret@host/x"}, "--database is not postgresql://"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        ServerSettings(**{"host": "127.0.0.1", "port": 1, "data_dir": tmp_path, **setting})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "has no key"), ("# nothing\n\n", "has no key"), ("short", "key 1 is too short"),
     (f"{ALICE}\nwith a space in it, and long", "key 2 is too short, or has"), ("é" * 30, "key 1")],
)  # fmt: skip
def test_a_wrong_file_of_keys_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        Keys.read(file)
    assert "--api-key-file" in str(error.value) and "with a space" not in str(error.value)
    with pytest.raises(ConfigError, match="--api-key-file"):
        Keys.read(tmp_path / "missing")


def test_a_folder_of_others_is_not_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir(mode=0o755)
    (folder / "jobs.sqlite-wal").touch()
    Files(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "notes").touch()
    Files(folder)  # it is closed already
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="has files of other programs: give a folder that only the server uses"):
        Files(folder)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_without_keys_everything_has_one_owner() -> None:
    assert Keys().owner(None) == Keys().owner("Bearer x") == EVERYBODY


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each key is compared as a whole, also after one that fits."""
    from wanfast.server import keys as keys_module

    file = tmp_path / "keys"
    file.write_text(f"{ALICE}\n{BOB}\n")
    keys, compared = Keys.read(file), []
    compare = keys_module.hmac.compare_digest
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    assert keys.owner(f"Bearer {ALICE}") != keys.owner(f"bearer {BOB}")
    assert len(compared) == 4 and all(len(each) == 32 for pair in compared for each in pair)


def test_base64_of_the_picture_is_the_picture(server: Running) -> None:
    """The bytes that the ranks get are those that were sent."""
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture_bytes(kind, (80, 64))
        assert post(server, image(data)).status == 200
        until(lambda: not any(server.store.counts().values()))
        assert (
            server.maker.made[-1]["picture"] == data == base64.b64decode(data_url(data)["image_url"].partition(",")[2])
        )
