"""The page with what is rare: long names, adapters, answers of white space, addresses that name nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantserve.config import ExplorerConfig
from quantserve.planning.plan import Plan

from .conftest import NAMES
from .gateway import Served
from .models import FakeModel

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
LONG = ("an-organisation/A-Model-of-Some-Family-v1.5-49B-Instruct-AWQ-g128-sym", "模型/日本語-デモ-ünïcödé", "m" * 120)


def ask(page: Any, answers: int) -> None:
    page.get_by_label("Prompt", exact=True).fill("What does str.join do?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article[data-state=done]")).to_have_count(answers)


def test_long_names_fit_on_a_phone(
    plans: dict[str, Plan], serve: Callable[..., Served], visit: Callable[..., Any], tmp_path: Path
) -> None:
    some = plans[NAMES[0]]
    made = {name: some.model_copy(update={"model_id": name, "route_prefix": f"/{name}"}) for name in LONG}
    voting = ExplorerConfig(votes=True, votes_file=str(tmp_path / "votes.sqlite3"), price_per_hour=1.2)
    page = visit(serve({name: FakeModel() for name in LONG}, plans=made, explorer=voting).base, **PHONE)
    ask(page, 3)
    expect(page.get_by_role("button", name="Tie")).to_be_visible()
    for view in ("Compare", "Models", "Load", "Votes"):
        link = page.get_by_role("link", name=view, exact=True)
        link.click()
        expect(link).to_have_attribute("aria-current", "page")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


def test_an_adapter_is_compared_with_its_model(
    plans: dict[str, Plan], serve: Callable[..., Served], visit: Callable[..., Any]
) -> None:
    name = NAMES[0]
    adapters = {"frontend_args": {"lora_modules": [{"name": "org/lora", "path": "/lora"}]}}
    site = serve({name: FakeModel()}, plans={name: plans[name].model_copy(update=adapters)})
    page = visit(site.base)
    page.get_by_role("button", name="org/lora", exact=True).click()
    ask(page, 2)
    assert {body["model"] for body in site.models[name].bodies} == {name, "org/lora"}
    column = page.locator("article", has=page.get_by_role("heading", name="org/lora"))
    expect(column.locator(".badge")).to_have_text(f"adapter of {name} · fp16 · 16 bit")
    expect(column.locator(".difference")).to_contain_text("Same answer")


def test_an_answer_of_white_space_is_called_so(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    page = visit(serve({NAMES[0]: FakeModel("\n \n")}).base)
    ask(page, 1)
    expect(page.locator(".answer .empty")).to_have_text("Only white space.")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("/#models/%E0%A4%A", "This model is not served here"),
        ("/#models/nobody", "This model is not served here"),
        ("/#compare?model=nobody", "Not served here: nobody"),
        ("/#elsewhere", "The answer appears here"),
    ],
)
def test_an_address_that_names_nothing(
    serve: Callable[..., Served], visit: Callable[..., Any], address: str, told: str
) -> None:
    page = visit(serve({NAMES[0]: FakeModel()}).base, address)
    expect(page.locator("main").get_by_text(told).first).to_be_visible()


def test_a_model_is_left_out_of_the_charts(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    page = visit(serve({name: FakeModel() for name in NAMES}).base, "/#load")
    expect(page.locator(".chart canvas")).to_have_count(6)
    entry = page.get_by_role("list", name="Models").get_by_role("button", name=NAMES[1])
    for pressed in ("false", "true"):
        entry.click()
        expect(entry).to_have_attribute("aria-pressed", pressed)
        expect(page.locator(".chart canvas")).to_have_count(6)
    expect(page.get_by_role("region", name="Present values").get_by_role("row", name=NAMES[1])).to_be_visible()
