"""Tests the server's page in a real browser without a screen, from the image to the video that plays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect
from sqlalchemy.exc import SQLAlchemyError

from tests.server.browser import browser, needs_chromium, page_of
from tests.server.running import STAR, Running, data_url, running, until
from tests.server.test_serve import Process, served
from wanfast.server import changes, worker
from wanfast.server.keys import Keys

__all__ = ["browser"]

pytestmark = needs_chromium
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
REFUSED = "Failed to load resource"  # the browser's own words for an answer that is an error


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patched, running(tmp_path_factory.mktemp("server")) as server:
        patched.setattr(changes, "LOOK_S", 0.05)
        yield server


@pytest.fixture
def page(server: Running, browser: Browser, clean: None) -> Iterator[Page]:
    with page_of(browser, server.url, expects=(REFUSED,)) as page:
        yield page


@pytest.fixture
def clean(server: Running) -> Iterator[None]:
    """Removes all videos after a test."""
    yield
    server.maker.holds.clear()
    until(lambda: not any(server.store.counts().values()))
    for video in server.ask("GET", "/v1/videos?limit=100").document["data"]:
        server.ask("DELETE", f"/v1/videos/{video['id']}")


def ask_for(page: Page, prompt: str) -> None:
    page.get_by_label("Image that the video starts from").set_input_files(STAR)
    page.get_by_label("What happens in the video").fill(prompt)
    page.get_by_role("button", name="Make the video").click()


def test_a_model_of_text_alone_takes_no_picture(server: Running, page: Page) -> None:
    sent = []

    def change(route: Route) -> None:
        if route.request.method == "POST":
            sent.append(route.request.post_data_buffer)
            return route.continue_()
        answer = route.fetch()
        document = answer.json()
        document["data"][0]["takes_images"] = False
        return route.fulfill(response=answer, json=document)

    page.route("**/v1/models", change)
    page.route("**/v1/videos", change)
    page.reload()
    expect(page.get_by_label("Image that the video starts from")).to_be_hidden()
    page.get_by_label("What happens in the video").fill("A star goes right.")
    page.get_by_role("button", name="Make the video").click()
    expect(
        page.get_by_role("alert").filter(has_text="input_reference")
    ).to_be_visible()  # this server's model needs one
    assert len(sent) == 1 and b"input_reference" not in sent[0] and b"A star goes right." in sent[0]


def rows(page: Page, section: str) -> Locator:
    return page.get_by_role("region", name=section).get_by_role("listitem")


def test_from_a_picture_to_a_video_that_plays(server: Running, page: Page) -> None:
    server.maker.holds.set()
    expect(page.get_by_role("status").filter(has_text="The server is ready.")).to_be_visible()
    page.get_by_text("Settings", exact=True).click()
    steps = page.get_by_label("Steps")
    expect(steps).to_have_attribute("placeholder", "3")  # the server's own
    steps.fill("4")
    page.get_by_label("Size").fill("64x48")
    page.get_by_label("Seed").fill("7")
    ask_for(page, "The <b>star</b> goes right.")
    expect(page.get_by_role("img", name="The image that you chose")).to_be_visible()

    queued = rows(page, "Queue")
    expect(queued.get_by_role("progressbar", name="The <b>star</b> goes right.")).to_be_visible()
    expect(queued).to_contain_text("0 %, high noise")
    server.maker.holds.clear()
    expect(queued).to_have_count(0)
    made = rows(page, "History")
    expect(made).to_contain_text("Finished.")
    expect(made.get_by_role("img", name="The first frame")).to_be_visible()
    expect(page.locator("#news")).to_have_text("Finished. The <b>star</b> goes right.")

    viewer = page.get_by_role("region", name="Video: The <b>star</b> goes right.")
    player = viewer.locator("video")
    expect(player).to_be_visible()
    player.focus()
    page.keyboard.press("Space")
    until(lambda: player.evaluate("video => !video.paused && video.currentTime > 0.05"))
    assert player.evaluate("video => [video.videoWidth, video.videoHeight, video.error]") == [64, 48, None]
    assert viewer.locator("dd").all_inner_texts()[:2] == ["64x48", "0.3125 s"]
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Download the mp4").click()
    (file,) = server.files.folder.glob("video_*.mp4")
    assert Path(download.value.path()).read_bytes() == file.read_bytes()
    asked = server.maker.made[-1]
    assert (asked["steps"], asked["size"], asked["seed"], asked["picture"]) == (4, "64x48", 7, STAR.read_bytes())
    assert "negative_prompt" not in asked  # a field that is left empty is not sent


@pytest.mark.long
def test_the_tiny_model_makes_the_video_of_a_page(workdir: Path, browser: Browser) -> None:
    with served(Process(workdir, "wanfast")) as process:
        process.wait()
        with page_of(browser, process.url) as page:
            ask_for(page, "The big orange star goes right.")
            player = page.locator("#player")
            expect(player).to_be_visible(timeout=60_000)
            player.focus()
            page.keyboard.press("Space")
            until(lambda: player.evaluate("video => !video.paused && video.currentTime > 0.05"))


def test_a_page_is_used_by_the_keyboard_alone(server: Running, page: Page) -> None:
    """Each step goes to the next control; a control that goes away leaves the focus near its place."""
    server.maker.holds.set()
    queued, made = rows(page, "Queue"), rows(page, "History")
    expect(page.get_by_text("The server is ready.")).to_be_visible()

    def tab() -> str:
        page.keyboard.press("Tab")
        return focused(page)

    assert [tab(), tab(), tab()] == ["Go to the videos", "The calls of this server", "input_reference"]
    page.locator(":focus").set_input_files(STAR)
    assert [tab(), tab()] == ["last_image", "prompt"]
    page.keyboard.type("by keys")
    assert [tab(), tab()] == ["the server's own\nlightning-4\nhybrid", "Settings"]
    page.keyboard.press("Enter")
    names = ["negative_prompt", "size", "num_frames", "seconds", "fps", "num_inference_steps", "guidance_scale",
             "guidance_scale_2", "flow_shift", "seed", "priority"]  # fmt: skip
    assert [*(tab() for _ in names), tab()] == [*names, "Make the video"]
    page.keyboard.press("Enter")
    expect(queued).to_contain_text("high noise")
    assert focused(page) == "Make the video"
    assert [tab(), tab()] == ["Use its settings", "Cancel"]
    page.keyboard.press("Enter")
    expect(made).to_contain_text("Cancelled.")
    assert focused(page) == "Queue"
    assert [tab(), tab(), tab()] == ["Show", "Use its settings", "Delete"]
    page.once("dialog", lambda dialog: dialog.accept())
    page.keyboard.press("Enter")
    expect(made).to_have_count(0)
    assert focused(page) == "History"
    assert server.ask("GET", "/v1/videos").document["data"] == []


def focused(page: Page) -> str:
    """Returns the text of the element that has the focus, or the name of a field."""
    return str(page.evaluate("document.activeElement.innerText || document.activeElement.name"))


def test_a_wrong_field_is_named_and_has_the_focus(page: Page) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Size").fill("65x64")
    page.get_by_text("Settings", exact=True).click()
    ask_for(page, "a star")
    alert = page.get_by_role("alert").filter(has_text="size 65x64: width and height must be positive multiples of 16")
    expect(alert).to_be_visible()
    size = page.get_by_label("Size")
    expect(size).to_be_focused()
    expect(size).to_have_attribute("aria-invalid", "true")
    expect(size).to_have_accessible_error_message(alert.inner_text())
    size.fill("64x64")
    page.keyboard.press("Enter")
    expect(rows(page, "History")).to_contain_text("Finished.")
    expect(size).not_to_have_attribute("aria-invalid", "true")


def test_a_second_press_after_a_lost_answer_makes_no_second_video(server: Running, page: Page) -> None:
    expect(page.get_by_text("The server is ready.")).to_be_visible()
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = async (...request) => {
        window.fetch = real;
        await real(...request);
        throw new TypeError("the answer is lost");
      };
    }""")
    ask_for(page, "only once")
    expect(
        page.get_by_role("alert").filter(has_text="The server cannot be reached. Press the button again.")
    ).to_be_visible()
    expect(rows(page, "History")).to_contain_text("Finished.")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#player")).to_be_visible()
    expect(page.locator("#new-state")).to_have_text("")
    assert len(server.ask("GET", "/v1/videos").document["data"]) == 1
    page.get_by_role("button", name="Make the video").click()  # an answer came, so this is another one
    until(lambda: len(server.ask("GET", "/v1/videos").document["data"]) == 2)


