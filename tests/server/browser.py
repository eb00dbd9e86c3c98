"""Gives tests a real browser without a screen: the machine's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
# It looks for no other machine, which a closed network would refuse many times.
_FLAGS = ["--disable-gpu", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Browser, url: str, path: str = "/", *, expects: tuple[str, ...] = ()) -> Iterator[Page]:
    """Opens a page in a session of its own; at the end, checks that the page had no error but the expected ones."""
    errors: list[str] = []
    own = (url, "blob:")
    with browser.new_context() as context:
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(own) else errors.append(sent.url))
        page.goto(f"{url}{path}")
        yield page
        assert not (left := [error for error in errors if not any(words in error for words in expects)]), left
