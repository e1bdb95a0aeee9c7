"""Opens a page in the system's Chromium, driven by Playwright, and records its errors and requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


class OpenedPage(NamedTuple):
    """A rendered page; both lists keep growing while it is open."""

    page: Page
    errors: list[str]
    """Uncaught exceptions, and every message on the console."""
    requests: list[str]
    """The URL of each request."""


def executable() -> str:
    """The browser's path; without one the test is skipped, and fails in CI."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing = "Chromium is not installed (apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return path


@contextmanager
def open_page(file: Path, *, width: int, dark: bool) -> Iterator[OpenedPage]:
    """Render a file in a viewport of this width, with the light or the dark color scheme."""
    path = executable()
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        page = browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            is_mobile=width < 600,
        )
        opened = OpenedPage(page, [], [])
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("console", lambda message: opened.errors.append(message.text))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(file.resolve().as_uri())
        yield opened
        browser.close()
