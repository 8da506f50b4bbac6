"""Measures this machine for `quantserve calibrate`: the heavy side of `quantserve.predict`, it imports torch."""
