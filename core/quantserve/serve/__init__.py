"""Serving: the only package that imports Ray; its module `vllm_app` imports vLLM's HTTP server.

``run.serve_plans`` implements `quantserve serve`; ``app.build`` is for `serve run`, `serve deploy` and KubeRay.
Importing this package alone imports neither Ray nor vLLM.
"""
