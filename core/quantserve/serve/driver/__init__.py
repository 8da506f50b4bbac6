"""The command `quantserve serve`: the socket, Ray, child processes, progress, shutdown."""
