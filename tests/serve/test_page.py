"""The page at `/`: mounted, without keys where it may be, and never in the way of the API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from helpers.dists import Site
from quantserve.cli.main import run
from quantserve.config import ExplorerConfig
from quantserve.plugins import pages
from quantserve.serve.gateway.app import public_app
from quantserve.serve.gateway.middleware.api_keys import KeySet
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.page import Page, make_page, page_settings
from quantserve.serve.gateway.upstreams.directory import Directory

from .asgi_client import Answer, request

KEY = "sesame-0123456789"
KEYS = KeySet(fixed=(sha256(KEY.encode()).hexdigest(),))
PAGE = """
    import json

    class App:
        def __init__(self, settings):
            self.settings = settings

        def public(self, path):
            return path in ("/", "/explorer/app.js")

        async def __call__(self, scope, receive, send):
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            shown = {"path": scope["path"], "method": scope["method"], "body": len(body), **self.settings}
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(shown).encode()})

    page = App
"""
MODELS = [
    {"card": {"id": "org/m", "metadata": {"method": "awq"}}, "route": "/org--m", "aliases": ["tuned"], "limits": {}},
    {"card": {"id": "n", "metadata": {"method": "fp16"}}, "route": "/n", "aliases": [], "limits": {}},
]
SETTINGS = {"votes": False, "votes_file": "v"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Site(tmp_path)
    yield made
    made.forget()


def made(site: Site) -> Page | None:
    return make_page(page_settings(SETTINGS, Policy(), MODELS), pages.find({}, site.entry_points()))


def ask(page: Page | None, method: str, path: str, body: object = None, *, keys: bool = False, **kwargs: Any) -> Answer:
    policy = Policy(keys=KEYS if keys else KeySet(), access_log="off")
    app = public_app(MODELS, Directory(MODELS, "t"), policy, page)
    return asyncio.run(request(app, method, path, body, **kwargs))


@pytest.fixture
def page(site: Site) -> Page:
    site.page("quantserve-explorer", PAGE)
    found = made(site)
    assert found
    return found


@pytest.mark.parametrize(
    ("method", "path", "seen"),
    [
        ("GET", "/", "/"),
        ("HEAD", "/", "/"),
        ("GET", "/explorer", "/explorer"),
        ("GET", "/explorer/", "/explorer"),
        ("GET", "//explorer//a/../b", "/explorer/a/../b"),
        ("POST", "/explorer/votes", "/explorer/votes"),
        ("DELETE", "/explorer/votes", "/explorer/votes"),
    ],
)
@pytest.mark.parametrize("root", ["", "/below"])
def test_the_page_gets_its_paths(page: Page, method: str, path: str, seen: str, root: str) -> None:
    for given in (path, root + path):  # a server may remove the prefix, or not
        answer = ask(page, method, given, root_path=root)
        assert (answer.status, answer.json["path"], answer.json["method"]) == (200, seen, method)


def test_what_a_page_is_told(page: Page) -> None:
    told = ask(page, "GET", "/").json
    assert told["keys"] is False
    assert told["votes_file"] == "v"
    assert told["models"] == [
        {"id": "org/m", "method": "awq"},
        {"id": "tuned", "method": "awq"},
        {"id": "n", "method": "fp16"},
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/status"),
        ("GET", "/org--m"),
        ("POST", "/"),
        ("GET", "/explorer2"),
        ("POST", "/v1/completions"),
    ],
)
def test_everything_else_is_the_apis(page: Page, method: str, path: str) -> None:
    with_page, without = (ask(one, method, path, {"model": "n"} if method == "POST" else None) for one in (page, None))
    assert (with_page.status, list(with_page.headers)) == (without.status, list(without.headers))
    assert "path" not in with_page.body.decode()[:9]


def test_a_client_that_wants_json_gets_the_overview(page: Page) -> None:
    json_only = {"accept": "application/json"}
    answer = ask(page, "GET", "/", headers=json_only)
    assert answer.json["models"] == "/v1/models"
    assert answer.json["status"] == "/status"
    assert answer.headers["vary"] == "accept"
    browser = {"accept": "text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8"}
    assert ask(page, "GET", "/", headers=browser).json["path"] == "/"
    assert ask(page, "GET", "/", headers=json_only, keys=True).status == 401
    assert ask(None, "GET", "/").json == answer.json  # and without a page everybody


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/explorer/app.js", 200),
        ("GET", "//explorer//app.js", 200),
        ("POST", "/", 401),
        ("POST", "/explorer/app.js", 401),
        ("GET", "/explorer/votes", 401),
        ("GET", "/explorer/app.js/../votes", 401),
        ("GET", "/status", 401),
        ("GET", "/v1/models", 401),
    ],
)
def test_only_public_paths_need_no_key(page: Page, method: str, path: str, status: int) -> None:
    assert ask(page, method, path, b"x" * 100, keys=True).status == status
    with_key = {"authorization": f"Bearer {KEY}"}
    assert ask(page, method, path, b"x" * 100, keys=True, headers=with_key).status != 401
    assert ask(page, method, path, keys=True, headers={"authorization": "Bearer wrong-key"}).status == status


def test_a_body_without_a_key_is_not_read(page: Page) -> None:
    assert ask(page, "GET", "/", b"x" * 100).json["body"] == 100
    assert ask(page, "GET", "/", b"x" * 100, keys=True).json["body"] == 0


def test_a_page_that_says_nothing_about_keys_needs_one(site: Site) -> None:
    site.page("quantserve-explorer", PAGE.replace("def public", "def secret"))
    assert ask(made(site), "GET", "/", keys=True).status == 401


@pytest.mark.parametrize("answer", ["1 / 0", "'yes'", "None"])
def test_a_page_that_cannot_tell_needs_a_key(site: Site, answer: str) -> None:
    site.page("quantserve-explorer", PAGE.replace('path in ("/", "/explorer/app.js")', answer))
    assert ask(made(site), "GET", "/", keys=True).status == 401


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no such thing')", "no such thing"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("page = 7", "not a callable"),
        ("def page(settings): raise KeyError('colour')", "colour"),
        ("def page(settings): return 'text'", "not an ASGI app"),
        ("def page(): return print", "positional argument"),
        ("import time\nwhile True: time.sleep(0.01)", "did not end"),
        ("def page(settings):\n    while True: pass", "did not end"),
    ],
)
def test_a_broken_page_is_a_line_in_the_log(
    site: Site, code: str, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTSERVE_HOOK_TIMEOUT", "1")
    site.page("quantserve-explorer", code)
    with caplog.at_level(logging.WARNING):
        assert made(site) is None
    (record,) = caplog.records
    assert "no page at /: page 'explorer' of quantserve-explorer 1.0 failed" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("crash", ["raise ValueError('secret')", "import sys; sys.exit(1)"])
def test_a_page_that_fails_at_a_request_harms_only_it(site: Site, crash: str) -> None:
    site.page("quantserve-explorer", PAGE.replace('body = b""', crash))
    broken = made(site)
    answer = ask(broken, "GET", "/")
    assert answer.status == 500
    assert "secret" not in answer.error["message"]
    assert ask(broken, "GET", "/v1/models").status == 200


def test_of_two_pages_ours_is_taken_and_of_two_others_none(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.page("a-page", PAGE)
    site.page("b-page", PAGE)
    assert made(site) is None
    assert "is claimed by a-page 1.0 and b-page 1.0" in caplog.text
    site.page("quantserve-explorer", PAGE, version="7")
    found = made(site)
    assert found is not None
    assert found.name == "quantserve-explorer 7"


def test_a_page_of_another_name_or_version_is_refused(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.page("x-page", PAGE, name="dashboard")
    assert made(site) is None
    assert "the only page is 'explorer'" in caplog.text
    site.page("quantserve-explorer", PAGE, requires="quantserve>=99")
    assert made(site) is None
    assert "needs quantserve>=99" in caplog.text


def test_a_page_can_be_switched_off(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.page("quantserve-explorer", PAGE)
    for name in ("explorer", "quantserve-explorer"):
        found = pages.find({"QUANTSERVE_DISABLE": name}, site.entry_points())
        assert make_page(page_settings(SETTINGS, Policy(), MODELS), found) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("code", "said"),
    [("page = print", "quantserve-explorer 9"), ("raise ImportError('no x')", "no x"), ("", "not installed")],
)
def test_doctor_has_a_row(
    site: Site, code: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if code:
        site.page("quantserve-explorer", code, version="9")
    monkeypatch.setattr(pages, "installed", lambda groups: (site.entry_points(), []))
    run(["doctor", "--quick", "--json"])
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.split("}") if '"explorer"' in line]
    assert said in row


def test_the_gateway_of_ray_serve_has_it_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantserve.serve.gateway.deployment import GatewayServer

    site.page("quantserve-explorer", PAGE)
    monkeypatch.setattr(pages, "installed", lambda groups: (site.entry_points(), []))

    async def root_of(explorer: dict[str, Any] | None) -> dict[str, Any]:
        server = GatewayServer.__new__(GatewayServer)
        await GatewayServer.__init__(server, [], "t", Policy(access_log="off").model_dump(mode="json"), explorer)  # type: ignore[misc]
        server.check_health()
        assert (await request(server.__serve_build_asgi_app__(), "GET", "/status")).json["models"] == []
        answer: dict[str, Any] = (
            await request(server.__serve_build_asgi_app__(), "GET", "/below/", root_path="/below")
        ).json
        return answer

    config = ExplorerConfig(blind=True).model_dump(mode="json")
    assert asyncio.run(root_of(config))["blind"] is True
    assert "blind" not in asyncio.run(root_of(None))
    assert "blind" not in asyncio.run(root_of({**config, "enabled": False}))
