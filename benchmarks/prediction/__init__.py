"""Predictions of this machine beside what vLLM takes on it: methods, sizes and numbers of clients."""
