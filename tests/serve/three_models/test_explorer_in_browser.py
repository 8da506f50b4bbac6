"""The page of a real server in a real browser; tests/explorer has its other tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from helpers.browser import chromium, watched_page

from ..server import KEY, Server
from .conftest import MODELS

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

browser = pytest.fixture(scope="module")(chromium)


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page and enters the key."""
    with ExitStack() as stack:

        def open_page(path: str = "/") -> Any:
            page, watched = stack.enter_context(watched_page(browser, server.base))
            watched.refused = {401}
            page.goto(server.base + path)
            page.get_by_label("Key", exact=True).fill(KEY)
            page.keyboard.press("Enter")
            expect(page.locator("#health")).to_have_text("3 of 3 ready")
            return page

        yield open_page


def test_three_models_stream_side_by_side(visit: Callable[..., Any]) -> None:
    """With figures of each; the quantized ones against the first, which is not quantized."""
    page = visit()
    page.get_by_label("Max tokens").fill("24")
    page.get_by_role("button", name="What does str.join do?").click()
    page.get_by_role("button", name="Run").click()
    columns = page.locator("article.column")
    expect(page.locator("article.column[data-state=done]")).to_have_count(3)
    assert columns.locator("h3").all_inner_texts() == list(MODELS)
    for column in columns.all():
        assert len(column.locator(".answer").inner_text()) > 3
        assert all(re.search(r"\d", figure) for figure in column.locator(".figures .value").all_inner_texts())
    compared = re.compile(r"Same answer as demo-fp16|Differs from token \d+ on.*%")
    for column in columns.all()[1:]:
        expect(column.locator(".difference")).to_have_text(compared)


def test_models_and_load(visit: Callable[..., Any]) -> None:
    page = visit("/#models")
    page.get_by_role("link", name="org/demo-awq").click()
    details = page.locator("section.details")
    expect(details).to_contain_text("four bits")
    expect(details.get_by_role("row", name="TTFT")).to_contain_text("ms")
    page.get_by_role("link", name="Load").click()
    expect(page.locator(".chart canvas")).to_have_count(6)
    expect(page.get_by_role("region", name="Present values").get_by_role("row")).to_have_count(4)
