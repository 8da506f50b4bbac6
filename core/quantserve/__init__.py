"""quantserve: serve quantized LLMs from a config file. Plugin authors import `quantserve.api`."""

__version__ = "0.1.0"
