"""The rows over real brokers can be measured, and a case has a server of its own as long as it runs."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

from bench import brokers, servers
from bench.brokers.throughput import by_hand
from bench.child import Job, MeasureFailed, first_core, measure
from bench.pairs import Case, Figure, run_case
from bench.servers import PROGRAMS, server
from sluiceway import App, Message
from tests.servers.server import find

TINY = 0.005  # of the messages


def nothing() -> None:
    return


@pytest.fixture(params=PROGRAMS)
def broker(request: pytest.FixtureRequest) -> str:
    """A broker whose server is installed."""
    name: str = request.param
    find(PROGRAMS[name])
    return name


@pytest.mark.slow
def test_every_row_of_a_broker_can_be_measured(broker: str, tmp_path: Path) -> None:
    cases = [case for case in brokers.CASES if case.server == broker]
    assert len(cases) == (9 if broker == "redis" else 8)  # Redis is held against a bare parser too
    with server(broker, tmp_path) as url:  # one for all: a start takes seconds
        for case in cases:
            ours = measure(case.ours, url=url, scale=TINY)
            limit = measure(case.limit, url=url, scale=TINY) if case.limit is not None else ours
            for figure in case.figures:
                assert ours[figure.key] > 0, figure.case
                assert limit[figure.key] > 0, figure.case


def is_taken(url: str) -> bool:
    port = urlsplit(url).port
    assert port is not None
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def told(url: str, scale: float) -> dict[str, float]:
    """A measure that says which server it was given."""
    port = urlsplit(url).port
    assert port is not None
    return {"rate": float(port), "scale": scale}


def test_a_case_has_a_server_as_long_as_it_runs_and_no_more_pairs_than_it_says() -> None:
    find("redis-server")
    seen: list[bool] = []
    with_server = Case((Figure("a"),), Job("tests.bench.test_brokers:told"), server="redis", most=2)
    outcome = run_case(with_server, 5, lambda: seen.append(True))
    assert outcome.error is None
    assert len(seen) == 2
    assert outcome.rows[0].rate is not None
    assert not is_taken(f"redis://127.0.0.1:{outcome.rows[0].rate:.0f}")


def test_a_server_runs_on_the_core_that_measures_leave_free(tmp_path: Path) -> None:
    find("redis-server")
    with server("redis", tmp_path) as url, Redis.from_url(url) as client:
        assert os.sched_getaffinity(client.info()["process_id"]) == first_core()


def test_a_server_that_is_missing_fails_the_rows_and_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(servers.PROGRAMS, "redis", "no-such-server")
    outcome = run_case(Case((Figure("a"),), Job("tests.bench.test_brokers:told"), server="redis"), 1, nothing)
    assert [row.ok for row in outcome.rows] == [False]
    assert outcome.error == "no-such-server is not installed; on Debian or Ubuntu: apt-get install no-such-server"


@pytest.mark.parametrize("name", ["redis", "nats"])
async def test_what_a_broker_has_handed_out_is_counted_by_itself(name: str, tmp_path: Path) -> None:
    find(PROGRAMS[name])
    with server(name, tmp_path) as url:
        app, free = App(url, group="bench"), asyncio.Event()

        @app.consumer("orders", max_demand=7, concurrency=7)
        async def consume(message: Message[bytes]) -> None:
            await free.wait()

        def count() -> int:
            with by_hand(name).held(url, "orders", "bench") as held:
                return int(held())

        async with app.running() as manager:
            await app.publish_many("orders", [b"x"] * 20)
            deadline = time.monotonic() + 10
            while manager.stats()[0].held < 7:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert await asyncio.to_thread(count) == 7
            free.set()


def test_a_measure_over_a_server_that_is_gone_fails_and_says_why() -> None:
    with pytest.raises(MeasureFailed, match="cannot reach"):
        measure(
            Job("bench.brokers.throughput:ours", {"broker": "redis", "count": 10}), url="redis://127.0.0.1:1", scale=1
        )
