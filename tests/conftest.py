"""For all tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _short_probe() -> Iterator[None]:
    """Every summary of a command measures the rate of a large product; here one product is enough."""
    from dpocli.scoring import throughput

    before = throughput.PROBE_SECONDS
    throughput.PROBE_SECONDS = 0.0
    yield
    throughput.PROBE_SECONDS = before
