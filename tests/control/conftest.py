"""What the tests of the control plane share. Nothing here skips: what is missing fails, and says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from control.redis_server import RedisServer
from control.store import Stores


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that do not harm it; each of them has a prefix of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def stores(redis_server: RedisServer) -> Iterator[Stores]:
    made = Stores(redis_server)
    yield made
    made.close()
