import pytest

from tests.support import shared


@pytest.fixture(scope="session")
def server() -> str:
    """A real Prefect server, one for all test processes."""
    return shared.prefect_server()
