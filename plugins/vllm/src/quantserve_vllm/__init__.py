"""What vLLM serves by itself, for quantserve; the plugin is `quantserve_vllm.plugin`."""
