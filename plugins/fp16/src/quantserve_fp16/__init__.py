"""Unquantized models for quantserve; the plugin is `quantserve_fp16.plugin`."""
