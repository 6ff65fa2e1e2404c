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
for _broker, _name, _alive, _count, _least, _p50, _many in (
    ("redis", "Redis", "lease", 60_000, 0.85, 1.0, 1_000_000),
    ("nats", "NATS", "lease", 40_000, 0.95, 1.5, 1_000_000),
    ("rabbitmq", "RabbitMQ", "heartbeat", 20_000, 0.85, 3.0, 200_000),
):
    CASES += throughput.cases(_broker, _name, count=_count, least=_least)
    CASES += waiting.cases(_broker, _name, count=_count, p50=_p50, alive=_alive)
    CASES += death.cases(_broker, _name, alive=_alive)
    CASES += volume.cases(_broker, _name, count=_many)
