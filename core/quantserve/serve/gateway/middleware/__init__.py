"""The layers every request passes: trace, CORS, API keys, limits."""
