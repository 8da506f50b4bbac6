"""The section `explorer` of an app file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantserve.cli.main import cli
from quantserve.config import ExplorerConfig, load, load_object
from quantserve.errors import ConfigError
from quantserve.serve.driver import run

Write = Callable[..., Path]
DEMO = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"


def test_votes_lie_beside_the_file(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = write("models: [org/one]\nexplorer: {votes: true, price_per_hour: 2}", "deep/app.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "explorer-votes.sqlite3").touch()  # a file of that name here is another server's
    monkeypatch.chdir(tmp_path / "elsewhere")
    explorer = load([app]).explorer
    assert (explorer.enabled, explorer.votes, explorer.blind) == (True, True, False)
    assert (explorer.price_per_hour, explorer.currency) == (2, "USD")
    assert explorer.votes_file == str(app.parent / "explorer-votes.sqlite3")
    app.write_text("models: [org/one]\nexplorer: {votes_file: /var/lib/votes}")
    assert load([app]).explorer.votes_file == "/var/lib/votes"


def test_defaults_without_a_section() -> None:
    assert load_object({"models": ["org/one"]}, "args").explorer == ExplorerConfig()
    assert load_object({"models": ["org/one"], "explorer": None}, "args").explorer == ExplorerConfig()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{vote: true}", "app.yaml:2: explorer.vote: unknown key `vote`; did you mean `votes`?"),
        ("{votes: 1}", "explorer.votes: "),
        ("{price_per_hour: -1}", "explorer.price_per_hour: "),
        ("{currency: ''}", "explorer.currency: must be 1 to 8 characters"),
        ("{currency: a very long one}", "explorer.currency: must be 1 to 8 characters"),
        ("{grafana_url: 'javascript:alert(1)'}", "explorer.grafana_url: must begin with http:// or https://"),
        ("{grafana_url: 'https://x y'}", "explorer.grafana_url: must begin with"),
        ("{votes_file: ''}", "explorer.votes_file: "),
        ("[]", "explorer: "),
        ("yes", "explorer: "),
    ],
)
def test_mistakes(write: Write, section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([write(f"models: [org/one]\nexplorer: {section}", "app.yaml")])
    assert said in str(caught.value)


def test_two_files_must_agree(write: Write) -> None:
    first = write("models: [org/one]\nexplorer: {blind: true}", "app.yaml")
    with pytest.raises(ConfigError, match="differs from `explorer` at"):
        load([first, write("models: [org/two]\nexplorer: {blind: false}", "other.yaml")])


@pytest.mark.parametrize(("options", "blind"), [([], True), (["--no-explorer"], None)])
def test_serve_hands_it_on(
    tmp_path: Path, options: list[str], blind: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def serve_plans(plans: Any, http: Any, *, explorer: ExplorerConfig | None, **others: Any) -> int:
        given.append(explorer)
        return 0

    monkeypatch.setattr(run, "serve_plans", serve_plans)
    app = tmp_path / "app.yaml"
    app.write_text(f"models: [{DEMO}]\nexplorer: {{blind: true}}")
    result = CliRunner().invoke(cli, ["serve", str(app), "--target", "cpu", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (explorer,) = given
    assert (explorer and explorer.blind) == blind
