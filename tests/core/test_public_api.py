from __future__ import annotations

import importlib

import pytest

import agentlightning


def test_the_public_names_are_these() -> None:
    assert sorted(agentlightning.__all__) == [
        "AIR",
        "Batch",
        "Episode",
        "Estimator",
        "LearningSettings",
        "LightTracer",
        "LightningClient",
        "Mode",
        "OTelTracer",
        "Rollout",
        "RolloutContext",
        "RolloutService",
        "Span",
        "Task",
        "Tracer",
        "TrainerBridge",
        "Transition",
        "Worker",
        "__version__",
        "capture_spans",
        "configure",
        "current_rollout",
        "discounted",
        "emit_reward",
        "identical",
        "select_agents",
        "trace",
        "use_rollout",
    ]


@pytest.mark.parametrize("name", agentlightning.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(agentlightning, name)
    assert name == "__version__" or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        agentlightning.nothing  # noqa: B018  # pyright: ignore


def test_every_error_is_in_one_module_and_has_the_one_base() -> None:
    errors = importlib.import_module("agentlightning.errors")
    for value in vars(errors).values():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            assert issubclass(value, errors.AgentLightningError)
            assert value.__doc__
