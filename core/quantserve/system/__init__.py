"""This machine as a process sees it: folders, variables, limits."""
