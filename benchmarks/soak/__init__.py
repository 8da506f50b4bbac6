"""A soak: a server under mixed load for an hour, a fault every minute, and judgements on what was lost or leaked."""
