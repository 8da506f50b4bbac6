"""Log-probabilities on a CPU do not wait for a compiler."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch

from quantserve.serve.replica.vllm import patches
from quantserve.serve.replica.vllm.token_ranks import ROWS, count_at_least

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("rows", [0, 1, 2, ROWS, ROWS + 1])
def test_ranks_are_those_of_vllms_own_function(rows: int) -> None:
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows)).log_softmax(-1)
    values = x[:, 7:8].clone()
    found = count_at_least(x, values)
    assert found.dtype == torch.int64
    plain = batched_count_greater_than._torchdynamo_orig_callable
    assert torch.equal(found, plain(x, values) if rows else torch.zeros(0, dtype=torch.int64))


def test_vllms_sampler_counts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    monkeypatch.setattr(sampler, "batched_count_greater_than", sampler.batched_count_greater_than)  # to restore it
    assert patches.apply("token-ranks")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiles"))
    logprobs = torch.tensor([[-1.0, -0.5, -3.0], [-0.1, -4.0, -5.0]])
    made = sampler.Sampler.gather_logprobs(logprobs, 2, torch.tensor([2, 0]))
    assert made.selected_token_ranks.tolist() == [3, 1]


def test_calls_of_the_sampler_reach_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    calls = []
    monkeypatch.setattr(
        sampler, "batched_count_greater_than", lambda x, v: calls.append(x.shape) or count_at_least(x, v)
    )
    sampler.Sampler.gather_logprobs(torch.randn(3, 5), 1, torch.tensor([0, 1, 2]))
    assert calls == [(3, 5)]
