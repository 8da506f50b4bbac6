"""Serving: the only package that imports Ray, and in one module of it vLLM's HTTP server.

``run.serve_plans`` is `quantserve serve`; ``app.build`` is the same for `serve run`, `serve deploy` and KubeRay.
Importing this package alone imports neither.
"""
