"""The transport: one virtual host of a RabbitMQ server, as the event loop sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Self

from ..._decisions.topics import check_topic
from ...errors import ConnectError, OptionError, PayloadTooLarge, PublishError, TransportError, Unsupported
from ...message import Outgoing, Stored
from ...source import Subscription
from ...transport import Features, Finding
from .address import Options, address_of, options_of
from .browser import browse_queue, remove_from_queue
from .hub import Hub
from .letters import Letter
from .ordered import OrderedSource
from .source import RabbitMQSource
from .topology import Declared, declare

_SHORT = 100  # characters: with an exchange's name of at most 100, no name is too long then


class RabbitMQTransport:
    """A virtual host of RabbitMQ 3.10 or later: `amqp://user:password@host:port/vhost`, `amqps://` with TLS.

    - `exchange`: the topic exchange that is published to; the names of all else begin with it.
    - `queue_type`: "quorum"; or "classic", which counts no deliveries: what one process after another dies with is
      found later, and a queue lives on one node alone.
    - `declare`: make what is missing. False: somebody else makes it all, and what is not there is an error.
    - `heartbeat`: seconds without a sign of life after which a connection is lost.
    - `timeout`: seconds to wait for a connection, for confirms, and for a broker that takes no messages.
    - `max_payload`: bytes, the most one body may have; the server has its own `max_message_size`.
    - `ca_file`, `cert_file`, `key_file`: for TLS, in PEM; without `ca_file` those that the system trusts.
      `server_name`: whom the server's certificate must name, unless that is the host.

    Raises OptionError for a value that is not allowed; the connection is opened by `connect`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        unknown = set(options) - set(Options.__struct_fields__)
        if unknown:
            raise OptionError(f"RabbitMQTransport: there is no option {min(unknown)!r}")
        self._options = Options(**{**options_of(url), **options})
        self.features = Features(
            durable=True,
            retains=False,
            order="process",
            delay="ladder",
            atomic=False,
            park=True,
            release=True,
            lease=False,
            max_payload=self._options.max_payload,
            wildcards=True,
            browse=True,
            backlog=True,
        )
        self._hub = Hub(address_of(url, self._options), self._options)
        self._connecting = asyncio.Lock()
        self._sources: list[RabbitMQSource] = []

    def __repr__(self) -> str:
        return f"RabbitMQTransport({self._hub.address.place!r})"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for `amqp://user:password@host:port/vhost?heartbeat=10`. Raises OptionError."""
        return cls(url)

    async def connect(self) -> None:
        """Connect, and make the exchanges. Idempotent. Raises ConnectError that says what to do."""
        async with self._connecting:
            problems = await self._hub.open()
        if problems:
            await self._hub.close(kept=False)
            raise ConnectError(f"RabbitMQ at {self._hub.address.place} is not as it must be: {'; '.join(problems)}")

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the groups' queues, or say what is missing. Raises OptionError for a topic that cannot be."""
        findings: list[Finding] = []
        if self._options.queue_type == "classic":
            text = (
                "classic queues do not count how often a message came back, so one that kills its processes is found "
                "later, and they live on one node alone; use queue_type=quorum"
            )
            findings.append(Finding("warning", text))
        for subscription in subscriptions:
            self._check(subscription)
            if subscription.window < len(subscription.topics):
                text = (
                    f"group {subscription.group!r} has {len(subscription.topics)} topics and a window of "
                    f"{subscription.window}: the broker pushes one message of each; raise max_demand"
                )
                findings.append(Finding("warning", text))
        wanted = self._hub.wanted(*subscriptions)
        problems = await self._hub.io.run(self._declare(wanted, passive=self._hub.passive or not create))
        findings += [Finding("error", problem) for problem in problems]
        pairs = [(subscription.group, topic) for subscription in subscriptions for topic in subscription.topics]
        if create:
            for group, topic in pairs:
                self._hub.topics.setdefault(group, set()).add(topic)
        if create and not problems:
            self._hub.ready.update(self._hub.names.queue(group, topic) for group, topic in pairs)
        return findings

    async def _declare(self, wanted: Sequence[Declared], *, passive: bool) -> list[str]:
        connection = await self._hub.connect()
        try:
            return await declare(connection, wanted, passive=passive)
        finally:
            connection.end()

    # -- publishing

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish, in order; every message is confirmed when it returns.

        Raises PayloadTooLarge, and OptionError for a topic that cannot be, before anything is sent; PublishError with
        what is not confirmed: no group has the topic, a queue is full, the broker is out of reach or takes nothing.
        """
        self._check_sizes(messages)
        for message in messages:
            check_topic(message.topic, pattern=False)
            if len(message.topic) > _SHORT:
                self._hub.names.check("", message.topic)
        letters: list[Letter] = []
        sent: list[Outgoing] = []
        reasons: list[str] = []
        failed: list[Outgoing] = []
        until = time.monotonic() + self._hub.timeout
        for message in messages:
            try:
                if failed and time.monotonic() > until:
                    raise TransportError(reasons[-1])
                letters.append(await self._hub.letter(message))
                sent.append(message)
            except (ValueError, TransportError) as error:
                failed.append(message)
                reasons.append(str(error))
        failures = await self._hub.send(letters)
        if failures or failed:
            gone = {id(message) for message in failed} | {id(sent[index]) for index in failures}
            reasons += [failure.text for failure in failures.values()]
            lost = [message for message in messages if id(message) in gone]
            raise PublishError.unconfirmed(lost, len(messages), reasons[0])

    def _check_sizes(self, messages: Sequence[Outgoing]) -> None:
        limit = self.features.max_payload
        large = [message for message in messages if len(message.body) > limit]
        if large:
            raise PayloadTooLarge(
                f"message {large[0].id} to {large[0].topic!r} has a body of {len(large[0].body)} bytes and the limit "
                f"is {limit} (max_payload of the RabbitMQ transport); nothing of the call was published",
                large,
            )

    # -- receiving

    async def subscribe(self, subscription: Subscription) -> RabbitMQSource:
        """Open a source. The group exists when this returns. Raises OptionError for a topic that cannot be, and
        Unsupported for a start at a time."""
        self._check(subscription)
        self._hub.topics.setdefault(subscription.group, set()).update(subscription.topics)
        source = (RabbitMQSource if subscription.order_by is None else OrderedSource)(self._hub, subscription)
        await source.open()
        self._sources = [other for other in self._sources if not other.closed or other.kept]
        self._sources.append(source)
        return source

    def _check(self, subscription: Subscription) -> None:
        group = subscription.group
        if isinstance(subscription.start, datetime):
            raise Unsupported(
                f"group {group!r} cannot start at a time: RabbitMQ keeps nothing for a group before it is made"
            )
        if not subscription.topics:
            raise OptionError(f"the subscription of group {group!r} names no topic")
        for topic in subscription.topics:
            check_topic(topic, pattern=True)
            self._hub.names.check(group, topic)

    # -- messages at rest

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The first 10,000 dead letters of `topic`, oldest first, from behind position `after`.

        They are taken from their queue and put back at once; while that goes on, nobody else sees them. Before RabbitMQ
        4.3 each look counts as a delivery. A topic whose last word is not `dead` shows what waits for each group that
        this process knows of.
        """
        check_topic(topic, pattern=False)
        for queue in self._hub.queues_of(topic):
            for stored in await self._hub.io.run(browse_queue(self._hub.connect, queue, topic, after)):
                yield stored

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed. One that is gone is no error."""
        by_topic: dict[str, set[str]] = {}
        for one in stored:
            by_topic.setdefault(one.topic, set()).add(one.position)
        for topic, positions in by_topic.items():
            for queue in self._hub.queues_of(topic):
                await self._hub.io.run(remove_from_queue(self._hub.connect, queue, topic, positions))

    async def aclose(self) -> None:
        """Close the sources that are still open, and all connections. Idempotent."""
        kept = False
        for source in self._sources:
            await source.aclose()
            kept = kept or source.kept
        self._sources.clear()
        await self._hub.close(kept=kept)
