"""End to end through vLLM: prefill and decode speed of every method on one synthetic model, llama.cpp beside them.

    python -m benchmarks.decode [--quick] [--variants bf16,awq] [--threads 1,2]

All engines are started once and wait; each cell of the table is then measured on one after the other, round after
round, so that whatever else happens on the machine meets them alike. Reported are medians over the rounds, and medians
of the ratios to bf16 within a round.
"""
