"""Take the pictures of docs/images/explorer from a running server: every view, light and dark, on a desk and a phone.

    quantserve serve app.yaml                       # with votes on and a price, for all there is to see
    .venv/bin/python scripts/explorer_pictures.py http://127.0.0.1:8000

Needs the development tools and Chromium. The pictures have the figures of that server.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "explorer"
MOST_BYTES = 120_000
DESK = {"width": 1240, "height": 800}
PHONE = {"width": 360, "height": 740}
PROMPT = "What does itertools.groupby do?"
LOAD_S = 60
PATIENCE_MS = 120_000


def compare(page: Page) -> None:
    """One prompt, all chosen models."""
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Run").click()
    columns = page.locator("article.column").count()
    expect(page.locator("article.column[data-state=done]")).to_have_count(columns)
    page.locator("h3").first.click()


def models(page: Page) -> None:
    """The table, and a quantized model."""
    page.get_by_role("link", name="Models").click()
    page.locator("table.models a").nth(1).click()
    page.get_by_text("Engine arguments").click()
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")


def load(page: Page) -> None:
    """Charts of a minute."""
    page.get_by_role("link", name="Load").click()
    page.wait_for_timeout(LOAD_S * 1000)


def votes(page: Page) -> None:
    """The win rates."""
    page.get_by_role("link", name="Votes").click()
    expect(page.locator("table.votes").first).to_be_visible()


def ask_all_the_time(base: str, stop: threading.Event) -> None:
    """Load for the charts: a few users per model."""
    listed = json.loads(urllib.request.urlopen(f"{base}/v1/models").read())["data"]

    def user(model: str, number: int) -> None:
        while not stop.is_set():
            body = {"model": model, "prompt": f"{PROMPT} {number}", "max_tokens": 48, "ignore_eos": True}
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
            urllib.request.urlopen(request).read()
            stop.wait(0.3 * number)

    for position, card in enumerate(listed):
        for number in range(1 + position):
            threading.Thread(target=user, args=(card["id"], number + 1), daemon=True).start()


def save(page: Page, name: str) -> None:
    """Write a picture of the whole page, at most `MOST_BYTES` long if the quality allows."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    for quality in (90, 80, 70, 60):
        picture.save(FOLDER / f"{name}.webp", quality=quality, method=6)
        if (size := (FOLDER / f"{name}.webp").stat().st_size) <= MOST_BYTES:
            break
    print(f"{name}: {picture.width} x {picture.height}, {size / 1000:.0f} kB")


def main(base: str) -> None:
    """Take all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def opened(theme: Any, viewport: Any) -> Page:
            page = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce").new_page()
            page.goto(base)
            expect(page.locator("article.column").first).to_be_visible()
            return page

        compare(opened("light", DESK))  # a first request with log-probabilities compiles
        pages = {theme: opened(theme, DESK) for theme in ("light", "dark")}
        for theme, page in pages.items():
            for view in (compare, models, votes):
                if view is votes and page.get_by_role("link", name="Votes").is_hidden():
                    continue
                page.goto(f"{base}/#compare")
                view(page)
                save(page, f"{view.__name__}-{theme}")
        phone = opened("light", PHONE)
        compare(phone)
        save(phone, "phone")
        stop = threading.Event()
        ask_all_the_time(base, stop)
        for page in pages.values():
            page.get_by_role("link", name="Load").click()
        load(pages["light"])
        for theme, page in pages.items():
            save(page, f"load-{theme}")
        stop.set()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
