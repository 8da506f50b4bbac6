"""From a config, a checkpoint and plugins to a plan, and to a ranking of all methods."""
