"""The Compare view in a browser, against the gateway with prepared replicas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import until
from quantserve.config import ExplorerConfig

from .conftest import NAMES, PARTING, replicas
from .gateway import Served
from .models import ANSWER, FakeModel

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import expect

PROMPT = "What does str.join do?"
DONE = "[data-state=done]"


@pytest.fixture(scope="module")
def site(serve: Callable[..., Served]) -> Served:
    return serve()


def ask(page: Any, prompt: str = PROMPT) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def column(page: Any, name: str) -> Any:
    return page.locator("article.column", has=page.get_by_role("heading", name=name))


def shown(page: Any, text: str) -> Any:
    """A text of the view; the live region repeats it a moment later."""
    return page.locator("main").get_by_text(text)


def settled(page: Any, count: int) -> None:
    """So many answers have ended. The page draws all columns in one step: texts and figures are their last ones."""
    expect(page.locator(f"article.column{DONE}")).to_have_count(count)


def test_three_models_side_by_side(site: Served, visit: Callable[..., Any]) -> None:
    """Every answer has its figures, and the first token that differs is marked with both distributions."""
    page = visit(site.base, refused={400})  # the model without a chat template refuses the first request
    expect(page.get_by_role("status")).to_have_count(1)
    ask(page)
    settled(page, 3)
    for name in NAMES:
        figures = column(page, name).locator(".figures .value")
        assert all(any(c.isdigit() for c in text) for text in figures.all_inner_texts()), name
    reference, other, plain = (column(page, name) for name in NAMES)
    assert reference.locator(".answer").inner_text().strip() == ANSWER
    assert reference.locator(".figures .value").last.inner_text() == "29"
    assert other.locator("mark").inner_text() == " the"
    expect(other.locator(".difference")).to_contain_text(f"Differs from token {PARTING + 1} on")
    rows = other.locator(".difference tbody tr")
    assert rows.first.inner_text().split() == ["␣the", "55.0", "%", "41.0", "%"]
    assert rows.nth(1).inner_text().split() == ["␣each", "39.0", "%", "52.0", "%"]
    expect(other.locator(".difference")).to_contain_text("moved by 0.118 on average")  # ln(0.9 / 0.8)
    assert plain.locator(".answer").inner_text().strip() == "Joins them."
    expect(plain.locator(".state")).to_contain_text("no chat template")
    bodies = [model.bodies[-1] for model in site.models.values()]
    assert [body["temperature"] for body in bodies] == [0, 0, 0]
    assert bodies[0]["messages"] == [{"role": "user", "content": PROMPT}]
    assert bodies[2]["prompt"] == PROMPT


def test_parameters_reach_the_models(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base)
    page.get_by_role("button", name="demo-plain", exact=True).click()
    page.get_by_role("button", name="org/demo-int4", exact=True).click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Seed").fill("11")
    page.get_by_text("System prompt").first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Prime numbers").click()
    page.get_by_role("button", name="Run").click()
    settled(page, 1)
    body = site.models["demo-fp16"].bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "prime numbers" in body["messages"][1]["content"]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.7, 5, 11)
    expect(column(page, "demo-fp16").locator(".state")).to_contain_text("cut at max tokens")


def test_stop_and_retry(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    slow = FakeModel(interval_s=0.3)
    site = serve({"demo-fp16": slow})
    page = visit(site.base)
    ask(page)
    only = column(page, "demo-fp16")
    expect(only.locator(".answer")).to_contain_text("Concatenate")
    expect(page.get_by_role("button", name="Run")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(only.locator(".state")).to_have_text("stopped")
    slow.interval_s = 0.001
    page.get_by_role("button", name="Retry: demo-fp16").click()
    settled(page, 1)
    assert only.locator(".answer").inner_text().strip() == ANSWER
    until(lambda: slow.cancelled == 1)


def test_models_are_chosen_removed_and_made_the_reference(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base, refused={400})
    ask(page)
    settled(page, 3)
    page.get_by_role("button", name="Make reference: org/demo-int4").click()
    expect(page.locator("article h3")).to_have_text(["org/demo-int4", "demo-fp16", "demo-plain"])
    expect(column(page, "demo-fp16").locator("mark")).to_have_text("each")
    expect(column(page, "org/demo-int4").locator(".difference")).to_be_hidden()
    page.get_by_role("button", name="Remove: demo-plain").click()
    expect(page.locator("article")).to_have_count(2)
    expect(page.get_by_role("button", name="demo-plain", exact=True)).to_have_attribute("aria-pressed", "false")


def test_a_model_s_text_is_never_html(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    text = "<img src=x onerror=alert(1)><b>bold</b> &amp; <script>document.title='x'</script>"
    site = serve({"demo-fp16": FakeModel(text)})
    page = visit(site.base)
    ask(page)
    settled(page, 1)
    answer = column(page, "demo-fp16").locator(".answer")
    assert answer.inner_text().strip() == "".join(site.models["demo-fp16"].tokens)
    assert "<script>" in answer.inner_text()
    assert answer.locator("img, b, script").count() == 0


def test_a_replica_that_is_killed(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    """During an answer, then before one; the other model is not affected."""
    models = {name: replicas()[name] for name in NAMES[:2]}
    models["demo-fp16"].die_after = 6
    site = serve(models)
    page = visit(site.base, refused={503})
    ask(page)
    broken = column(page, "demo-fp16")
    expect(broken.locator(".notice")).to_contain_text("A lost replica is started again by itself")
    expect(broken.locator(".answer")).to_contain_text("Concatenate any")
    settled(page, 1)
    site.kill("demo-fp16")
    page.get_by_role("button", name="Retry: demo-fp16").click()
    expect(broken.locator(".notice")).to_contain_text("The model has no replica that answers")
    expect(broken.locator(".notice")).to_contain_text("Retry in 5 s")
    models["demo-fp16"].die_after = None
    site.revive("demo-fp16")
    page.get_by_role("button", name="Retry: demo-fp16").click()
    settled(page, 2)
    expect(broken.locator(".notice")).to_be_hidden()


def test_a_full_queue(serve: Callable[..., Served], visit: Callable[..., Any]) -> None:
    """Two pages ask a model that runs one request and queues none."""
    slow = FakeModel(interval_s=0.3)
    site = serve({"demo-fp16": slow}, limits={"ongoing": 1, "queued": 0})
    first, second = visit(site.base), visit(site.base, refused={429})
    ask(first)
    expect(column(first, "demo-fp16").locator(".answer")).to_contain_text("Concatenate")
    ask(second)
    notice = column(second, "demo-fp16").locator(".notice")
    expect(notice).to_contain_text("The model is busy")
    expect(notice).to_contain_text("Retry in ")
    expect(column(first, "demo-fp16")).not_to_have_attribute("data-state", "failed")


def test_an_empty_prompt_asks_nobody(site: Served, visit: Callable[..., Any]) -> None:
    page = visit(site.base)
    before = len(site.models["demo-fp16"].bodies)
    ask(page, "  ")
    expect(shown(page, "The prompt is empty")).to_be_visible()
    assert len(site.models["demo-fp16"].bodies) == before


def test_a_comparison_is_shared(site: Served, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(site.base, refused={400}, permissions=["clipboard-read", "clipboard-write"])
    ask(page)
    settled(page, 3)
    page.get_by_role("button", name="Copy Markdown").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    markdown = page.evaluate("navigator.clipboard.readText()")
    assert f"```text\n{ANSWER}\n```" in markdown
    assert f"First difference from demo-fp16 at token {PARTING + 1}: `␣the` here, `␣each` there." in markdown
    with page.expect_download() as download:
        page.get_by_role("button", name="Save JSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["prompt"] == PROMPT
    assert [answer["model"] for answer in saved["answers"]] == list(NAMES)
    difference = saved["answers"][1]["first_difference"]
    assert (difference["token"], difference["here"], difference["there"]) == (PARTING, " the", " each")
    assert saved["answers"][0]["ttft_ms"] > 0
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("button.done", has_text="Copy link")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{site.base}/#compare?")
    again = visit(link)
    expect(again.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(again.locator("article h3")).to_have_text(list(NAMES))


def test_blind_votes(serve: Callable[..., Served], visit: Callable[..., Any], tmp_path: Path) -> None:
    """Names, figures, differences and errors' details are hidden until the vote, which the summary then has."""
    votes = ExplorerConfig(votes=True, blind=True, votes_file=str(tmp_path / "votes.sqlite3"))
    site = serve(explorer=votes)
    site.kill(NAMES[2])
    page = visit(site.base, refused={503})
    expect(page.get_by_label("Blind")).to_be_checked()
    ask(page)
    settled(page, 2)
    expect(shown(page, "The model has no replica that answers")).to_be_visible()
    expect(page.locator("article h3")).to_have_text(["Answer A", "Answer B", "Answer C"])
    answers = page.locator("section[aria-labelledby=answers]").inner_text()
    assert not any(name in answers for name in NAMES)
    assert set(page.locator(".figures .value").all_inner_texts()) == {"\u2013"}
    expect(page.get_by_role("button", name="Copy Markdown")).to_be_hidden()
    choices = page.get_by_role("group", name="Which answer is better?").get_by_role("button")
    position = "ABC".index(choices.first.inner_text()[-1])
    choices.first.click()
    expect(shown(page, "1 vote so far")).to_be_visible()
    assert set(page.locator("article h3").all_inner_texts()) == set(NAMES)
    winner = page.locator("article h3").nth(position).inner_text()
    assert winner in NAMES[:2]
    page.get_by_role("link", name="Votes", exact=True).click()
    row = page.get_by_role("row", name=winner)
    expect(row).to_contain_text("100 %")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save CSV").click()
    assert winner in Path(download.value.path()).read_text()
