"""What the checks found, for people, scripts and CI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from xml.etree import ElementTree

from quantserve import __version__
from quantserve.errors import PluginError
from quantserve.hookspecs import API_MINOR, API_VERSION
from quantserve.testing.case import Case
from quantserve.testing.check import Result, results


@dataclass(frozen=True)
class Report:
    """The results of one plugin."""

    name: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The checks that failed."""
        return tuple(one for one in self.results if one.outcome == "failed")

    @property
    def exit_code(self) -> int:
        """0, or that of a plugin's defect."""
        return PluginError.exit_code if self.failed else 0

    @property
    def counts(self) -> dict[str, int]:
        """How many checks have each outcome."""
        return dict(Counter(one.outcome for one in self.results))

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "plugin": self.name,
            "quantserve": __version__,
            "api": f"{API_VERSION}.{API_MINOR}",
            "counts": self.counts,
            "checks": [one.to_json() for one in self.results],
        }

    def to_junit(self) -> str:
        """The XML of JUnit that CI systems read."""
        counts = self.counts
        suite = ElementTree.Element(
            "testsuite",
            name=f"quantserve plugin {self.name}",
            tests=str(len(self.results)),
            failures=str(counts.get("failed", 0)),
            skipped=str(counts.get("skipped", 0) + counts.get("expected", 0)),
            errors="0",
        )
        for one in self.results:
            case = ElementTree.SubElement(suite, "testcase", classname=one.check.group, name=one.check.id)
            if one.outcome == "failed":
                failure = ElementTree.SubElement(case, "failure", message=one.problems[0])
                failure.text = "\n".join([*one.problems, f"fix: {one.check.fix}"])
            elif one.outcome in ("skipped", "expected"):
                ElementTree.SubElement(case, "skipped", message=" ".join(one.problems))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def run_checks(case: Case, *, engine: bool = False, only: Collection[str] = (), first: bool = False) -> Report:
    """Run the checks that apply to a plugin.

    Args:
        case: the plugin.
        engine: whether to run those that start an engine.
        only: beginnings of ids; none for all.
        first: whether to end at the first failure.

    Raises:
        UsageError: no such plugin is installed, or the case is wrong.
    """
    return Report(case.name, tuple(results(case, engine=engine, only=only, first=first)))
