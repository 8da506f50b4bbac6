"""The protocol between gateway and replica; both ends."""
