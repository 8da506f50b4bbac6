"""vLLM's server and engine, and every change made to them; the only package that imports vLLM, besides `calibrate`."""
