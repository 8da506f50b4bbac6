"""The judgements of a soak: what was lost without a cause, what grew, what was left over."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from benchmarks.soak.clients import Book, Outcome
from benchmarks.soak.faults import RECOVERY_S, Fault
from benchmarks.soak.server import ROLES, Sample, Use

GRACE_S: Final = 3.0
"""A client may see the end of a connection, or the log its last line, so long after a process was killed."""
QUANTITIES: Final[Mapping[str, tuple[Callable[[Use], int], float, float]]] = {
    "memory": (lambda use: use.private, 0.10, 48 << 20),
    "file descriptors": (lambda use: use.fds, 0.10, 20),
    "threads": (lambda use: use.threads, 0.10, 10),
    "processes": (lambda use: use.processes, 0.0, 1),
}
"""Quantity -> its value, and the growth over the judged time that is allowed: a share of its median, or a number if
that is more."""
ZOMBIE_S: Final = 30.0
FEWEST: Final = 6
"""Samples for a judgement of growth."""


@dataclass(frozen=True)
class Judgement:
    """One judgement.

    Attributes:
        sound: whether it passed; None if there was too little to judge.
        detail: numbers, or the first things that are wrong.
    """

    name: str
    sound: bool | None
    detail: str


def lost(book: Book, faults: Sequence[Fault], replicas: Mapping[str, str]) -> Judgement:
    """Whether a fault explains every failed request, and every 503.

    Args:
        replicas: request id -> id of its replica, from the access log.
    """
    unexplained = [one for one in book.unusual if not explained(one, faults, replicas.get(one.id))]
    explained_ones = len(book.unusual) - len(unexplained)
    detail = f"{len(unexplained)} requests failed without a cause, {explained_ones} because of a fault"
    return Judgement("no accepted request is lost", not unexplained, _with(detail, map(_outcome, unexplained)))


def explained(outcome: Outcome, faults: Sequence[Fault], replica: str | None) -> bool:
    """Whether a fault within the lifetime of a request explains its failure.

    A killed gateway explains the requests in progress at that moment. A lost replica explains those that were on it,
    and, if it was the only one of its model, those that came before its successor was ready. Every fault explains that
    `/health` returns 503 as long as it lasts.
    """
    for fault in faults:
        recovered = fault.until or fault.at + RECOVERY_S
        if outcome.kind == "health" and outcome.status == 503:
            if outcome.ended >= fault.at and outcome.began <= recovered + GRACE_S:
                return True
            continue
        if not fault.loses or fault.model not in ("", outcome.model) or outcome.ended < fault.at:
            continue
        last = recovered if fault.only else fault.at
        if outcome.began <= last + GRACE_S and (fault.only or not fault.model or replica in fault.victims):
            return True
    return False


def logged(book: Book, lines: Iterable[str], faults: Sequence[Fault]) -> tuple[Judgement, dict[str, str]]:
    """Whether the access log has one line for every response; and the replica of each request id.

    The lines of a gateway's last moment are lost when it is killed. Half requests get 408 and have no id of ours.
    """
    seen: Counter[str] = Counter()
    unfinished: set[str] = set()
    replicas: dict[str, str] = {}
    broken = 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            broken += 1
            continue
        seen[entry["id"]] += 1
        if entry.get("status") == 408:
            unfinished.add(entry["id"])
        if "replica" in entry:
            replicas[entry["id"]] = entry["replica"]
    kills = [fault.at for fault in faults if fault.name == "gateway killed"]
    missing = [
        one
        for one, ended in book.answered.items()
        if one not in seen and not any(at - GRACE_S <= ended <= at + GRACE_S for at in kills)
    ]
    doubled = [one for one, count in seen.items() if count > 1]
    foreign = [one for one in seen if one not in book.sent and one not in unfinished]
    detail = (
        f"{len(book.answered)} responses, {len(missing)} without a line; {sum(seen.values())} lines, "
        f"{len(doubled)} ids twice, {len(foreign)} lines of other clients, {broken} broken"
    )
    wrong = [f"no line: {one}" for one in missing] + [f"twice: {one}" for one in doubled]
    sound = not wrong and not broken and not foreign
    return Judgement("the access log has a line for every response", sound, _with(detail, wrong)), replicas


def flat(samples: Sequence[Sample], name: str) -> list[Judgement]:
    """Whether a quantity of each role does not grow in the second half, while all replicas were ready."""
    value, share, least = QUANTITIES[name]
    calm = [sample for sample in samples if sample.calm]
    calm = calm[len(calm) // 2 :]
    judgements = []
    for role in ROLES:
        points = [(sample.at, float(value(sample.roles[role]))) for sample in calm if role in sample.roles]
        title = f"{name} of {role}"
        if len(points) < FEWEST:
            judgements.append(Judgement(title, None, f"{len(points)} samples without a fault, {FEWEST} needed"))
            continue
        growth = slope(points) * (points[-1][0] - points[0][0])
        level = statistics.median(y for _, y in points)
        bound = max(share * level, least)
        unit, scale = ("MiB", 2.0**20) if name == "memory" else ("", 1.0)
        detail = f"{level / scale:.4g} {unit}".rstrip() + f", growth {growth / scale:+.3g}, allowed {bound / scale:.3g}"
        judgements.append(Judgement(title, growth <= bound, detail))
    return judgements


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope of all pairs (Theil and Sen), on which single outliers have no effect."""
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2) if x1 > x0]
    return statistics.median(slopes) if slopes else 0.0


