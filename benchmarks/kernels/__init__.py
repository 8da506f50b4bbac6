"""Layer by layer: the kernels of quantserve-kernels beside torch's bf16 linear, vLLM's CPU operators and the memory.

    python -m benchmarks.kernels [--quick] [--models 7b,13b,70b] [--threads 1,2]

Everything that is compared runs in one process and alternates call by call, each call on the next of its own copies of
the weight, which together exceed the cache. Reported are medians over the rounds, and medians of the ratios within a
round. `python -m benchmarks.kernels.experts` does the same for the experts of a mixture.
"""
