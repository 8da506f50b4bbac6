"""What RayLLM published in November 2023 for AWQ Llama-2, as data."""

from __future__ import annotations

from quantserve.api import PublishedRun

RUNS = (
    PublishedRun("Llama-2-7B chat AWQ W4A16", "llama", 4096, 32, 11008, 32000, "a100-80g", 1, 4148, 994, 21.76, 47.09),
    PublishedRun(
        "Llama-2-13B chat AWQ W4A16", "llama", 5120, 40, 13824, 32000, "a100-80g", 1, 5626, 1695, 41.35, 24.48
    ),
    PublishedRun("Llama-2-70B chat AWQ W4A16", "llama", 8192, 80, 28672, 32000, "a100-80g", 4, 9902, 2174, 69.64, 14.4),
)
CAVEAT = "it had no Marlin kernels, and nearly all of AWQ's loss there is TTFT"
