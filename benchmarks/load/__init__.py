"""The load generator: what it costs itself, whether it agrees with vLLM's, and the demo model under load."""
