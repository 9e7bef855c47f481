"""One Ray for the whole test run; a pipeline that a test runs in this process joins it."""

from collections.abc import Iterator

import pytest

from rlhf_ray.distributed.placement import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray of the tests' own with four logical cores."""
    with Cluster("local", num_cpus=4, start_timeout_s=120, call_timeout_s=300) as session:
        yield session
