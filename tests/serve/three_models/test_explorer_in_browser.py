"""The page of a real server in a real browser; tests/explorer has its other tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from helpers.browser import chromium, watched_page

from ..load import Asked, Clients
from ..server import KEY, START_S, Server, replicas
from .conftest import MODELS, NARROW

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

browser = pytest.fixture(scope="module")(chromium)


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page and enters the key."""
    with ExitStack() as stack:

        def open_page(path: str = "/", refused: frozenset[int] = frozenset()) -> Any:
            page, watched = stack.enter_context(watched_page(browser, server.base))
            watched.refused = {401, *refused}
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


def whole(route: Any) -> None:
    """Let a request's answer have as many tokens as it may have."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def ask(page: Any, *, long: bool = False) -> None:
    """Ask all three models; long answers have 400 tokens, drawn so that they are text."""
    if long:
        page.route("**/v1/chat/completions", whole)
        page.get_by_label("Temperature").fill("2")
    page.get_by_label("Prompt", exact=True).fill("What does str.join do?")
    page.get_by_label("Max tokens").fill("400")
    page.get_by_role("button", name="Run").click()


def column(page: Any, name: str) -> Any:
    return page.locator("article.column", has=page.get_by_role("heading", name=name, exact=True))


def ended(page: Any) -> None:
    expect(page.locator("article:is([data-state=done], [data-state=failed])")).to_have_count(3)


WATCH = """() => {
    window.lengths = {};
    const look = () => {
        for (const column of document.querySelectorAll("article.column")) {
            const name = column.querySelector("h3").textContent;
            (lengths[name] ??= new Set()).add(column.querySelector(".answer").textContent.length);
        }
        requestAnimationFrame(look);
    };
    look();
}"""
"""Notes the lengths that each answer has while it grows."""


@pytest.mark.slow
def test_answers_grow_token_by_token(visit: Callable[..., Any]) -> None:
    page = visit()
    page.evaluate(WATCH)
    ask(page, long=True)
    ended(page)
    seen = page.evaluate("Object.fromEntries(Object.entries(lengths).map(([name, set]) => [name, set.size]))")
    assert set(seen) == set(MODELS)
    assert all(seen[name] > 4 for name in MODELS[:2])  # the third has a stopping sequence


@pytest.mark.slow
def test_a_model_under_load_refuses_and_the_others_answer(server: Server, visit: Callable[..., Any]) -> None:
    """More clients than the model runs and queues: the page says that it is busy, and Load counts the refusals."""
    page = visit(refused=frozenset({429}))
    busy = column(page, NARROW)
    with Clients(server, [Asked(NARROW, True, {"max_tokens": 300})] * 40) as crowd:
        crowd.wait(lambda: any(outcome.status == 429 for outcome in crowd.of(NARROW)))
        ask(page)
        ended(page)
        while busy.get_attribute("data-state") == "done":  # it came when a place was free
            page.get_by_role("button", name=f"Retry: {NARROW}").click()
            ended(page)
        expect(busy.locator(".notice")).to_contain_text("The model is busy")
        expect(busy.locator(".notice")).to_contain_text(re.compile(r"Retry in \d+ s"))
        expect(page.locator("article[data-state=done]")).to_have_count(2)
        page.get_by_role("link", name="Load").click()
        refused = page.get_by_role("region", name="Present values").get_by_role("row", name=NARROW).get_by_role("cell")
        expect(refused.nth(3)).to_have_text(re.compile("[1-9]"))
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("button", name=f"Retry: {NARROW}").click()
    expect(page.locator("article[data-state=done]")).to_have_count(3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica_is_told_and_comes_back(server: Server, visit: Callable[..., Any]) -> None:
    name = MODELS[0]
    page = visit(refused=frozenset({503}))
    broken = column(page, name)
    (replica,) = replicas(server, name)
    ask(page, long=True)
    expect(broken).to_have_attribute("data-state", "streaming")
    replica.kill()
    expect(broken.locator(".notice")).to_contain_text("A lost replica is started again by itself")
    assert broken.locator(".answer").inner_text().strip()  # the part that came stays
    ended(page)
    expect(page.locator("article[data-state=done]")).to_have_count(2)
    page.get_by_role("button", name=f"Retry: {name}").click()
    expect(broken.locator(".notice")).to_contain_text("The model has no replica that answers")
    expect(page.locator("#health")).to_have_text("2 of 3 ready")
    expect(page.locator("#health")).to_have_text("3 of 3 ready", timeout=START_S * 1000)
    page.get_by_role("button", name=f"Retry: {name}").click()
    expect(page.locator("article[data-state=done]")).to_have_count(3)


def test_models_and_load(visit: Callable[..., Any]) -> None:
    page = visit("/#models")
    page.get_by_role("link", name="org/demo-awq").click()
    details = page.locator("section.details")
    expect(details).to_contain_text("four bits")
    expect(details.get_by_role("row", name="TTFT")).to_contain_text("ms")
    page.get_by_role("link", name="Load").click()
    expect(page.locator(".chart canvas")).to_have_count(6)
    expect(page.get_by_role("region", name="Present values").get_by_role("row")).to_have_count(4)
