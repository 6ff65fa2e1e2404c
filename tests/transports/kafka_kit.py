"""What the tests of the Kafka transport share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

from confluent_kafka import Producer, TopicCollection

from sluiceway._decisions.commit_metadata import decode
from sluiceway.testing.acceptance import Broker
from sluiceway.transports.kafka import KafkaTransport
from tests.servers.kafka import Kafka, committed
from tests.servers.proxy import Proxy

_numbers = itertools.count(1)

SESSION = 1.0  # seconds after which a member that was killed is out


class KafkaBroker(Broker):
    """One server for all tests, each with names of its own, behind a proxy that can cut its connections."""

    name = "kafka"
    moment = 0.4  # a member joins, and a record is fetched, in less
    step = 0.2
    soon = 15.0

    def __init__(self, server: Kafka, proxy: Proxy | None = None) -> None:
        self.server = server
        self.proxy = proxy
        self.prefix = f"p{next(_numbers)}."

    def client(self) -> KafkaTransport:
        return KafkaTransport(f"127.0.0.1:{self.server.advertised}", prefix=self.prefix, session_timeout=SESSION)

    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.server.advertised}?prefix={self.prefix}&session_timeout={SESSION}"

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = {}) -> None:
        await asyncio.to_thread(self._publish, topic, body, dict(headers))

    def _publish(self, topic: str, body: bytes, headers: dict[str, str | bytes | None]) -> None:
        producer = Producer({**self.server.client(), "log_level": 2})
        producer.produce(self.prefix + topic, body, headers=headers)
        assert producer.flush(10) == 0

    async def held(self, topic: str, group: str) -> int:
        """The most that may be in hand, as it is committed before anything is."""
        return await asyncio.to_thread(self._held, self.prefix + topic, self.prefix + group)

    def _held(self, topic: str, group: str) -> int:
        admin = self.server.admin()
        described = admin.describe_topics(TopicCollection([topic]))[topic].result()
        found = committed(admin, group, topic)
        return 0 if found is None else decode(found[1], found[0], f"{described.topic_id} 0").window

    async def interrupt(self) -> None:
        assert self.proxy is not None
        await asyncio.to_thread(self.proxy.cut)

    async def restart(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)
