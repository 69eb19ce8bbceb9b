"""Settings and fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tardkd",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tardkd")


@pytest.fixture(autouse=True)
def keep_threads():
    """A run sets torch's threads; the next test should not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which teacher, baseline and distilled of the tiny recipe have been trained once; do not change it."""
    from train.recipe import recipe

    from tardkd.train.loop import train

    output = tmp_path_factory.mktemp("runs")
    for role in ("teacher", "baseline", "distilled"):
        train(recipe(output).for_role(role))
    return output
