"""The brokers of the matrix. Their servers keep what they accept on disk; what a cell leaves behind harms no other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import apsw

from tests.servers.server import Server

from .broker import Broker

T = TypeVar("T")


class SQLite(Broker):
    name = "sqlite"
    is_server = False
    hold = 2.0

    @property
    def path(self) -> Path:
        return self.folder / "jobs.db"

    def url(self, port: int | None) -> str:
        return f"sqlite:///{self.path}?lease={self.hold:g}"

    def version(self) -> str:
        return f"SQLite {apsw.sqlite_lib_version()}"

    def freeze(self, pid: int) -> None:
        while True:
            os.kill(pid, signal.SIGSTOP)
            with contextlib.suppress(apsw.BusyError), self.locked():
                return
            os.kill(pid, signal.SIGCONT)  # it was within a transaction: with that open nobody could write

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        db = apsw.Connection(str(self.path))
        try:
            db.execute("BEGIN IMMEDIATE")
            yield
        finally:
            db.close()


class Redis(Broker):
    name = "redis"
    hold = 3.0
    deletes = frozenset({"topic", "group"})
    fills = True
    locks_out = True

    def make_server(self) -> Server:
        from tests.servers.redis import RedisServer

        return RedisServer(self.folder / "redis", {"requirepass": "right"})

    def url(self, port: int | None) -> str:
        return f"redis://:right@127.0.0.1:{port}?lease={self.hold:g}"

    def version(self) -> str:
        return f"Redis {self._client().info('server')['redis_version']}"

    def _client(self) -> Any:
        import redis

        return redis.Redis(port=self.port or 0, password="right", decode_responses=True, protocol=2)

    def delete_topic(self, topic: str) -> int:
        deleted: int = self._client().delete(topic)
        return deleted

    def delete_group(self, topic: str) -> int:
        client = self._client()
        return sum(client.xgroup_destroy(topic, group["name"]) for group in client.xinfo_groups(topic))

    def fill(self, topic: str) -> None:
        self._client().config_set("maxmemory", "1kb")

    def free(self, topic: str) -> None:
        self._client().config_set("maxmemory", "0")

    def lock_out(self) -> None:
        self._client().config_set("requirepass", "wrong")

    def let_in(self) -> None:
        import redis

        redis.Redis(port=self.port or 0, password="wrong").config_set("requirepass", "right")


class NATS(Broker):
    name = "nats"
    hold = 3.0
    forgets = 5.0
    deletes = frozenset({"topic", "group"})
    fills = True
    locks_out = True

    def make_server(self) -> Server:
        from tests.servers.nats import NATSServer

        return NATSServer(self.folder / "nats", _users("right"))

    def url(self, port: int | None) -> str:
        return f"nats://jobs:right@127.0.0.1:{port}?lease={self.hold:g}"

    def version(self) -> str:
        async def version(client: Any, js: Any) -> str:
            version = client.connected_server_version
            return f"NATS {version.major}.{version.minor}.{version.patch}"

        return self._asked(version)

    def _asked(self, question: Callable[[Any, Any], Awaitable[T]]) -> T:
        """What `question(client, jetstream)` returns."""
        import nats

        async def ask() -> T:
            url = f"nats://admin:admin@127.0.0.1:{self.port}"
            client = await nats.connect(url, allow_reconnect=False)
            try:
                return await question(client, client.jetstream())
            finally:
                await client.close()

        return asyncio.run(ask())

    def delete_topic(self, topic: str) -> int:
        async def delete(client: Any, js: Any) -> int:
            return int(await js.delete_stream(await js.find_stream_name_by_subject(topic)))

        return self._asked(delete)

    def delete_group(self, topic: str) -> int:
        async def delete(client: Any, js: Any) -> int:
            stream = await js.find_stream_name_by_subject(topic)
            return sum([await js.delete_consumer(stream, one.name) for one in await js.consumers_info(stream)])

        return self._asked(delete)

    def fill(self, topic: str) -> None:
        self._limit(topic, full=True)

    def free(self, topic: str) -> None:
        self._limit(topic, full=False)

    def _limit(self, topic: str, *, full: bool) -> None:
        async def limit(client: Any, js: Any) -> None:
            info = await js.stream_info(await js.find_stream_name_by_subject(topic))
            await js.update_stream(info.config, max_msgs=info.state.messages if full else -1, discard="new")

        self._asked(limit)

    def lock_out(self) -> None:
        self._reload("wrong")

    def let_in(self) -> None:
        self._reload("right")

    def _reload(self, password: str) -> None:
        """Change the server's configuration while it runs. It closes the connections of users that have changed."""
        assert self.server is not None
        assert self.server.process is not None
        path = self.server.folder / "nats.conf"
        path.write_text(json.dumps({**json.loads(path.read_text()), **_users(password)}))
        os.kill(self.server.process.pid, signal.SIGHUP)


def _users(password: str) -> dict[str, Any]:
    users = [{"user": "jobs", "password": password}, {"user": "admin", "password": "admin"}]
    return {"authorization": {"users": users}}


class RabbitMQ(Broker):
    name = "rabbitmq"
    hold = 4.0  # two heartbeats
    rests = 25.0
    deletes = frozenset({"topic"})
    fills = True
    locks_out = True

    def make_server(self) -> Server:
        from tests.servers.rabbitmq import RabbitMQServer

        self._rabbit = RabbitMQServer(self.folder / "rabbitmq")
        return self._rabbit

    def url(self, port: int | None) -> str:
        return f"amqp://guest:guest@127.0.0.1:{port}/%2F?heartbeat=2"

    def version(self) -> str:
        return f"RabbitMQ {self._rabbit.control('version').strip()}"

    def delete_topic(self, topic: str) -> int:
        names = [str(row["name"]) for row in self._rabbit.rows("queues", "name")]
        queues = [name for name in names if topic in name and not name.endswith(".dead")]
        for name in queues:
            self._rabbit.control("delete_queue", name)
        return len(queues)

    def fill(self, topic: str) -> None:
        self._rabbit.control("set_vm_memory_high_watermark", "absolute", "1")

    def free(self, topic: str) -> None:
        self._rabbit.control("set_vm_memory_high_watermark", "0.4")

    def lock_out(self) -> None:
        self._rabbit.control("change_password", "guest", "wrong")

    def let_in(self) -> None:
        self._rabbit.control("change_password", "guest", "guest")


class SQLiteInOrder(SQLite):
    name = "sqlite, in order"
    ordered = True


class RedisInOrder(Redis):
    name = "redis, in order"
    ordered = True


class NATSInOrder(NATS):
    name = "nats, in order"
    ordered = True
    workers = 1


class RabbitMQInOrder(RabbitMQ):
    name = "rabbitmq, in order"
    ordered = True
    workers = 1


BROKERS: tuple[type[Broker], ...] = (
    SQLite, SQLiteInOrder, Redis, RedisInOrder, NATS, NATSInOrder, RabbitMQ, RabbitMQInOrder,
)  # fmt: skip
