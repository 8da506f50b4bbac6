"""A real browser for tests: Chromium through Playwright, with what a page must never do as failures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

PATIENCE_MS = 60_000
"""After so long what takes a moment on an idle machine is taken for missing."""
BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
"""Tests run as root and in containers; the pages are ours."""


def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where none is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip(f"none of {', '.join(BINARIES)} is installed")
    api.expect.set_options(timeout=PATIENCE_MS)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """What a page did that a user does not see.

    Attributes:
        hosts: of its requests.
        problems: errors of its scripts, and errors and warnings in the console.
        refused: statuses above 399 that the test causes, 0 for lost connections; the console has a line for each.
    """

    hosts: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)

    def report(self, message: Any) -> None:
        lost = re.match(r"Failed to load resource: (?:.* status of (\d+)|net::)", message.text)
        if message.type in ("error", "warning") and not (lost and int(lost[1] or 0) in self.refused):
            self.problems.append(f"{message.type}: {message.text}")


@contextmanager
def watched_page(browser: Any, base: str, **options: Any) -> Iterator[tuple[Any, Watched]]:
    """A new page in a context of its own. Fails for a problem, and for a request to another host than `base`'s.

    Args:
        options: of Playwright's ``new_context``.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    watched = Watched()
    page = context.new_page()
    page.on("console", watched.report)
    page.on("pageerror", lambda error: watched.problems.append(str(error)))
    page.on("request", lambda request: watched.hosts.add(urlsplit(request.url).netloc))
    try:
        yield page, watched
        assert watched.problems == []
        assert watched.hosts - {""} == {urlsplit(base).netloc}  # blob: and data: have no host
    finally:
        context.close()
