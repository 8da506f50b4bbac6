"""The gateway's HTTP server: limits of connections, size and time of requests."""
