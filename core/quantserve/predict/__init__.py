"""Expected performance: a roofline per engine step, the scheduler's steps in order, and what was measured before.

`prediction.predict` turns the shape of a model, the numbers of a machine and a workload into latencies. Everything here
is plain arithmetic on headers; nothing imports torch.
"""
