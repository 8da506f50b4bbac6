"""The replicas of each model: discovery, admission, queue, choice, proxy."""
