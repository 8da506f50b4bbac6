"""What the tests of the explorer share: a browser, and a gateway with prepared replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import chromium, watched_page
from quantserve.config import load_object
from quantserve.planning.compose import compose
from quantserve.planning.plan import Plan, make_plans
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

from .gateway import Served, served
from .models import ANSWER, FakeModel, words

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
NAMES = ("demo-fp16", "org/demo-int4", "demo-plain")
PARTING = words(ANSWER).index(" each")

browser = pytest.fixture(scope="module")(chromium)


@pytest.fixture(scope="session")
def plans() -> dict[str, Plan]:
    """Plans of three models by id, all of the demo checkpoint."""
    models = [
        {
            "engine_config": {
                "model_id": name,
                "hf_model_id": str(DEMO / "checkpoint"),
                "model_description": f"the demo model as {name}",
                "max_total_tokens": 512,
            },
            "scaling_config": {"num_gpus_per_worker": 0},
        }
        for name in NAMES
    ]
    config = load_object({"models": models}, "tests")
    registry, target = Registry.load({}), find_target("cpu")
    made = make_plans([compose(model, registry, target) for model in config.models])
    return {plan.model_id: plan for plan in made}


def replicas() -> dict[str, FakeModel]:
    """One that others are compared with, one that parts from it at the token `PARTING`, and one without a template."""
    return {
        "demo-fp16": FakeModel(rivals={PARTING: {" each": 0.52, " the": 0.41}}),
        "org/demo-int4": FakeModel(
            ANSWER.replace("each given string", "the items of the list"),
            sure=0.8,
            rivals={PARTING: {" the": 0.55, " each": 0.39}},
        ),
        "demo-plain": FakeModel("Joins them.", template=False),
    }


@pytest.fixture(scope="module")
def serve(plans: dict[str, Plan]) -> Iterator[Callable[..., Served]]:
    """Serves models until the end of the module; arguments as of `gateway.served`."""
    with ExitStack() as stack:
        yield lambda models=None, plans=plans, **options: stack.enter_context(
            served(plans, models or replicas(), **options)
        )


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page at an address; it is watched until the end of the test. Arguments as of Playwright's new_context."""
    with ExitStack() as stack:

        def open_page(base: str, path: str = "/", refused: set[int] | None = None, **options: Any) -> Any:
            page, watched = stack.enter_context(watched_page(browser, base, **options))
            watched.refused = refused or set()
            page.goto(base + path)
            return page

        yield open_page