def reaped(samples: Sequence[Sample]) -> Judgement:
    """Whether no process stays a zombie: a dying replica leaves its engine's for some seconds."""
    seen: dict[int, list[float]] = {}
    for sample in samples:
        for pid in sample.zombies:
            seen.setdefault(pid, []).append(sample.at)
    staying = [pid for pid, times in seen.items() if times[-1] - times[0] > ZOMBIE_S]
    detail = f"{len(staying)} zombies for more than {ZOMBIE_S:.0f} s"
    return Judgement("no zombie processes", not staying, _with(detail, map(str, sorted(staying))))


def recovered(faults: Sequence[Fault]) -> Judgement:
    """Whether all replicas were ready again after every fault."""
    never = [fault for fault in faults if not fault.until]
    times = [fault.until - fault.at for fault in faults if fault.until]
    detail = f"{len(times)} of {len(faults)} faults" + (f", the longest took {max(times):.0f} s" if times else "")
    wrong = [f"{fault.name} {fault.model}: not within {RECOVERY_S:.0f} s" for fault in never]
    return Judgement("recovered from every fault", bool(times) and not never, _with(detail, wrong))


def loaded(book: Book, kinds: Sequence[str]) -> Judgement:
    """Whether requests of every kind got their response."""
    never = [kind for kind in kinds if not book.of_kind(kind, "answered") + book.of_kind(kind, "left")]
    total = book.total("answered")
    return Judgement("requests of every kind were answered", not never, _with(f"{total} answered", never))


def idle(busy: float | None) -> Judgement:
    """Whether gateway and engines count no request as running when the load is over."""
    detail = "no metrics" if busy is None else f"{busy:g} requests counted as running or queued"
    return Judgement("no request is left in the counters", busy == 0, detail)


def stopped(wrong: Sequence[str]) -> Judgement:
    """Whether the server ended as it should, with all its processes."""
    return Judgement("nothing is left after the stop", not wrong, _with(f"{len(wrong)} leftovers or errors", wrong))


def _outcome(one: Outcome) -> str:
    what = one.reason or f"refused with {one.status} {one.code}"
    return f"{one.kind}, {one.model or 'no model'}, {one.ended - one.began:.1f} s, id {one.id}: {what}"


def _with(detail: str, wrong: Iterable[str], most: int = 5) -> str:
    listed = list(wrong)
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return "\n".join([detail, *(f"  {line}" for line in [*listed[:most], *more])])


def to_json(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """For results.json."""
    return [vars(judgement) for judgement in judgements]
