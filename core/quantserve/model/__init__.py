"""What config.json says about a decoder: sizes, attention, linears, cache, as vLLM derives them."""
