"""API keys."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from quantserve.errors import UsageError
from quantserve.serve.asgi import Refused, read_body
from quantserve.serve.gateway.middleware import api_keys as keys
from quantserve.serve.gateway.middleware.api_keys import ApiKeys, KeyFile, KeySet, load_key_set
from quantserve.system.environment import API_KEYS

from .asgi_client import Answer, Upstream, request


@pytest.fixture
def key_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeySet:
    path = tmp_path / "keys"
    path.write_text("# ours\nkey-number-one\n\n  key-number-two  \n")
    monkeypatch.setenv(API_KEYS, "key-number-three, key-number-four\nkey-number-one")
    return load_key_set(str(path))


def ask(key_set: KeySet | ApiKeys, path: str, key: str | None, method: str = "GET", **kwargs: Any) -> Answer:
    headers = {} if key is None else {"authorization": key}
    app = key_set if isinstance(key_set, ApiKeys) else ApiKeys(Upstream("m"), key_set)
    return asyncio.run(request(app, method, path, headers=headers, **kwargs))


def test_keys_are_kept_as_digests(key_set: KeySet) -> None:
    assert len(key_set.digests) == 4
    assert all(len(digest) == 64 and "key" not in digest for digest in key_set.digests)
    assert KeySet.model_validate(json.loads(key_set.model_dump_json())) == key_set


@pytest.mark.parametrize("number", ["one", "two", "three", "four"])
def test_every_key_opens(key_set: KeySet, number: str) -> None:
    assert ask(key_set, "/v1/models", f"Bearer key-number-{number}").status == 200
    assert ask(key_set, "/v1/models", f"bearer  key-number-{number}").status == 200


def test_the_header_of_anthropics_clients_opens(key_set: KeySet) -> None:
    def get(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return asyncio.run(request(ApiKeys(Upstream("m"), key_set), "GET", "/v1/models", headers=named)).status

    assert get(x_api_key="key-number-one") == 200
    assert get(x_api_key="key-number-five") == 401
    assert get(x_api_key="key-number-one", authorization="Bearer key-number-five") == 401
    assert get(x_api_key="key-number-one", authorization="Basic bmFtZTpwYXNz") == 200


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer ", "Bearer key-number-five", "Basic key-number-one", "key-number-one",
            "Bearer key-number-on", "Bearer key-number-one2"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/", "/health/", "/healthx"])
def test_other_keys_are_refused(key_set: KeySet, key: str | None, path: str) -> None:
    answer = ask(key_set, path, key)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "number" not in answer.body.decode()


def test_health_is_open(key_set: KeySet) -> None:
    assert ask(key_set, "/health", None).status == 200
    assert ask(key_set, "/demo/health", None, root_path="/demo").status == 200
    assert ask(key_set, "/health", None, method="POST").status == 401


def test_without_keys_every_request_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEYS, raising=False)
    assert load_key_set(None).digests == []
    assert ask(KeySet(), "/v1/models", None).status == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "holds no key"), (b"# only this\n\n", "holds no key"), (b"short\n", "shorter than 8"),
     (b"has a space in it\n", "without spaces"), (b"\xff\xfe\xfa\n", "not UTF-8")],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "keys").write_bytes(text)
    with pytest.raises(UsageError, match=said):
        load_key_set(str(tmp_path / "keys"))
    with pytest.raises(UsageError, match="No such file"):
        load_key_set(str(tmp_path / "absent"))


def test_a_file_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbffirst-key-1\r\nsecond-key-2\r\n")
    found = load_key_set(str(tmp_path / "keys")).from_file
    assert found == tuple(sorted(sha256(key).hexdigest() for key in (b"first-key-1", b"second-key-2")))


def test_a_bad_key_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("s3cret\n")
    with pytest.raises(UsageError) as caught:
        load_key_set(str(tmp_path / "keys"))
    assert "s3cret" not in str(caught.value)


MODELS = {"status": "degraded", "models": {"secret-model": "unavailable"}}


@pytest.mark.parametrize("body", [json.dumps(MODELS), "[]", "secret-model", '{"status": ["secret-model"]}'])
@pytest.mark.parametrize("status", [200, 503])
def test_health_without_a_key_names_no_model(key_set: KeySet, body: str, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-model", b"secret-model")]})
        await send({"type": "http.response.body", "body": body.encode()})

    answer = ask(ApiKeys(app, key_set), "/health", None)
    assert answer.status == status
    assert list(answer.json) == ["status"]
    assert "secret-model" not in f"{answer.headers} {answer.body!r}"
    assert answer.json["status"] == ("degraded" if "degraded" in body else "ok" if status == 200 else "unavailable")
    assert ask(ApiKeys(app, key_set), "/health", "Bearer key-number-one").body == body.encode()
    assert ask(ApiKeys(app, KeySet()), "/health", None).body == body.encode()


@pytest.mark.parametrize(("key", "length"), [(None, 0), ("Bearer key-number-one", 1000)])
def test_the_body_of_a_health_request_without_a_key_is_not_read(key_set: KeySet, key: str | None, length: int) -> None:
    """Bodies of strangers would fill the memory for bodies."""
    read = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        read.append(await read_body(receive))
        await JSONResponse({"status": "ok"})(scope, receive, send)

    headers = {"authorization": key} if key else {}
    answer = asyncio.run(request(ApiKeys(app, key_set), "GET", "/health", b"x" * 1000, headers=headers))
    assert answer.status == 200
    assert [len(body) for body in read] == [length]


def test_health_that_is_refused(key_set: KeySet) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise Refused(503, "secret-model is away")

    answer = ask(ApiKeys(app, key_set), "/health", None)
    assert (answer.status, answer.json) == (503, {"status": "unavailable"})


def test_websockets_need_a_key(key_set: KeySet) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(ApiKeys(Upstream("m"), key_set)(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


class Reloading:
    """Keys in a file that changes while serving; every request checks the file."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "FILE_CHECK_S", 0.0)
        monkeypatch.setenv(API_KEYS, "key-of-environment")
        self.path = path
        self.write("key-number-one\n")
        self.app = ApiKeys(Upstream("m"), load_key_set(str(path)))

    def write(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.path)

    def opens(self, key: str) -> bool:
        return ask(self.app, "/v1/models", f"Bearer {key}").status == 200