def test_an_answer_that_comes_after_the_end_of_its_video_changes_nothing(page: Page) -> None:
    expect(page.get_by_text("The server is ready.")).to_be_visible()
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = async (...request) => {
        window.fetch = real;
        const answer = await real(...request);
        await new Promise(done => { window.release = done; });
        return answer;
      };
    }""")
    ask_for(page, "a fast one")
    expect(rows(page, "History")).to_contain_text("Finished.")
    page.evaluate("window.release()")
    expect(page.locator("#player")).to_be_visible()
    expect(rows(page, "History")).to_contain_text("Finished.")
    expect(rows(page, "Queue")).to_have_count(0)


def test_the_quarters_of_a_video_are_announced(server: Running, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    report = worker._Run.report

    def held(self: worker._Run, stage: str, done: int, total: int) -> None:
        report(self, stage, done, total)
        if done == 2:
            server.maker.holds.set()

    monkeypatch.setattr(worker._Run, "report", held)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Steps").fill("4")
    ask_for(page, "a star")
    expect(page.locator("#news[role=status]")).to_have_text("25 percent of: a star")
    expect(rows(page, "Queue")).to_contain_text("47 %")


def test_a_video_may_have_a_last_image(server: Running, page: Page, tmp_path: Path) -> None:
    """Both images together must not be too large; without a file, the field is not sent."""
    first, last = page.get_by_label("Image that the video starts from"), page.get_by_label("Image that the video ends")
    expect(page.locator("#model")).to_have_text("tiny")
    last.set_input_files(STAR)
    expect(page.get_by_role("img", name="The last image that you chose")).to_be_visible()
    ask_for(page, "between two")
    expect(rows(page, "History")).to_contain_text("Finished.")
    assert server.maker.made[-1]["last_picture"] == STAR.read_bytes()

    for name, bytes_ in (("first", 900_000), ("last", 1_200_000)):
        (tmp_path / name).write_bytes(bytes(bytes_))
    first.set_input_files(tmp_path / "first")
    last.set_input_files(tmp_path / "last")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert").filter(has_text="The images have more than 2 MB")).to_be_visible()
    expect(last).to_be_focused()

    last.set_input_files([])
    ask_for(page, "from one")
    expect(rows(page, "History")).to_have_count(2)
    assert "last_picture" not in server.maker.made[-1]


def test_a_picture_that_is_too_large_is_refused_by_the_page(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(2_000_001))
    page.get_by_label("What happens in the video").fill("a star")
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_label("Image that the video starts from").set_input_files(tmp_path / "large.png")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert").filter(has_text="The image has more than 2 MB")).to_be_visible()


def test_the_queue_is_live_and_settings_are_used_again(server: Running, page: Page) -> None:
    server.maker.holds.set()
    first = server.create(prompt="the first", seed=5, num_inference_steps=2)
    queued = rows(page, "Queue")
    expect(queued).to_contain_text("high noise")
    for prompt, priority in (("later", 0), ("sooner", 5)):
        server.create(prompt=prompt, priority=priority)
    expect(queued.get_by_role("heading")).to_have_text(["the first", "sooner", "later"])
    expect(queued.nth(2)).to_contain_text("Waits. Videos before it: 1.")
    expect(page.get_by_text("Videos that wait on this server: 2.")).to_be_visible()
    queued.nth(0).get_by_role("button", name="Use its settings").click()
    expect(page.get_by_label("What happens in the video")).to_have_value("the first")
    expect(page.get_by_label("Seed")).to_have_value("5")
    expect(page.get_by_label("Steps")).to_have_value("2")
    long = server.create(prompt="a long one", seconds="0.75")
    queued.filter(has_text="a long one").get_by_role("button", name="Use its settings").click()
    expect(page.get_by_label("Seconds")).to_have_value("0.75")
    expect(page.get_by_label("Number of frames")).to_have_value("")
    server.ask("DELETE", f"/v1/videos/{long}")
    server.ask("DELETE", f"/v1/videos/{first}")
    expect(queued.get_by_role("heading")).to_have_text(["sooner", "later"])
    server.maker.holds.clear()
    expect(rows(page, "History").get_by_role("heading")).to_have_text(["sooner", "later"])


def test_older_videos_are_shown_page_by_page(
    server: Running, browser: Browser, clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MOST_VIDEOS", 2)
    for number in range(5):
        server.create(prompt=str(number))
    until(lambda: not any(server.store.counts().values()))
    with page_of(browser, server.url) as page:
        made = rows(page, "History")
        expect(made).to_have_count(2)
        page.get_by_role("button", name="Show older videos").click()
        expect(made.get_by_role("heading")).to_have_text(["4", "3", "2", "1", "0"])
        expect(page.get_by_role("button", name="Show older videos")).to_be_hidden()


def test_a_page_finds_a_server_again(server: Running, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(page.get_by_text("The server is ready.")).to_be_visible()

    def broken(*arguments: object) -> None:
        raise SQLAlchemyError

    with monkeypatch.context() as patched:
        patched.setattr(type(server.store), "overview", broken)
        expect(page.get_by_text("The connection to the server is lost.")).to_be_visible()
        server.create(prompt="meanwhile")
    expect(page.get_by_text("The server is ready.")).to_be_visible()
    expect(rows(page, "History").get_by_role("heading")).to_have_text(["meanwhile"])


@pytest.mark.parametrize(
    ("status", "words"),
    [(503, "the database does not answer"), (429, "too much at once"), (0, "The server cannot be reached.")],
)
def test_a_button_that_fails_says_why_where_everybody_sees_it(
    server: Running, page: Page, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    monkeypatch.setattr(changes, "MOST_VIDEOS", 1)
    for prompt in ("older", "newer"):
        server.ended(server.create(prompt=prompt))
    page.reload()
    document = json.dumps({"error": {"message": words, "param": None}})

    def refuse(route: Route) -> None:
        route.fulfill(status=status, body=document) if status else route.abort()

    page.route(re.compile("/v1/videos/video_|after="), refuse)
    page.on("dialog", lambda dialog: dialog.accept())
    failed = page.get_by_role("alert").filter(has_text=words)
    row = rows(page, "History").first
    row.get_by_role("button", name="Delete").click()
    expect(failed).to_be_in_viewport()
    expect(row).to_contain_text("newer")
    page.unroute(re.compile("/v1/videos/video_|after="))
    page.get_by_role("button", name="Show older videos").click()
    expect(rows(page, "History")).to_have_count(2)
    expect(failed).to_have_count(0)
    page.route(re.compile("/v1/videos/video_"), refuse)
    row.get_by_role("button", name="Show").click()
    expect(page.locator("#viewer-state")).to_contain_text(words)


def test_a_key_that_no_longer_counts_is_asked_for_by_any_button(server: Running, page: Page) -> None:
    server.ended(server.create())
    document = json.dumps({"error": {"message": "the API key is wrong", "param": None}})
    row = rows(page, "History").first
    for button in ("Show", "Delete"):
        page.reload()
        page.on("dialog", lambda dialog: dialog.accept())
        page.route(re.compile("/v1/videos/video_"), lambda route: route.fulfill(status=401, body=document))
        row.get_by_role("button", name=button).click()
        expect(page.get_by_label("API key", exact=True)).to_be_focused()
        page.unroute(re.compile("/v1/videos/video_"))


def test_a_page_that_is_one_too_many_says_so(server: Running, browser: Browser, clean: None) -> None:
    document = json.dumps({"error": {"message": "64 pages are open already", "param": None}})
    with page_of(browser, server.url, "/docs", expects=(REFUSED,)) as page:
        page.route("**/v1/videos/events", lambda route: route.fulfill(status=429, body=document))
        page.goto(server.url)
        expect(page.get_by_text("64 pages are open already. The page tries again.")).to_be_visible()


def test_a_key_is_typed_into_the_page_and_stays_in_its_tab(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(f"{ALICE}\n{BOB}\n")
    with running(folder, keys=Keys.read(folder / "keys")) as server:
        given = {"prompt": "a secret", "input_reference": data_url(STAR.read_bytes())}
        headers = {"Authorization": f"Bearer {BOB}", "Content-Type": "application/json"}
        assert server.ask("POST", "/v1/videos", json.dumps(given).encode(), headers).status == 200
        with page_of(browser, server.url, expects=(REFUSED,)) as page:
            field = page.get_by_label("API key", exact=True)
            expect(field).to_be_focused()
            field.fill(f"{ALICE}x")
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert").filter(has_text="the API key is missing or wrong")).to_be_visible()
            field.fill(ALICE)
            page.keyboard.press("Enter")
            expect(page.get_by_text("The server is ready.")).to_be_visible()
            ask_for(page, "a star")
            expect(rows(page, "History").get_by_role("heading")).to_have_text(["a star"])
            expect(page.locator("#player")).to_be_visible()
            expect(rows(page, "History").get_by_role("img")).to_be_visible()
            stored = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
            assert stored == [[ALICE], [], ""] and ALICE not in page.url
            page.reload()
            expect(rows(page, "History").get_by_role("heading")).to_have_text(["a star"])
            page.get_by_role("button", name="Forget the API key").click()
            expect(field).to_be_focused()
            assert page.evaluate("Object.values(sessionStorage)") == []
            expect(rows(page, "History")).to_have_count(0)


CONTRAST = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return channels(colour)[3] === 0 && element.parentElement ? ground(element.parentElement) : colour;
  };
  const ratio = (text, behind) => {
    const [low, high] = [luminance(text), luminance(behind)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const shown = [...document.body.querySelectorAll("*")].filter(element => element.checkVisibility());
  const texts = shown.filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const grey = shown.filter(element => element.placeholder);
  return [
    ...texts.map(element => [element.outerHTML, ratio(getComputedStyle(element).color, ground(element))]),
    ...grey.map(element => [
      element.outerHTML, ratio(getComputedStyle(element, "::placeholder").color, ground(element))]),
  ];
}"""


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_all_texts_stand_out_and_all_controls_have_names(
    server: Running, browser: Browser, clean: None, path: str
) -> None:
    server.create()
    with page_of(browser, server.url, path) as page:
        if path == "/":
            page.get_by_text("Settings", exact=True).click()
            expect(rows(page, "History").first.get_by_role("button", name="Show")).to_be_visible()
            page.evaluate("document.querySelectorAll('[role=alert]').forEach(alert => alert.append('wrong'))")
        else:
            expect(page.get_by_role("heading", name="POST /v1/videos", exact=True)).to_be_visible()
        page.set_viewport_size({"width": 320, "height": 700})  # as at four times the size of the letters
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        grounds = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            ratios = page.evaluate(CONTRAST)
            least = min(ratios, key=lambda pair: pair[1])
            assert len(ratios) > 20 and least[1] >= 4.5, (scheme, least)
        assert len(grounds) == 2
        lines = page.locator("body").aria_snapshot().splitlines()
        controls = [line.strip() for line in lines if line.strip().startswith(CONTROLS)]
        assert len(controls) > 1 and [line for line in controls if '"' not in line] == []


