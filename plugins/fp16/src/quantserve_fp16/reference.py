"""What RayLLM published in November 2023 for unquantized Llama-2, as data."""

from __future__ import annotations

from quantserve.api import PublishedRun

RUNS = (
    PublishedRun("Llama-2-7B chat FP16", "llama", 4096, 32, 11008, 32000, "a100-80g", 1, 3212, 362, 18.81, 53.44),
    PublishedRun("Llama-2-13B chat FP16", "llama", 5120, 40, 13824, 32000, "a100-80g", 1, 4371, 644, 31.06, 32.25),
    PublishedRun("Llama-2-70B chat FP16", "llama", 8192, 80, 28672, 32000, "a100-80g", 4, 8048, 1073, 58.1, 17.26),
)
CAVEAT = "measure on your own GPU before deciding"
