"""The one process in front of all models."""
