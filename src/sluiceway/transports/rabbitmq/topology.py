"""What stands at the broker, and how it is named.

```text
topic exchange `sluiceway` ──topic or pattern──▶ direct exchange `sluiceway|group`
    `sluiceway|group` ──topic──▶ queue `sluiceway|group|topic`
                      ──no queue of that topic──▶ topic exchange `sluiceway|group|*` ──▶ queue `sluiceway|group|pattern`
default exchange ──▶ queue `sluiceway|orders.group.dead`: dead letters
headers exchange `sluiceway||delay` ──▶ queue `sluiceway||0.4 s` ──expired──▶ direct exchange `sluiceway||due`
    `sluiceway||due` ──name of a queue──▶ that queue
queue `sluiceway|group|topic|suspects`: suspects of a queue that run alone
queue `sluiceway|group|topic|order`: with `order_by`, what of a queue is away
                     ──no such queue──▶ `sluiceway`, by its topic
```

So within a group the exact topic comes before a pattern, and a delayed message goes to one queue, or to all groups, by
its routing key alone. A group is never unbound: its queues keep what comes while nobody consumes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from msgspec import Struct
from pika.exceptions import ChannelClosedByBroker

from ..._decisions.topics import is_dead_letter_topic, is_pattern
from ...errors import OptionError, TransportError
from .wire import Channel, Connection

log = logging.getLogger("sluiceway")

_ONE_AT_A_TIME = "x-single-active-consumer"
_NO_ORDER = (
    f"%r was made for order_by ({_ONE_AT_A_TIME}), and is consumed without: one process of its group is handed all "
    "that it has, and the others wait; to share it, empty it, stop the group's processes and delete it"
)
STEP = 0.1  # seconds: the lowest rung, and so what a delay may be late by
_MOST_BYTES = 255  # of a name or routing key
_RUNGS = 24
HIGHEST = STEP * 2 ** (_RUNGS - 1)  # seconds, about 9 days; what waits longer goes through it again
_RIPE = 0.5  # seconds; of RabbitMQ 3.10 those that were younger than some milliseconds had no leader ever after
_NEVER = 1_000_000_000  # deliveries: from 4.0 on a server drops a message at its 20th, unless told otherwise


class Declared(Struct, frozen=True):
    """One thing at the broker. `what` is the method that makes it."""

    what: str
    name: str
    arguments: dict[str, Any]

    async def make(self, channel: Channel, *, passive: bool = False) -> Any:
        if self.what == "queue_declare":
            return await channel.ask(self.what, self.name, passive, durable=True, arguments=self.arguments)
        if self.what == "exchange_declare":
            kind = {"exchange_type": self.arguments["type"], "arguments": self.arguments.get("arguments")}
            return await channel.ask(self.what, self.name, passive=passive, durable=True, **kind)
        return None if passive else await channel.ask(self.what, self.name, **self.arguments)


class Names:
    """The names that one transport uses, all with its exchange in front."""

    def __init__(self, exchange: str, queue_type: str) -> None:
        self.exchange = exchange
        self.delay = f"{exchange}||delay"
        self.due = f"{exchange}||due"
        self.queue_type = queue_type

    def group(self, group: str) -> str:
        return f"{self.exchange}|{group}"

    def queue(self, group: str, topic: str) -> str:
        """Where messages of `topic` wait for `group`. All groups share the queue of a dead-letter topic."""
        return f"{self.exchange}|{topic}" if is_dead_letter_topic(topic) else f"{self.exchange}|{group}|{topic}"

    def check(self, group: str, topic: str) -> None:
        """Raises OptionError when the names of the queues of a topic are longer than AMQP allows; `group` is empty for
        a topic that is published to."""
        longest = suspects_of(self.queue(group, topic)) if group else self.queue("", topic)
        if not group and not is_dead_letter_topic(topic):
            longest = topic  # its routing key
        size = len(longest.encode("utf-8", "surrogateescape"))
        if size > _MOST_BYTES:
            what = f"the topic {topic!r}" + (f", the group {group!r}" if group else "")
            raise OptionError(
                f"{longest!r} has {size} bytes, and a name in AMQP has {_MOST_BYTES} at most; "
                f"shorten {what} or the option exchange"
            )

    def dead(self, topic: str) -> list[Declared]:
        """The queue of a dead-letter topic."""
        queue = self.queue("", topic)
        bind = Declared("queue_bind", queue, {"exchange": self.due, "routing_key": queue})
        return [_queue(queue, {"x-queue-type": "quorum", "x-delivery-limit": _NEVER}), bind]

    def suspects(self, queue: str) -> list[Declared]:
        """Where the suspects of a queue wait that run alone. Its messages are only ever taken one at a time, by the
        process that runs it at once: so the broker counts how often a process died with it alone."""
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": _NEVER}
        name = suspects_of(queue)
        return [_queue(name, arguments), Declared("queue_bind", name, {"exchange": self.due, "routing_key": name})]

    def record(self, queue: str) -> list[Declared]:
        """Where it is written down what of a queue is away, for `order_by`: it keeps the newest message only."""
        return [_queue(record_of(queue), {"x-queue-type": "quorum", "x-max-length": 1, "x-delivery-limit": _NEVER})]

    def base(self) -> list[Declared]:
        """What there is before any group."""
        return [
            _exchange(self.exchange, "topic"),
            _exchange(self.delay, "headers"),
            _exchange(self.due, "direct", {"alternate-exchange": self.exchange}),
        ]

    def of_group(self, group: str) -> list[Declared]:
        patterns = f"{self.group(group)}|*"
        return [
            _exchange(patterns, "topic"),
            _exchange(self.group(group), "direct", {"alternate-exchange": patterns}),
        ]

    def of_topic(self, group: str, topic: str, *, ordered: bool = False) -> list[Declared]:
        """The queue of a topic or pattern; bound to its group first, so that nothing reaches the group and no queue.

        With `ordered` it hands out to one consumer at a time; dead letters, which groups share, to all.
        """
        if is_dead_letter_topic(topic):
            return self.dead(topic)
        queue = self.queue(group, topic)
        arguments: dict[str, Any] = {"x-queue-type": self.queue_type}
        if self.queue_type == "quorum":
            arguments["x-delivery-limit"] = _NEVER
        if ordered:
            arguments[_ONE_AT_A_TIME] = True
        inner = f"{self.group(group)}|*" if is_pattern(topic) else self.group(group)
        return [
            _queue(queue, arguments),
            Declared("queue_bind", queue, {"exchange": inner, "routing_key": topic}),
            Declared("queue_bind", queue, {"exchange": self.due, "routing_key": queue}),
            Declared("exchange_bind", self.group(group), {"source": self.exchange, "routing_key": topic}),
        ]

    def rung(self, seconds: float) -> list[Declared]:
        """The queue where messages wait for so many seconds."""
        queue = f"{self.exchange}||{seconds:g} s"
        arguments = {
            "x-queue-type": "quorum",
            "x-message-ttl": round(seconds * 1000),
            "x-dead-letter-exchange": self.due,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        match = {"x-match": "all", RUNG: f"{seconds:g}"}
        bind = {"exchange": self.delay, "routing_key": "", "arguments": match}
        return [_queue(queue, arguments), Declared("queue_bind", queue, bind)]


RUNG = "sluiceway-rung"


def suspects_of(queue: str) -> str:
    """The name of the queue where the suspects of a queue wait."""
    return f"{queue}|suspects"


def record_of(queue: str) -> str:
    """The name of the queue where it is written down what of a queue is away."""
    return f"{queue}|order"


def rung_for(delay: float) -> float:
    """The seconds of the largest rung that is not above `delay`; of the lowest when all are."""
    steps = max(1, int(delay / STEP + 1e-6))
    return float(round(STEP * 2 ** min(steps.bit_length() - 1, _RUNGS - 1), 1))


def _exchange(name: str, kind: str, arguments: dict[str, Any] | None = None) -> Declared:
    return Declared("exchange_declare", name, {"type": kind, "arguments": arguments})


def _queue(name: str, arguments: dict[str, Any]) -> Declared:
    return Declared("queue_declare", name, arguments)


async def declare(connection: Connection, wanted: Iterable[Declared], *, passive: bool) -> list[str]:
    """Make what is not there; with `passive` nothing is made. Returns what is wrong, and how to mend it.

    A quorum queue that was made a moment before its server is killed can be useless ever after. So all queues are made
    first, and nothing leads to them before the new ones are older. Raises TransportError when the connection ends.
    """
    problems: list[str] = []
    channel: Channel | None = None
    made = False
    for one in sorted(wanted, key=lambda one: one.what != "queue_declare"):
        try:
            if made and one.what != "queue_declare":
                await asyncio.sleep(_RIPE)
                made = False
            if channel is None:
                channel = await connection.channel_of_its_own()
            if one.what == "queue_declare" and not passive and not await exists(channel, one.name):
                channel, made = await connection.channel_of_its_own(), True
            await one.make(channel, passive=passive)
        except ChannelClosedByBroker as error:
            channel = None
            if _ONE_AT_A_TIME in error.reply_text and _ONE_AT_A_TIME not in one.arguments:
                log.warning("%s", _NO_ORDER % one.name)
            else:
                problems.append(f"{one.name!r}: {_advice(error)}")
        except Exception as error:
            raise TransportError(f"cannot declare {one.name!r}: {error}") from error
    if channel is not None:
        channel.raw.close()
    return problems


async def exists(channel: Channel, queue: str) -> bool:
    """Whether there is such a queue. When there is not, the broker closes the channel."""
    try:
        await channel.ask("queue_declare", queue, passive=True)
    except ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        return False
    return True


def _advice(error: ChannelClosedByBroker) -> str:
    match error.reply_code:
        case 404:
            return "it is not there; start once with declare=yes to make it, or make it by hand"
        case 406 if _ONE_AT_A_TIME in error.reply_text:
            return (
                f"it was made without order_by, and a queue cannot become {_ONE_AT_A_TIME}; let the group's processes "
                "empty it as they are, stop them, delete the queue and start again; or name another group"
            )
        case 406:
            return (
                f"it is there with other properties ({error.reply_text}); delete it when it is empty, name another "
                "exchange=…, or use it as it is with declare=no"
            )
        case 403:
            return f"the user may not use it ({error.reply_text}); grant configure, write and read, or use declare=no"
        case _:
            return f"{error.reply_code} {error.reply_text}"
