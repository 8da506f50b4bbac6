"""AWQ for quantserve; the light module is `quantserve_awq.plugin`."""
