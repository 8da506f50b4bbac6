"""The page for everyone: axe-core's rules in both themes, keyboard, phones, first paint."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantserve.config import ExplorerConfig, HttpConfig

from .conftest import NAMES, replicas
from .gateway import Served

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

AXE = Path(__file__).parent / "data" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
FIRST_PAINT_KB = 100
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def site(serve: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    votes = str(tmp_path_factory.mktemp("votes") / "votes.sqlite3")
    models = replicas()
    models[NAMES[2]].die_after = 2
    return serve(models, explorer=ExplorerConfig(votes=True, votes_file=votes, price_per_hour=1.2))


def compared(page: Any) -> None:
    """Two answers, one of them with a difference, and one that failed."""
    page.get_by_label("Prompt", exact=True).fill("What does str.join do?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article[data-state=done]")).to_have_count(2)
    expect(page.locator("article[data-state=failed]")).to_have_count(1)


def voted(page: Any) -> None:
    page.get_by_role("button", name="Tie").click()
    page.get_by_role("link", name="See all votes").click()
    expect(page.locator("table.votes").first).to_be_visible()


def model(page: Any) -> None:
    page.get_by_role("link", name="Models").click()
    page.get_by_role("link", name=NAMES[0]).click()
    expect(page.get_by_role("heading", name=NAMES[0], level=2)).to_be_focused()
    for summary in page.locator("details.card > summary").all():
        summary.click()


def load(page: Any) -> None:
    page.get_by_role("link", name="Load").click()
    expect(page.locator(".chart canvas")).to_have_count(6)


def violations(page: Any) -> list[str]:
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    found = page.evaluate("(tags) => axe.run({runOnly: tags})", RULES)
    return [f"{rule['id']}: {node['html'][:120]} {node['failureSummary']}"
            for rule in found["violations"] for node in rule["nodes"]]  # fmt: skip


@pytest.mark.parametrize(("theme", "options"), [("light", {}), ("dark", PHONE)], ids=["desk-light", "phone-dark"])
def test_axe_finds_nothing(site: Served, visit: Callable[..., Any], theme: str, options: dict[str, Any]) -> None:
    page = visit(site.base, refused={400}, color_scheme=theme, reduced_motion="reduce", **options)
    found = {}
    for view in (compared, voted, model, load):
        view(page)
        found[view.__name__] = violations(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view.__name__
    assert found == {name: [] for name in found}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_the_dialog(
    serve: Callable[..., Served], visit: Callable[..., Any], tmp_path: Path, theme: str
) -> None:
    (tmp_path / "keys").write_text("sesame-0123456789\n")
    http = HttpConfig(access_log="off", api_keys_file=str(tmp_path / "keys"))
    page = visit(serve({NAMES[0]: replicas()[NAMES[0]]}, http=http).base, refused={401}, color_scheme=theme)
    page.get_by_label("Key", exact=True).fill("wrong-0123456789")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    assert violations(page) == []


def test_the_theme_is_the_system_s_until_it_is_switched(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base, color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Use the light theme").click()
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Use the dark theme").click()
    assert page.evaluate(ground) == dark


def test_everything_is_reached_by_keyboard(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base, refused={400})
    compared(page)
    page.locator(".brand").focus()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    controls = page.locator("main :is(button, input, textarea, summary, [tabindex='0']):visible:not(:disabled)").count()
    reached = set()
    for _ in range(controls):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        focused = (
            "[document.activeElement.outerHTML.slice(0, 99), getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert page.evaluate(focused)[1] == "solid", page.evaluate(focused)[0]
    assert len(reached) == controls


def test_streams_do_not_flood_screen_readers(site: Served, visit: Callable[..., Any]) -> None:
    """One live region, which tells what has ended and not the tokens."""
    page = visit(site.base, refused={400})
    expect(page.locator("#health")).to_have_text("3 of 3 ready")  # before, it would tell that models are loading
    page.evaluate(
        """() => {
            window.told = [];
            const live = document.getElementById("live");
            new MutationObserver(() => told.push(live.textContent)).observe(live, {childList: true});
        }"""
    )
    compared(page)
    expect(page.get_by_role("status")).to_contain_text("All answers have ended.")
    told = page.evaluate("told")
    assert 1 <= len(told) <= 4
    assert not any("Concatenate" in text for text in told)
    assert page.locator("[aria-live]").count() == 1


def test_the_first_paint_is_small(site: Served, visit: Callable[..., Any], browser: Any) -> None:
    page = browser.new_page()
    sizes: dict[str, int] = {}
    page.on("response", lambda response: sizes.update({response.url: len(gzip.compress(response.body()))}))
    page.goto(site.base)
    expect(page.locator("#health")).to_have_text("3 of 3 ready")
    page.close()
    assert any(url.endswith("app.js") for url in sizes)
    assert not any("uPlot" in url for url in sizes)
    assert sum(sizes.values()) < FIRST_PAINT_KB * 1024
