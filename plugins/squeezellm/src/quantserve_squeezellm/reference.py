"""What RayLLM published in November 2023 for SqueezeLLM Llama-2, as data."""

from __future__ import annotations

from quantserve.api import PublishedRun

RUNS = (
    PublishedRun(
        "Llama-2-7B SqueezeLLM W4A16", "llama", 4096, 32, 11008, 32000, "a100-80g", 1, 42372, 13857, 109.77, 9.13
    ),
    PublishedRun(
        "Llama-2-13B SqueezeLLM W4A16", "llama", 5120, 40, 13824, 32000, "a100-80g", 1, 64293, 21676, 628.71, 5.6
    ),
)
CAVEAT = "its SqueezeLLM kernel went through the batch one request after the other"
