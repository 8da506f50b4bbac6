"""How many replicas a load needs, from what the replicas report."""

from __future__ import annotations

from types import SimpleNamespace

from quantserve.serve.replica.autoscaling import LEASE_S, QueueReports, replicas_for_load


def needed(target: float = 2, others: float = 0, **reported: list[float]) -> int:
    metrics = {name: dict(enumerate(values)) for name, values in reported.items()}
    config = SimpleNamespace(target_ongoing_requests=target)
    context = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=others, config=config, policy_state={})
    return replicas_for_load(context)[0]


def test_requests_in_the_gateways_queue_count_once_however_many_replicas_report_them() -> None:
    assert needed(ongoing=[2.0]) == 1
    assert needed(ongoing=[2.0], queued=[6.0]) == 4
    assert needed(ongoing=[2.0, 2.0, 2.0], queued=[6.0, 6.0, 5.0]) == 6
    assert needed() == 0
    assert needed(others=1) == 1  # a request that wakes a model from zero
    assert needed(ongoing=[3.0], queued=[]) == 2


def test_queues_of_several_gateways_add_up_and_expire() -> None:
    now = 100.0
    reports = QueueReports(lambda: now)
    assert reports.total == 0
    reports.add("a", 5)
    reports.add("b", 3)
    reports.add("a", 4)
    assert reports.total == 7
    now += LEASE_S - 1
    reports.add("b", 2)
    assert reports.total == 6
    now += 2  # gateway a was replaced
    assert reports.total == 2
    for number in range(10_000):
        now += 1
        reports.add(f"gateway-{number}", 1)
    assert reports.total <= LEASE_S
