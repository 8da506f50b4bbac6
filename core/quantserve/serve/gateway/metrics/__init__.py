"""Prometheus metrics of the gateway and of all replicas."""
