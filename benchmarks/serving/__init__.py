"""The serving path under load: `quantserve serve` beside vLLM's own server and Ray Serve LLM, same engine arguments.

    python -m benchmarks.serving [--quick] [--paths bare,one] [--shapes demo] [--concurrency 1,16] [--rounds 3]

vLLM's server stays up while one other server after the other stands beside it; each cell is then measured on both in
turns, round after round, one server at work and the others idle. Reported are medians over the rounds of the ratios to
vLLM's server within a round, and the worst round.
"""
