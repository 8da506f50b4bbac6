"""`import_path: quantserve.serve.app:build`: the models of a config as one Ray Serve application.

For `serve run`, `serve deploy` and KubeRay:

    applications:
      - name: quantserve
        route_prefix: /
        import_path: quantserve.serve.app:build
        args:
          models: [models/demo.yaml]
          target: a100-80g        # the hardware to check for; default: the machine that builds the application
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray.serve import Application

from quantserve.config import AppConfig, load_object
from quantserve.errors import ConfigError, FindingsError
from quantserve.finding import Finding
from quantserve.planning.compose import compose
from quantserve.planning.plan import Plan, make_plans, refusal
from quantserve.plugins.registry import Registry
from quantserve.serve.driver.ray_cluster import cluster_secret
from quantserve.serve.gateway.app import check_routes, describe_models
from quantserve.serve.gateway.deployment import gateway_application
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.replica.deployment import model_application
from quantserve.serve.replica.vllm import patches
from quantserve.target import Target, find_target

logger = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> Application:
    """Check and plan the models in `args` and build one application for all of them.

    Args:
        args: an app config (``models``, ``http``), and ``target``: the hardware to check for. The address comes
            from Ray Serve; everything else in ``http`` counts.

    Raises:
        QuantserveError: as `quantserve check` reports it, with every error finding.
    """
    args = dict(args)
    target = args.pop("target", None)
    if target is not None and not isinstance(target, str):
        raise ConfigError(f"serve args: target must be text, got {target!r}")
    config = load_object(args, "serve args")
    plans = plan_all(config, find_target(target))
    for plan in plans:
        for risk in patches.risks({**os.environ, **plan.runtime_env["env_vars"]}):
            logger.warning("%s: %s", plan.model_id, risk)
    policy = Policy.of(config.http)
    token, created = cluster_secret()
    children = {plan.model_id: model_application(plan, token, loopback=False) for plan in plans}
    models = describe_models(plans, created, policy)
    explorer = config.explorer.model_dump(mode="json")
    return gateway_application(models, children, token, policy.model_dump(mode="json"), explorer)


def plan_all(config: AppConfig, target: Target) -> list[Plan]:
    """Plan every model of a config.

    Raises:
        FindingsError: at least one model is refused; the message has all error findings.
        QuantserveError: a model cannot be composed.
    """
    if not config.models:
        raise ConfigError("serve args: no models\n  fix: list at least one model file, hub id or model under `models`")
    registry = Registry.load()
    compositions = [compose(model, registry, target) for model in config.models]
    refused = {c.model.model_id: list(c.errors) for c in compositions if c.errors or c.method is None}
    if refused:
        lines = [_line(finding) for findings in refused.values() for finding in findings]
        raise FindingsError("\n".join([str(refusal(refused)), *lines]), refused)
    plans = make_plans(compositions)
    check_routes(plans)
    return plans


def _line(finding: Finding) -> str:
    shown = ", ".join(finding.offenders[:3])
    return f"  {finding.code}: {finding.message}" + (f" ({shown})" if shown else "")
