"""Publishing: in order, confirmed by all replicas in sync, many in flight."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, Producer

from ...errors import PayloadTooLarge, PublishError, TransportError
from ...message import Outgoing
from .settings import RESERVE, Settings
from .topics import Topics
from .wire import Headers, key_bytes, topic_name, write_headers

log = logging.getLogger("sluiceway.kafka")

_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)


_FINAL = (
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_EXCEPTION,
)


class Refusal(NamedTuple):
    """Why a record was not taken. `final`: trying again does not help until someone changes something."""

    why: str
    final: bool


class Parcel(NamedTuple):
    """A record that goes out, and the message that it is of."""

    name: str
    body: bytes
    key: bytes | None
    headers: Headers
    message: Outgoing


class _Call:
    """The records of one call; `done` has why each was refused, None for those that are stored."""

    def __init__(self, count: int) -> None:
        self.refused: list[KafkaError | None] = [None] * count
        self._left = count
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[KafkaError | None]] = self._loop.create_future()

    def ended(self, number: int, error: KafkaError | None) -> None:
        """Called by the thread of the producer, once for each."""
        self.refused[number] = error
        self._left -= 1
        if not self._left:
            try:
                self._loop.call_soon_threadsafe(self._finish)
            except RuntimeError:  # the loop is closed
                log.debug("nobody waits for a publish any more")

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(self.refused)


class Publisher:
    def __init__(self, settings: Settings, topics: Topics) -> None:
        self._settings = settings
        self._topics = topics
        self.error: str | None = None
        self._told = 0.0
        self._producer = Producer({**settings.producer(), "error_cb": self._on_error})
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="sluiceway-kafka publisher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended or len(self._producer):
            self._producer.poll(0.2)
            if self._ended:
                self._producer.flush(5)
                return

    def _on_error(self, error: KafkaError) -> None:
        self.error = str(error.str())
        if time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            log.warning("publishing to Kafka: %s; the client connects again by itself", self.error)

    def parcels(self, messages: Sequence[Outgoing]) -> list[Parcel]:
        """What goes over the wire. Raises OptionError, and PayloadTooLarge for what does not fit."""
        now = time.time()
        parcels: list[Parcel] = []
        for message in messages:
            headers = write_headers(message, due=now + message.delay if message.delay > 0 else 0.0)
            name = topic_name(self._settings.prefix, message.topic)
            parcels.append(Parcel(name, message.body, key_bytes(message.key), headers, message))
        self.check(parcels)
        return parcels

    def check(self, parcels: Sequence[Parcel]) -> None:
        """Raise PayloadTooLarge for those that do not fit."""
        limit = self._settings.max_record
        large = [one.message for one in parcels if len(one.body) > limit - RESERVE or _size(one) > limit]
        if large:
            one = large[0]
            raise PayloadTooLarge(
                f"message {one.id} to {one.topic!r} has a body of {len(one.body)} bytes; max_record is {limit} bytes,"
                f" of which {RESERVE} are for headers; nothing of the call was published",
                large,
            )

    async def publish(self, parcels: Sequence[Parcel]) -> None:
        """Publish in order. Raises PublishError with those that are not confirmed."""
        refusals = await self.send(parcels)
        failed = [one.message for one, why in zip(parcels, refusals, strict=True) if why is not None]
        if failed:
            raise PublishError.unconfirmed(failed, len(parcels), next(filter(None, refusals)).why)

    async def send(self, parcels: Sequence[Parcel]) -> Sequence[Refusal | None]:
        """Publish in order; why each was refused, None for those that are stored. Nothing is sent when a topic is not
        there."""
        if not parcels:
            return ()
        names = {one.name for one in parcels}
        if not self._topics.are_known(names):
            try:
                missing = await asyncio.to_thread(self._topics.cover, names)
            except TransportError as error:
                return [Refusal(str(error), final=False)] * len(parcels)
            if missing:
                why = f"there is no topic {missing[0]!r}, and create=no; make it with Kafka's own tools"
                return [Refusal(why, final=one.name in missing) for one in parcels]
        errors = await self._send(parcels)
        for parcel, one in zip(parcels, errors, strict=True):
            if one is not None and one.code() in _GONE:
                self._topics.forget(parcel.name)
        return [None if one is None else Refusal(str(one.str()), one.code() in _FINAL) for one in errors]

    async def _send(self, parcels: Sequence[Parcel]) -> Sequence[KafkaError | None]:
        call = _Call(len(parcels))
        produce = self._producer.produce
        for number, one in enumerate(parcels):

            def ended(error: KafkaError | None, _: Any, number: int = number) -> None:
                call.ended(number, error)

            while True:
                try:
                    produce(one.name, one.body, one.key, headers=one.headers, on_delivery=ended)
                    break
                except BufferError:  # its memory is full; what is under way makes room, or fails in time
                    await asyncio.sleep(0.005)
        return await call.done

    async def aclose(self) -> None:
        """What is under way gets some seconds. Idempotent."""
        self._ended = True
        await asyncio.to_thread(self._thread.join)
        self.__dict__.pop("_producer", None)  # with the last reference its connections go


def _size(parcel: Parcel) -> int:
    headers = sum(len(name) + len(value or b"") + 8 for name, value in parcel.headers)
    return len(parcel.body) + len(parcel.key or b"") + headers + 128
