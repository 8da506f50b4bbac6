"""The Grafana dashboard asks for what `/metrics` has, in PromQL that is well formed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quantserve.serve.gateway.metrics.collect import GatewayMetrics
from quantserve.serve.gateway.metrics.observed import Observed
from quantserve.serve.gateway.metrics.text import merge
from quantserve.serve.gateway.middleware.trace import Trace
from quantserve.serve.gateway.upstreams.pool import Limits, Pool

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "dashboards/grafana/quantserve.json").read_text("utf-8"))
DATA = ROOT / "tests/serve/data"
FUNCTIONS: Final = frozenset({"histogram_quantile", "rate", "vector"})
AGGREGATIONS: Final = frozenset({"sum", "max", "min", "avg", "count"})
WORDS: Final = frozenset({"by", "without", "ignoring", "on", "or", "and", "unless", "group_left", "group_right"})
ADDED: Final = frozenset({"job", "instance"})
"""Labels that Prometheus adds."""
TOKEN: Final = re.compile(
    r"""\s*(?: (?P<word>[a-zA-Z_:][\w:]*) | (?P<number>\d+(?:\.\d+)?) | (?P<text>"(?:[^"\\]|\\.)*")
    | (?P<range>\[(?:\d+[smhd]|\$__rate_interval)\]) | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/(){},=<>]) )""",
    re.VERBOSE,
)
PAIRS: Final = {")": "(", "}": "{"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, str]]:
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def tokens(expression: str) -> list[tuple[str, str]]:
    """Kinds and texts; fails on what is not PromQL, as far as this dashboard uses it."""
    found, at = [], 0
    while at < len(expression.rstrip()):
        match = TOKEN.match(expression, at)
        assert match, f"not PromQL at {expression[at:]!r}"
        assert match.lastgroup
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


def check(expression: str, known: dict[str, set[str]]) -> set[str]:
    """Check one expression against the metrics and labels there are; returns the metrics it uses."""
    used: set[str] = set()
    open_: list[str] = []
    metric, labels_of = "", set().union(*known.values()) | ADDED
    found = tokens(expression)
    for index, (kind, text) in enumerate(found):
        after = found[index + 1][1] if index + 1 < len(found) else ""
        before = found[index - 1][1] if index else ""
        grouping = index > 1 and "(" in open_ and _opened_by(found, index) in WORDS
        if text in ("(", "{"):
            open_.append(text)
        elif text in PAIRS:
            assert open_, f"{text} without its beginning"
            assert open_.pop() == PAIRS[text], f"{text} closes something else"
        elif kind == "word" and open_ and open_[-1] == "{":
            assert text in known[metric] | ADDED, f"{metric} has no label {text}"
            assert after in ("=", "!=", "=~", "!~")
        elif kind == "word" and grouping:
            assert text in labels_of, f"no metric has a label {text}"
        elif kind == "word" and text not in WORDS:
            if after == "(" or text in AGGREGATIONS:
                assert text in FUNCTIONS | AGGREGATIONS, f"unknown function {text}"
            else:
                assert text in known, f"there is no metric {text}"
                assert after == "{", f"{text} without the dashboard's variables"
                metric = text
                used.add(text)
        elif kind == "range":
            assert before == "}"
    assert not open_, f"{open_[-1]} is not closed"
    counters = {name for name in used if name.endswith(("_total", "_bucket"))}
    for name in counters:
        assert re.search(rf"rate\({name}{{[^}}]*}}\[\$__rate_interval\]\)", expression), f"{name} without a rate"
    return used


def _opened_by(found: list[tuple[str, str]], index: int) -> str:
    """The word before the innermost parenthesis that is open at a token."""
    depth = 0
    for position in range(index - 1, 0, -1):
        depth += (found[position][1] == ")") - (found[position][1] == "(")
        if depth < 0:
            return found[position - 1][1]
    return ""


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Sample names of a real text and their labels."""
    expected = {"source": "roofline", "e2e_ms": 640, "ttft_ms": 10, "itl_ms": 10, "output_tokens_per_s": 100}
    card = {"id": "demo", "metadata": {"method": "awq", "bits": 4, "route": "/demo", "expected_performance": expected}}
    pool = Pool("demo", Limits())
    pool.update([{"id": "r1", "host": "127.0.0.1", "port": 9}])
    observed = Observed()
    texts = [(DATA / name).read_bytes() for name in ("vllm-0.32-metrics.txt", "vllm-0.32-metrics-later.txt")]
    for text in texts:
        observed.add("demo", "r1", text)
        observed.mark([("demo", "r1")])
    metrics = GatewayMetrics([card], lambda: [pool], observed)
    metrics(Trace("id", "POST", "/v1/completions", model="demo", status=200, attempts=1, first_byte_s=1, total_s=1))
    merged = merge(metrics.render(), [({"model": "demo", "method": "awq", "replica": "r1"}, texts[-1])])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(merged.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(("title", "expression", "legend"), list(expressions()))
def test_expressions(title: str, expression: str, legend: str, known: dict[str, set[str]]) -> None:
    check(expression, known)
    used = set(re.findall(r"\$(\w+)", expression)) - {"__rate_interval"}
    assert used <= set(variables())
    assert "job" in used, "two servers would be mixed up"
    shown = set(re.findall(r"{{(\w+)}}", legend))
    if kept := re.findall(r"\bby \(([^)]*)\)", expression):
        assert all(shown <= set(group.split(", ")) for group in kept), f"the legend shows labels that {kept} drop"


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ('sum(rate(quantserve_requests_total{job="a"}[5m])', "not closed"),
        ('sum(quantserve_replicas{job="a")', "closes something else"),
        ('rates(quantserve_requests_total{job="a"}[5m])', "unknown function rates"),
        ('quantserve_request{job="a"}', "no metric quantserve_request"),
        ('quantserve_replicas{queue="a"}', "no label queue"),
        ('sum by (nobody) (quantserve_replicas{job="a"})', "label nobody"),
        ("quantserve_replicas", "without the dashboard's variables"),
        ('sum(quantserve_requests_total{job="a"})', "without a rate"),
        ("quantserve_replicas{job='a'}", "not PromQL"),
    ],
)
def test_the_check_itself(expression: str, complaint: str, known: dict[str, set[str]]) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(expression, known)


