"""A client in the terminal: the commands `query`, `chat`, `models` and `evaluate` of quantserve."""
