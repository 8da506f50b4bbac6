"""API keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from quantserve.errors import UsageError
from quantserve.serve.keys import VARIABLE, ApiKeys, load_keys

from .asgi_client import Answer, Upstream, request


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = tmp_path / "keys"
    path.write_text("# ours\nkey-number-one\n\n  key-number-two  \n")
    monkeypatch.setenv(VARIABLE, "key-number-three, key-number-four\nkey-number-one")
    return load_keys(str(path))


def ask(digests: list[str], path: str, key: str | None, method: str = "GET", **kwargs: Any) -> Answer:
    headers = {} if key is None else {"authorization": key}
    return asyncio.run(request(ApiKeys(Upstream("m"), digests), method, path, headers=headers, **kwargs))


def test_keys_are_kept_as_digests(digests: list[str]) -> None:
    assert len(digests) == 4
    assert all(len(digest) == 64 and "key" not in digest for digest in digests)


@pytest.mark.parametrize("number", ["one", "two", "three", "four"])
def test_every_key_opens(digests: list[str], number: str) -> None:
    assert ask(digests, "/v1/models", f"Bearer key-number-{number}").status == 200
    assert ask(digests, "/v1/models", f"bearer  key-number-{number}").status == 200


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer ", "Bearer key-number-five", "Basic key-number-one", "key-number-one",
            "Bearer key-number-on", "Bearer key-number-one2"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/", "/health/", "/healthx"])
def test_nothing_else_does(digests: list[str], key: str | None, path: str) -> None:
    answer = ask(digests, path, key)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "number" not in answer.body.decode()


def test_health_is_open(digests: list[str]) -> None:
    assert ask(digests, "/health", None).status == 200
    assert ask(digests, "/demo/health", None, root_path="/demo").status == 200
    assert ask(digests, "/health", None, method="POST").status == 401


def test_without_keys_everything_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert load_keys(None) == []
    assert ask([], "/v1/models", None).status == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "holds no key"), (b"# only this\n\n", "holds no key"), (b"short\n", "shorter than 8"),
     (b"has a space in it\n", "without spaces"), (b"\xff\xfe\xfa\n", "not UTF-8")],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "keys").write_bytes(text)
    with pytest.raises(UsageError, match=said):
        load_keys(str(tmp_path / "keys"))
    with pytest.raises(UsageError, match="No such file"):
        load_keys(str(tmp_path / "absent"))


def test_a_bad_key_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("s3cret\n")
    with pytest.raises(UsageError) as caught:
        load_keys(str(tmp_path / "keys"))
    assert "s3cret" not in str(caught.value)
