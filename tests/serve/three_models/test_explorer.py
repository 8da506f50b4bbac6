"""The page and `/status` of a real server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ..server import Server, until
from .conftest import MODELS

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def models(server: Server) -> dict[str, dict[str, Any]]:
    answer = server.request("GET", "/status")
    assert answer.status_code == 200
    return {model["id"]: model for model in answer.json()["models"]}


def test_the_page_needs_no_key_and_the_rest_does(server: Server) -> None:
    assert f"Explorer: {server.base}/" in server.output
    page = httpx.get(f"{server.base}/", headers={"accept": "text/html"}, timeout=60)
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert httpx.get(f"{server.base}/explorer/app.js", timeout=60).status_code == 200
    told = httpx.get(f"{server.base}/explorer/settings.json", timeout=60).json()
    assert (told["keys"], told["votes"], told["price_per_hour"]) == (True, True, 1.5)
    for path in ("/status", "/explorer/votes", "/explorer/votes.csv"):
        assert httpx.get(f"{server.base}{path}", timeout=60).status_code == 401
        assert server.request("GET", path).status_code == 200


def test_status(server: Server) -> None:
    found = models(server)
    assert tuple(found) == MODELS
    for model in found.values():
        assert (model["state"], [replica["state"] for replica in model["replicas"]]) == ("ready", ["ready"])
        assert model["ongoing"] == model["queued"] == 0
        assert model["expected"]["alone"]["tokens_per_s"] > 0
    assert [model["bits"] for model in found.values()] == [16, 4, 4]
    assert found["org/demo-awq"]["description"] == "four bits"
    assert "/status" in server.request("GET", "/openapi.json").json()["paths"]


def test_observed_performance(server: Server) -> None:
    name = MODELS[1]
    models(server)  # the first look is the baseline

    def seen() -> bool:
        server.client().completions.create(model=name, prompt="Return", max_tokens=8)
        return models(server)[name]["observed"] is not None

    until(seen)
    observed = models(server)[name]["observed"]
    assert observed["requests"] >= 1
    assert observed["ttft_ms"] > 0
    assert observed["tpot_ms"] > 0
    assert observed["tokens_per_s"] > 0


def test_a_vote(server: Server) -> None:
    vote = {"models": list(MODELS), "winner": MODELS[1], "blind": True, "prompt": "=1"}
    assert server.request("POST", "/explorer/votes", vote).json() == {"votes": 1}
    report = server.request("GET", "/explorer/votes").json()
    assert report["methods"][0]["name"] == "awq"
    assert ",awq," in server.request("GET", "/explorer/votes.csv").text