CONTROLS = (
    "- button",
    "- link",
    "- textbox",
    "- combobox",
    "- spinbutton",
    "- form",
    "- progressbar",
    "- img",
    "- table",
)


def test_the_calls_are_shown_without_another_server(server: Running, browser: Browser) -> None:
    with page_of(browser, server.url) as page:
        page.get_by_role("link", name="The calls of this server").click()
        call = page.locator("section").filter(has=page.get_by_role("heading", name="POST /v1/videos", exact=True))
        body = call.get_by_role("table", name="Body: multipart/form-data")
        row = body.get_by_role("row").filter(has=page.get_by_role("rowheader", name="num_inference_steps"))
        expect(row.get_by_role("cell")).to_have_text(
            ["integer, at least 1, at most 200", "no", "", "Number of denoising steps."]
        )
        described = server.ask("GET", "/openapi.json").document["paths"]
        expect(page.get_by_role("heading", level=2)).to_have_count(sum(map(len, described.values())))


def test_no_script_runs_but_the_server_s_own(server: Running, browser: Browser) -> None:
    with page_of(browser, server.url, expects=("Content Security Policy", "This document requires 'Trusted")) as page:
        tried = page.evaluate("""async () => {
          const script = document.createElement("script");
          const throws = call => { try { call(); return false; } catch { return true; } };
          return [throws(() => { script.text = "1"; }), throws(() => script.setAttribute("onerror", "1")),
                  throws(() => { document.body.innerHTML = "<p>"; }),
                  await fetch("http://127.0.0.1:1").catch(() => null)];
        }""")
        assert tried == [True, True, True, None]
