"""The cause of a failed start, found in what vLLM's processes log."""

from __future__ import annotations

from quantserve.serve.replica.vllm.startup_logs import last_cause

LOG = """\
(EngineCore pid=7) ERROR 11-24 03:55:50 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-24 03:55:50 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-24 03:55:50 [core.py:1510]   File "/x/core.py", line 1, in run
(EngineCore pid=7) ERROR 11-24 03:55:50 [core.py:1510]     raise ValueError("no")
(EngineCore pid=7) ERROR 11-24 03:55:50 [core.py:1510] torch.OutOfMemoryError: tried to allocate 3 GiB
RuntimeError: Engine core initialization failed. See root cause above.
Traceback (most recent call last):
KeyError: '/psm_c82d78eb'
"""


def test_the_engines_own_record_counts() -> None:
    assert last_cause(LOG) == "torch.OutOfMemoryError: tried to allocate 3 GiB"


def test_without_log_records_the_printed_exception_counts() -> None:
    assert last_cause(LOG.replace(" ERROR ", " ")) == "KeyError: '/psm_c82d78eb'"
    assert last_cause("INFO all is well\nRuntimeError: Engine core initialization failed.") is None
    assert len(last_cause("ValueError: " + "x" * 10_000) or "") == 600
