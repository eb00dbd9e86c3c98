"""Opens the page of a report in a real browser without a screen, if Chromium is installed: its videos play in step."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wanfast.bench.frames import write_frames
from wanfast.bench.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FPS, FRAMES = 16, 160  # ten seconds, so that the page's videos do not begin again while a script looks at them
# The page plays, its second video is put back, it is paused after a second, and is moved to an eighth of its time; this
# test gets what it showed.
PROBE = """
<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
const all = [...document.querySelectorAll("video")], times = () => all.map(video => video.currentTime);
window.addEventListener("load", async () => {
  document.getElementById("play").click();
  await wait(1000);
  const playing = times(), running = all.map(video => !video.paused);
  all[1].currentTime = 0;
  const apart = () => Math.max(...times()) - Math.min(...times());
  for (let left = 60; left > 0 && apart() > 3 / fps; left--) await wait(100);
  const inStep = times();
  document.getElementById("play").click();
  await wait(200);
  const paused = times();
  await wait(200);
  const later = times(), scrub = document.getElementById("scrub");
  scrub.value = 0.125;
  scrub.dispatchEvent(new Event("input"));
  await wait(500);
  const errors = all.map(video => video.error && video.error.message);
  fetch("/", {method: "POST", body: JSON.stringify({playing, running, inStep, paused, later, moved: times(), errors})});
});
</script>
"""


def test_a_page_is_one_file_of_its_own(tmp_path: Path) -> None:
    text = written(tmp_path).read_text()
    assert text.count('src="data:video/mp4;base64,') == 3 and text.count('src="data:image/png;base64,') == 1
    assert "&lt;b&gt;" in text and "<b>bold" not in text  # a prompt is text, and no markup
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frames.mp4", "picture.png", "report.html"]


class _Columns(HTMLParser):
    """Counts the columns of each row of a page's table."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.counts.append(0)
        elif tag in ("th", "td"):
            self.counts[-1] += int(dict(attrs).get("colspan") or 1)


def test_a_page_names_the_sizes_of_its_videos(tmp_path: Path) -> None:
    clips = [{"prompt": "a", "video_size": size} for size in ("1168x768", "960x960", "1168x768")]
    assert "1168x768 and 960x960, 160 frames" in written(tmp_path, size="1280x720", clips=clips).read_text()


@pytest.mark.parametrize("left_out", [None, "the weights are random"])
def test_every_row_has_all_columns(tmp_path: Path, left_out: str | None) -> None:
    """A measured row, a row that could not be measured, and the row of the noise floor."""
    quality = {"identical": False, "psnr": 30.0, "ssim": 0.9, "ms_ssim": 0.9, "flicker": 1.0, "motion": 1.0}
    quality["prompt_following"] = {"right": 1, "of": 2}
    known = {"overridden": [], "attention": None, "estimated": None, "ratio_unclear": not left_out}
    seconds = {"median": 1.0, "spread": 0.1, "of": 2}
    measured = {
        "recipe": "a", "status": "measured", "video_s": seconds, "ratio": 1.0,
        "forwards": {"computed": 2, "of": 2},
        "seconds": dict.fromkeys(("encode", "denoise", "decode"), seconds), "peak_memory_bytes": 1, "tflops": 1.0,
        "peak_share": None, "start": {"seconds": seconds}, "quality": None if left_out else quality,
    }  # fmt: skip
    rows = [known | measured, known | {"recipe": "b", "status": "failed", "reason": "no GPU"}]
    page = written(tmp_path, rows=rows, quality_left_out=left_out, noise_floor={} if left_out else {"again": quality})
    found = _Columns()
    found.feed(page.read_text())
    assert len(found.counts) == (3 if left_out else 4) and len(set(found.counts)) == 1, found.counts
    assert (
        ("<small>unclear</small>" in page.read_text()) == ("Unclear: the seconds" in page.read_text()) == (not left_out)
    )


@pytest.mark.parametrize(("repeats", "shown"), [(1, "<td>1.00</td>"), (2, "<td>1.00 &plusmn; 0.00</td>")])
def test_only_several_repeats_have_a_spread(tmp_path: Path, repeats: int, shown: str) -> None:
    seconds = {"median": 1.0, "spread": 0.0, "of": repeats}
    of_stage = seconds | {"median": 0.3}
    row = {
        "recipe": "a", "status": "measured", "video_s": seconds, "ratio": 1.0, "ratio_unclear": False,
        "forwards": {"computed": 2, "of": 2}, "overridden": [], "attention": None, "estimated": None,
        "seconds": dict.fromkeys(("encode", "denoise", "decode"), of_stage), "peak_memory_bytes": 1, "tflops": 1.0,
        "peak_share": None, "start": {"seconds": of_stage}, "quality": None,
    }  # fmt: skip
    assert shown in written(tmp_path, rows=[row], quality_left_out="random", noise_floor={}).read_text()


class _Server(ThreadingHTTPServer):
    """Serves a page to a browser on this machine, and receives what the page's script found."""

    page: bytes
    found: bytes | None = None
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        self.server.found = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_videos_of_a_page_play_in_step(tmp_path: Path) -> None:
    shown = probed(written(tmp_path), tmp_path)
    assert shown["errors"] == [None] * 3
    assert shown["running"] == [True] * 3
    assert all(0.2 < at < 4 for at in shown["playing"])
    for times in (shown["playing"], shown["inStep"]):
        assert max(times) - min(times) < 3 / FPS
    assert shown["paused"] == shown["later"]
    assert shown["moved"] == pytest.approx([FRAMES / FPS / 8] * 3, abs=1 / FPS)


def probed(page: Path, folder: Path) -> dict[str, Any]:
    """Returns what a browser that can reach no other machine found in a page."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    policy = ["--autoplay-policy=no-user-gesture-required", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.page = page.read_bytes() + PROBE.replace("fps", str(FPS)).encode()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        command = [str(CHROMIUM), *flags, *policy, "--remote-debugging-port=0", address]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            ends = time.monotonic() + 60
            while server.found is None and time.monotonic() < ends:
                time.sleep(0.1)
            browser.terminate()
        server.shutdown()
    assert server.found is not None, "the page's script found nothing"
    found: dict[str, Any] = json.loads(server.found)
    return found


def written(folder: Path, **changes: Any) -> Path:
    """Writes a page with three videos of noise that moves, and returns its path; `changes` are of its report."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    write_frames(np.stack([np.roll(noise, step, axis=1) for step in range(FRAMES)]), folder / "frames.mp4", FPS)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    frames = folder / "frames.mp4"
    report = {
        "model": "tiny", "size": "96x64", "frames": FRAMES, "steps": 2, "fps": FPS, "repeats": 1, "rows": [],
        "clips": [{"image": "a.png", "prompt": "<b>bold", "seed": 0, "video_size": "96x64"}],
        "machine": "2 CPU cores", "commit": None,
        "versions": {"torch": "2"}, "quality_left_out": None, "noise_floor": {}, "noise_floor_note": None, "base": "a",
        **changes,
    }  # fmt: skip
    write_page(
        report, {"Seconds": folder / "picture.png"}, {"a": frames, "b": frames, "c": frames}, folder / "report.html"
    )
    return folder / "report.html"
