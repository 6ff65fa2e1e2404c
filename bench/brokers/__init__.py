"""Rows over real brokers: Redis, NATS and RabbitMQ, each in a server that the bench starts for the case.

redis.py, nats.py, rabbitmq.py   what one writes by hand and well over the fastest client, and what the broker counts
throughput.py                    messages/s: of one process, of two, of publishing
waiting.py                       latency with and without load; many consumers that wait
death.py                         how long what a killed process held takes to be handled
volume.py                        memory, after many messages have passed

What is written by hand uses the groups and messages that ours has made, so both sides have the same at the broker.
`bench.clients` compares the clients; the loops here are over the one that won.
"""

from __future__ import annotations

from ..pairs import Case
from . import death, throughput, volume, waiting

CASES: list[Case] = []
for _broker, _name, _count, _least, _p50, _options, _many in (
    ("redis", "Redis", 60_000, 0.85, 1.0, "?lease=3", 1_000_000),
    ("nats", "NATS", 40_000, 0.95, 1.5, "?lease=3", 1_000_000),
    ("rabbitmq", "RabbitMQ", 20_000, 0.85, 3.0, "?heartbeat=3", 200_000),
):
    CASES += throughput.cases(_broker, _name, count=_count, least=_least)
    CASES += waiting.cases(_broker, _name, count=_count, p50=_p50, options=_options)
    CASES += death.cases(_broker, _name, options=_options)
    CASES += volume.cases(_broker, _name, count=_many)
