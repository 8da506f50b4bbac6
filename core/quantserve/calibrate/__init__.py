"""Measures this machine for `quantserve calibrate`: the heavy side of `quantserve.performance`, it imports torch."""