def test_all_of_our_own_metrics_are_shown(known: dict[str, set[str]]) -> None:
    used = set().union(*(check(expression, known) for _, expression, _ in expressions()))
    own = {re.sub("_(bucket|sum|count)$", "", name) for name in known if name.startswith("quantserve_")}
    assert own == {re.sub("_(bucket|sum|count)$", "", name) for name in used if name.startswith("quantserve_")}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_installed_vllm_has_the_metrics_that_are_shown(known: dict[str, set[str]]) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text("utf-8")
    defined = set(re.findall(r'name="(vllm:\w+)"', source))
    used = set().union(*(check(expression, known) for _, expression, _ in expressions()))
    shown = {re.sub("_(bucket|sum|count|total)$", "", name) for name in used if name.startswith("vllm:")}
    assert len(shown) > 10
    assert shown <= defined


def test_variables(known: dict[str, set[str]]) -> None:
    assert list(variables()) == ["datasource", "job", "model", "method", "replica"]
    assert (variables()["datasource"]["type"], variables()["datasource"]["query"]) == ("datasource", "prometheus")
    for name, variable in list(variables().items())[1:]:
        metric, label = re.fullmatch(r"label_values\(([\w:]+)(?:{.*})?, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert label == name
        assert label in known[metric] | ADDED
        assert variable["definition"] == variable["query"]["query"]
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".*")


def test_every_panel_follows_the_data_source() -> None:
    for panel in panels():
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        names = [target["refId"] for target in panel["targets"]]
        assert len(names) == len(set(names))


def test_layout() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells


def test_what_grafana_needs() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert (DASHBOARD["id"], DASHBOARD["uid"], DASHBOARD["title"]) == (None, "quantserve", "quantserve")
    assert {panel["type"] for panel in DASHBOARD["panels"]} <= {"row", "stat", "timeseries", "table"}