@pytest.fixture
def reloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reloading:
    return Reloading(tmp_path / "keys", monkeypatch)


def test_keys_are_added_and_withdrawn_while_serving(reloading: Reloading) -> None:
    assert reloading.opens("key-number-one")
    reloading.write("key-number-one\nkey-number-two\n")
    assert reloading.opens("key-number-two")
    reloading.write("key-number-two\n")
    assert not reloading.opens("key-number-one")
    assert reloading.opens("key-number-two")
    assert reloading.opens("key-of-environment")


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "key-number-two\nwith a space in it\n", None])
def test_a_broken_file_keeps_the_keys(reloading: Reloading, text: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        if text is None:
            reloading.path.unlink()
        else:
            reloading.write(text)
        for _ in range(3):
            assert reloading.opens("key-number-one")
            assert not reloading.opens("key-number-two")
            assert not reloading.opens("")
    assert len(caplog.records) == 1  # not once per look
    assert "the previous keys stay valid" in caplog.text
    assert "number" not in caplog.text.replace("key number 1", "").replace("key number 2", "")
    reloading.write("key-number-two\n")
    assert reloading.opens("key-number-two")
    assert not reloading.opens("key-number-one")


def test_a_change_before_the_first_request_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reloading = Reloading(tmp_path / "keys", monkeypatch)
    reloading.write("key-number-two\n")
    assert reloading.opens("key-number-two")
    assert not reloading.opens("key-number-one")


def test_the_file_is_checked_once_a_second(key_set: KeySet, tmp_path: Path) -> None:
    now = [100.0]
    known = KeyFile(key_set, lambda: now[0])
    assert len(known.digests()) == 4
    (tmp_path / "keys").write_text("key-number-five\n")
    now[0] += 0.9
    assert len(known.digests()) == 4
    now[0] += 0.2
    assert len(known.digests()) == 4  # three of the environment and this one
    assert sha256(b"key-number-five").digest() in known.digests()
    assert sha256(b"key-number-two").digest() not in known.digests()
