"""One gateway for all tests that do not break it: three simulated engines, a server, a real Envoy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.support.forking import AVAILABLE
from tests.support.gateway import Gateway, fast_engines


@pytest.fixture(scope="session", autouse=True)
def copies() -> Iterator[None]:
    """Servers are copies of one process while these tests run."""
    Gateway.copies = AVAILABLE
    yield
    Gateway.copies = False


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with (
        fast_engines(3) as engines,
        Gateway(
            tmp_path_factory.mktemp("gateway"),
            engines=engines,
            config={
                "server": {"max_body_bytes": 1_000_000},
                "engines": {"scrape_interval_ms": 50},
            },
        ) as shared,
    ):
        yield shared


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def http(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(gateway.url, connector=connector) as session:
        yield session


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as official:
        yield official


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
