"""The page's app: files, headers, settings, and votes over HTTP."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Guard
from quantserve.serve.routes import normalized
from quantserve_explorer.app import STATIC, Explorer, page
from quantserve_explorer.ballot import MOST_BYTES, MOST_CHARACTERS

CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
SHOWN = {"version", "keys", "votes", "blind", "price_per_hour", "currency", "grafana_url"}


def settings(folder: Path, **given: Any) -> dict[str, Any]:
    return {
        "enabled": True,
        "votes": True,
        "blind": False,
        "votes_file": str(folder / "votes.sqlite3"),
        "price_per_hour": None,
        "currency": "USD",
        "grafana_url": None,
        "version": "1",
        "keys": False,
        "models": [
            {"id": "fp", "method": "fp16"},
            {"id": "org/a", "method": "awq"},
            {"id": "org/b", "method": "awq"},
            {"id": "s", "method": "squeezellm"},
        ],
        **given,
    }


class Client:
    """Requests as the gateway passes them on: with a normalized path, and errors in the envelope."""

    def __init__(self, app: Explorer) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async def passed(scope: Scope, receive: Receive, send: Send) -> None:
                await Guard(self.app)({**scope, "path": normalized(scope["path"])}, receive, send)

            transport = httpx.ASGITransport(passed)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(go())

    def vote(self, models: object = ("fp", "org/a"), winner: object = "fp", **more: Any) -> httpx.Response:
        return self("POST", "/explorer/votes", json={"models": models, "winner": winner, **more})


@pytest.fixture
def ask(tmp_path: Path) -> Client:
    return Client(page(settings(tmp_path)))


# --- files -----------------------------------------------------------------------------------------------


def test_every_file_is_served_with_its_type_and_the_security_headers(ask: Client) -> None:
    paths = [path for path in STATIC.rglob("*") if path.is_file()]
    assert paths
    for path in paths:
        answer = ask("GET", f"/explorer/{path.relative_to(STATIC).as_posix()}", headers={"accept-encoding": "identity"})
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), path
        assert answer.headers["content-security-policy"].startswith(CSP)
        assert "'unsafe" not in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
        assert answer.headers["content-type"].startswith(kind.get(path.suffix, "text/plain"))


def test_the_root_is_the_page(ask: Client) -> None:
    answer = ask("GET", "/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (STATIC / "index.html").read_bytes()
    assert "accept" in answer.headers["vary"].split(", ")
    head = ask("HEAD", "/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == answer.headers["etag"]


def test_the_page_needs_no_other_host_and_no_inline_script_or_style() -> None:
    for path in STATIC.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(r"<(?:script|link|img|source)[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", text)
        assert loaded
        assert not [one for one in loaded if "//" in one or one.startswith("/")], "not relative"
        assert not re.findall(r"<script(?![^>]*\bsrc=)[^>]*>", text)
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)


def test_files_are_compressed_once(ask: Client) -> None:
    answer = ask("GET", "/explorer/app.js", headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.content == (STATIC / "app.js").read_bytes()  # httpx decodes
    assert int(answer.headers["content-length"]) == len(gzip.compress(answer.content, 9, mtime=0))
    assert "accept-encoding" in answer.headers["vary"]


@pytest.mark.parametrize("given", ["{}", "W/{}", '"x", {}', "*"])
def test_a_file_that_the_client_has_is_not_sent_again(ask: Client, given: str) -> None:
    etag = ask("GET", "/explorer/app.css").headers["etag"]
    answer = ask("GET", "/explorer/app.css", headers={"if-none-match": given.format(etag)})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert ask("GET", "/explorer/app.css", headers={"if-none-match": '"other"'}).status_code == 200


def test_first_paint_is_small(ask: Client) -> None:
    """All that the page loads at once, compressed, as issue and docs promise."""
    text = (STATIC / "index.html").read_text()
    loaded = {"/"} | {f"/{one}" for one in re.findall(r"(?:src|href)=\"(explorer/[^\"]+)", text)}
    waiting = [path for path in loaded if path.endswith(".js")]
    while waiting:
        path = waiting.pop()
        source = (STATIC / path.removeprefix("/explorer/")).read_text()
        for one in re.findall(r"^(?:import|export) .*?from \"(\.[^\"]+)\"", source, re.MULTILINE):
            found = "/explorer/" + str((STATIC / path.removeprefix("/explorer/")).parent.joinpath(one).resolve()
                                       .relative_to(STATIC))  # fmt: skip
            if found not in loaded:
                loaded.add(found)
                waiting.append(found)
    sizes = [int(ask("GET", path, headers={"accept-encoding": "gzip"}).headers["content-length"]) for path in loaded]
    assert len(loaded) > 3
    assert sum(sizes) < 100_000


@pytest.mark.parametrize(
    "path",
    ["/explorer/nothing.js", "/explorer/../app.py", "/explorer/..%2fapp.py", "/explorer/%2e%2e/app.py", "/explorer/lib",
     "/explorer//etc/passwd", "/explorer/.hidden", "/explorer/app.js%00", "/explorer/votes/x", "/other"],
)  # fmt: skip
def test_nothing_else_is_served(ask: Client, path: str) -> None:
    answer = ask("GET", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert not ask.app.public(path)


def test_hidden_files_and_other_types_are_left_out(tmp_path: Path) -> None:
    for name in ("index.html", ".secret.js", "code.py", "lib/.x.css", "lib/a.js"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    app = Explorer(settings(tmp_path), tmp_path)
    served = [name for name in ("index.html", ".secret.js", "code.py", "lib/.x.css", "lib/a.js")
              if app.public(f"/explorer/{name}")]  # fmt: skip
    assert served == ["index.html", "lib/a.js"]


@pytest.mark.parametrize(("path", "target"), [("/explorer/", "../"), ("/explorer", "./")])
def test_the_folder_leads_to_the_page_below_any_prefix(ask: Client, path: str, target: str) -> None:
    answer = ask("GET", path)
    assert (answer.status_code, answer.headers["location"]) == (307, target)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/explorer", "/explorer/app.js", "/explorer/settings.json", "/explorer/votes.csv"])
def test_files_are_read_only(ask: Client, method: str, path: str) -> None:
    answer = ask(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


# --- settings --------------------------------------------------------------------------------------------


def test_settings_tell_no_more_than_the_page_needs(tmp_path: Path) -> None:
    told = settings(tmp_path, keys=True, price_per_hour=1.5, grafana_url="https://g.example/d", secret="no")
    ask = Client(page(told))
    answer = ask("GET", "/explorer/settings.json")
    assert set(answer.json()) == SHOWN
    assert answer.json() == {name: told[name] for name in SHOWN}
    assert answer.headers["cache-control"] == "no-store"


def test_files_and_settings_are_public_and_votes_are_not(ask: Client) -> None:
    for path in ("/", "/explorer", "/explorer/app.js", "/explorer/settings.json"):
        assert ask.app.public(path)
    for path in ("/explorer/votes", "/explorer/votes.csv", "/status", "/explorer/votes.js", ""):
        assert not ask.app.public(path)


# --- votes -----------------------------------------------------------------------------------------------


def test_votes_are_counted(ask: Client) -> None:
    assert ask.vote().json() == {"votes": 1}
    assert ask.vote(["fp", "org/a", "org/b"], "org/b", blind=True, prompt="Hm?").status_code == 201
    assert ask.vote(["fp", "s"], None).json() == {"votes": 3}
    answer = ask("GET", "/explorer/votes")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"].startswith(CSP)
    report = answer.json()
    assert report["votes"] == 3
    models = {row["name"]: row for row in report["models"]}
    shown = {name: (row["method"], row["votes"], row["meetings"], row["won"]) for name, row in models.items()}
    assert shown == {
        "fp": ("fp16", 3, 3, 1.5),
        "org/a": ("awq", 2, 2, 0),
        "org/b": ("awq", 1, 2, 2),
        "s": ("squeezellm", 1, 1, 0.5),
    }
    assert next(row["name"] for row in report["models"]) == "org/b"
    methods = {row["name"]: (row["votes"], row["meetings"], row["won"]) for row in report["methods"]}
    assert methods == {"fp16": (3, 3, 1.5), "awq": (2, 2, 1), "squeezellm": (1, 1, 0.5)}  # awq does not meet awq
    for row in (*report["models"], *report["methods"]):
        assert 0 <= row["low"] <= row["win_rate"] <= row["high"] <= 1


def test_no_votes_yet(ask: Client) -> None:
    assert ask("GET", "/explorer/votes").json() == {"votes": 0, "methods": [], "models": []}
    assert ask("GET", "/explorer/votes.csv").text == "time,winner,winner_method,models,methods,blind,prompt\r\n"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"winner": None}, "models", "got null"),
        ({"models": "fp", "winner": None}, "models", '"fp"'),
        ({"models": ["fp"], "winner": None}, "models", "2 to 8"),
        ({"models": ["fp"] * 9, "winner": None}, "models", "2 to 8"),
        ({"models": ["fp", "x"], "winner": None}, "models[1]", '"x"'),
        ({"models": ["fp", {"a": 1}], "winner": None}, "models[1]", '{"a": 1}'),
        ({"models": ["fp", "fp"], "winner": None}, "models[1]", "second time"),
        ({"models": ["fp", "s"]}, "winner", "missing"),
        ({"models": ["fp", "s"], "winner": "org/a"}, "winner", '"org/a"'),
        ({"models": ["fp", "s"], "winner": 0}, "winner", "got 0"),
        ({"models": ["fp", "s"], "winner": ["fp"]}, "winner", '["fp"]'),
        ({"models": ["fp", "s"], "winner": "fp", "blind": 1}, "blind", "true or false"),
        ({"models": ["fp", "s"], "winner": "fp", "prompt": 7}, "prompt", "must be text"),
        ({"models": ["fp", "s"], "winner": "fp", "prompt": "x" * (MOST_CHARACTERS + 1)}, "prompt", "16001"),
        ({"models": ["fp", "s"], "winner": "fp", "promt": "x"}, "promt", "unknown"),
        ([], None, "object"),
    ],
)
def test_a_wrong_vote_names_its_field(ask: Client, body: object, param: str | None, said: str) -> None:
    answer = ask("POST", "/explorer/votes", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert ask("GET", "/explorer/votes").json()["votes"] == 0


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b'{"models": ["fp", "s"], "winner": "fp", "prompt": "\\ud800"}', "application/json", 400),
        (b'{"models": ["fp", "s"], "winner": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b" " * (MOST_BYTES + 1), "application/json", 413),
        (b'{"models": ["fp", "s"], "winner": "fp"}', "text/plain", 415),  # what another origin's page may send
        (b"models=fp", "application/x-www-form-urlencoded", 415),
    ],
)
def test_hostile_bodies(ask: Client, content: bytes, kind: str, status: int) -> None:
    answer = ask("POST", "/explorer/votes", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert ask("GET", "/explorer/votes").json()["votes"] == 0


@pytest.mark.parametrize("prompt", ["'; DROP TABLE votes; --", "\0", "\u202e", "😀" * 1000, 'a\r\nb,"c"', ""])
def test_any_text_is_stored_as_it_is(ask: Client, prompt: str) -> None:
    assert ask.vote(prompt=prompt).status_code == 201
    (row,) = rows(ask)
    assert row["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=cmd|' /C calc'!A0", "|x", "%x"]
)
def test_no_cell_is_a_formula(ask: Client, prompt: str) -> None:
    ask.vote(prompt=prompt)
    (row,) = rows(ask)
    assert row["prompt"] == f"'{prompt}"


def rows(ask: Client) -> list[dict[str, str]]:
    answer = ask("GET", "/explorer/votes.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["content-disposition"]
    return list(csv.DictReader(io.StringIO(answer.text, newline="")))


def test_csv(ask: Client) -> None:
    ask.vote(blind=True)
    ask.vote(["org/a", "s"], None, prompt="a, b")
    first, second = rows(ask)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("time"))
    assert first == {
        "winner": "fp", "winner_method": "fp16", "models": "fp org/a", "methods": "fp16 awq", "blind": "true",
        "prompt": "",
    }  # fmt: skip
    assert (second["winner"], second["winner_method"], second["prompt"]) == ("", "", "a, b")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/explorer/votes"), ("POST", "/explorer/votes"), ("GET", "/explorer/votes.csv")]
)
def test_votes_are_off_by_default(tmp_path: Path, method: str, path: str) -> None:
    ask = Client(page(settings(tmp_path, votes=False)))
    answer = ask(method, path, json={"models": ["fp", "s"], "winner": "fp"} if method == "POST" else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "votes_off")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    (tmp_path / "votes.sqlite3").mkdir()
    return tmp_path


def test_a_database_that_cannot_be_used_is_an_error_of_that_request(unusable: Path) -> None:
    ask = Client(page(settings(unusable)))
    for answer in (ask.vote(), ask("GET", "/explorer/votes")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "votes_unavailable")
        assert str(unusable) not in error["message"]
    assert ask("GET", "/").status_code == 200
    (unusable / "votes.sqlite3").rmdir()
    assert ask.vote().status_code == 201  # and it works again when the cause is gone
