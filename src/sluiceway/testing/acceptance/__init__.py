"""The acceptance suite of transports: what every one must do, switched by the `features` that it declares.

A test module of a transport imports the tests, and gives them its broker:

    from sluiceway.testing.acceptance import *  # noqa: F403
    from sluiceway.testing.acceptance import Broker

    class MyBroker(Broker):
        name = "mine"

        def client(self): return MyTransport(...)

    @pytest.fixture
    def broker(tmp_path): return MyBroker(...)

Needs pytest, and no async plugin. Tests of the two contracts: `receiving`, `settling`, `deaths` (leases and killed
processes), `groups`, `topics`, `ordering`, `publishing`, `at_rest`. Tests of whole pipelines over the transport:
`pipelines`, `draining`, `processes` (that are killed), `outages`, `bad_input`, `dead_letters` (`sluiceway dlq`). Beside
them `brokers` (what is to be written), `kit` (the hands of a test), `guarantees` (what each test shows) and `report`
(the table of guarantees and transports).
"""

from __future__ import annotations

from . import (
    at_rest,
    bad_input,
    dead_letters,
    deaths,
    draining,
    groups,
    ordering,
    outages,
    pipelines,
    processes,
    publishing,
    receiving,
    settling,
    topics,
)
from .brokers import Broker
from .guarantees import guarantee
from .kit import Kit

_MODULES = (
    receiving, settling, deaths, groups, topics, ordering, publishing, at_rest,
    pipelines, draining, processes, outages, bad_input, dead_letters,
)  # fmt: skip
TESTS = {name: test for module in _MODULES for name, test in vars(module).items() if name.startswith("test_")}
globals().update(TESTS)

__all__ = ["TESTS", "Broker", "Kit", "guarantee", *TESTS]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]
