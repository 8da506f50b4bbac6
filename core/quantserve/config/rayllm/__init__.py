"""Configs written for RayLLM: old keys and prompt formats."""
