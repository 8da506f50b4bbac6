"""Plugins: the contract of their hooks, the guard they run under, and the registry of those installed."""
