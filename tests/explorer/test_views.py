"""Models, Load and the key in a browser, against the gateway with prepared replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantserve.config import ExplorerConfig, HttpConfig
from quantserve.planning.plan import Plan

from .conftest import NAMES, replicas
from .gateway import Served

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

KEY = "sesame-0123456789"


@pytest.fixture(scope="module")
def site(serve: Callable[..., Served]) -> Served:
    return serve(explorer=ExplorerConfig(price_per_hour=1.2, grafana_url="https://grafana.example.org/d/q"))


@pytest.fixture(scope="module")
def locked(serve: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server with a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    return serve(http=HttpConfig(access_log="off", api_keys_file=str(keys)))


def test_the_table_of_models_and_one_of_them(
    site: Served, visit: Callable[..., Any], plans: dict[str, Plan], serve: Callable[..., Served]
) -> None:
    page = visit(site.base, "/#models")
    rows = page.locator("table.models tbody tr")
    expect(rows).to_have_count(3)
    assert rows.locator("th a").all_inner_texts() == list(NAMES)
    expect(rows.first).to_contain_text("ready")
    page.get_by_role("link", name="org/demo-int4").click()
    heading = page.get_by_role("heading", name="org/demo-int4", level=2)
    expect(heading).to_be_focused()
    details = page.locator("section.details")
    expect(details).to_contain_text("the demo model as org/demo-int4")
    plan = plans["org/demo-int4"]
    page.get_by_text("Engine arguments").click()
    arguments = page.get_by_role("region", name="Engine arguments").locator("tbody tr")
    assert arguments.count() == len(plan.engine_args)
    length = arguments.filter(has_text="max_model_len")
    assert length.inner_text().split() == ["max_model_len", "512", plan.provenance["max_model_len"]]
    for finding in plan.findings:
        expect(details.locator(".findings")).to_contain_text(finding["code"])
        expect(details.locator(".findings")).to_contain_text(finding["message"])
    expect(details.get_by_role("row", name="Cost per million tokens")).to_contain_text("$")


def test_a_lost_replica_shows_without_a_reload(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    site = serve({name: replicas()[name] for name in NAMES[:2]})
    page = visit(site.base, "/#models")
    expect(page.locator("#health")).to_have_text("2 of 2 ready")
    site.kill(NAMES[0])
    expect(page.locator("#health")).to_have_text("1 of 2 ready")
    expect(page.locator("table.models tbody tr").first).to_contain_text("unhealthy")


def test_load_is_drawn_from_metrics(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base, "/#load")
    expect(page.locator(".chart canvas")).to_have_count(6)
    row = page.get_by_role("region", name="Present values").get_by_role("row", name=NAMES[0])
    expect(row.get_by_role("cell").first).to_have_text("0")
    page.evaluate(
        """async (model) => {
            const body = JSON.stringify({model, prompt: "x", max_tokens: 20});
            const headers = {"content-type": "application/json"};
            const ask = () => fetch("v1/completions", {method: "POST", headers, body}).then((r) => r.text());
            await Promise.all([1, 2, 3].map(ask));
        }""",
        NAMES[0],
    )
    expect(row.get_by_role("cell").nth(4)).not_to_have_text("\u2013")
    expect(row.get_by_role("cell").nth(5)).to_contain_text("ms")
    expect(page.get_by_role("link", name="Grafana")).to_have_attribute("href", "https://grafana.example.org/d/q")
    expect(page.get_by_text("What 429 means")).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Pause")).to_have_attribute("aria-pressed", "true")


def test_a_key_is_asked_for_once(locked: Served, visit: Callable[..., Any]) -> None:
    """A wrong key is refused in words; the right one is kept for the tab, in no address, until it is forgotten."""
    page = visit(locked.base, refused={401, 400})
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    field.fill("wrong-0123456789")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("This key is wrong")
    expect(field).to_have_attribute("aria-invalid", "true")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#health")).to_have_text("3 of 3 ready")
    page.get_by_label("Prompt", exact=True).fill("x")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article[data-state=done]")).to_have_count(3)
    page.reload()
    expect(page.locator("#health")).to_have_text("3 of 3 ready")
    assert KEY not in page.url
    assert page.evaluate("sessionStorage.length") == 1
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.get_by_role("button", name="Forget key").click()
    expect(page.locator("#health")).to_have_text("API key needed")
    assert page.evaluate("sessionStorage.length") == 0


def test_without_a_key_the_page_says_so_and_asks_again(locked: Served, visit: Callable[..., Any]) -> None:
    page = visit(locked.base, refused={401})
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Retry and enter a key").first).to_be_visible()
    expect(page.locator("#health")).to_have_text("API key needed")
    page.get_by_role("button", name="Enter key").click()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()


def test_below_a_path_of_a_proxy(site: Served, visit: Callable[..., Any], browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route(f"{site.base}/llm/**", lambda route: route.continue_(url=route.request.url.replace("/llm/", "/", 1)))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{site.base}/llm/#models")
    expect(page.locator("table.models tbody tr")).to_have_count(3)
    page.get_by_role("link", name="Load").click()
    expect(page.locator(".chart canvas")).to_have_count(6)
    context.close()
    assert all(url.startswith(f"{site.base}/llm/") for url in requested)


def test_a_server_that_is_gone(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    page = visit(serve({NAMES[0]: replicas()[NAMES[0]]}).base, refused={0})
    expect(page.locator("#health")).to_have_text("1 of 1 ready")
    page.context.set_offline(True)
    page.get_by_label("Prompt", exact=True).fill("x")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article .notice")).to_contain_text("No connection")
    page.context.set_offline(False)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("article[data-state=done]")).to_have_count(1)


def test_links_of_a_config_are_web_addresses(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    """A URL of another kind, from the config of a model, is not made a link."""
    page = visit(serve({NAMES[0]: replicas()[NAMES[0]]}).base)
    found = page.evaluate(
        """async () => {
            const { modelsView } = await import("./explorer/views/models.js");
            const status = await (await fetch("status")).json();
            status.models[0].url = "javascript:alert(1)";
            const view = modelsView({ status, settings: null });
            view.show(encodeURIComponent(status.models[0].id));
            view.update();
            return [...view.element.querySelectorAll("a")].map((a) => a.getAttribute("href"));
        }"""
    )
    assert found
    assert all(address.startswith("#") for address in found)


def test_votes_are_not_offered_when_they_are_off(site: Served, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(site.base)
    expect(page.locator("#health")).to_have_text("3 of 3 ready")
    expect(page.get_by_role("link", name="Votes")).to_be_hidden()
    expect(page.get_by_label("Blind")).to_be_hidden()
