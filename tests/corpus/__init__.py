"""A corpus of public checkpoints: their configs, file lists and tensor headers, and what vLLM makes of each."""
