"""A replica of a model: the Ray Serve deployment around an engine."""
