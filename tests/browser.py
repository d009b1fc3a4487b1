"""A headless Chromium for the tests of the two pages, driven by Playwright.

Debian and Ubuntu bring the program as ``chromium`` or ``google-chrome``; ``CHROMIUM`` names another. Tests are skipped
where there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_CHROMIUM = "no Chromium here: apt-get install chromium"


def find_chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Pages:
    """Opens pages, each in a context of its own; at the end of ``with`` none had a problem but an expected one.

    Problems are exceptions, errors and warnings on the console, which a blocked load gives too, and requests that leave
    the service's host, or for a file the disk.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.problems: list[str] = []
        self.expected: list[str] = []

    def __call__(self, url: str, expected: str = "", **options: Any) -> Page:
        """The page at ``url``, loaded. A problem with ``expected`` in its text is noted apart."""
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)

        def note(kind: str, text: str) -> None:
            (self.expected if expected and expected in text else self.problems).append(f"{kind}: {text}")

        own = ("file:" if url.startswith("file:") else url, "blob:", "data:")
        page.on("pageerror", lambda error: note("exception", str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and note(message.type, message.text))
        page.on("request", lambda r: r.url.startswith(own) or note("requested", r.url))
        page.goto(url)
        return page

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *error: object) -> None:
        for context in self._contexts:
            context.close()
        assert self.problems == []
