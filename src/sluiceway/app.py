"""The app: a broker, consumers, and what runs them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, Unpack

from .address import without_secrets
from .codec import encode
from .consumer import ConsumerDecorator, ConsumerDef, consumer, definition
from .errors import AppError, OptionError
from .manager import ConsumerManager
from .message import Outgoing, PublishHeaders, make_outgoing, with_headers
from .middleware import BatchMiddleware, Middleware
from .options import OPTIONS, ConsumerOptions, check_group
from .pipeline import SHUTDOWN_TIMEOUT, check_run
from .signatures import NO_CONTEXT
from .telemetry import Published, Telemetry
from .transport import Transport

log = logging.getLogger("sluiceway")

DEFAULT_URL = "sqlite:///sluiceway.db"

_SCHEMES: dict[str, tuple[str, str]] = {
    "amqp": ("sluiceway.transports.rabbitmq", "RabbitMQTransport"),
    "amqps": ("sluiceway.transports.rabbitmq", "RabbitMQTransport"),
    "kafka": ("sluiceway.transports.kafka", "KafkaTransport"),
    "kafkas": ("sluiceway.transports.kafka", "KafkaTransport"),
    "memory": ("sluiceway.transports.memory", "MemoryTransport"),
    "nats": ("sluiceway.transports.nats", "NATSTransport"),
    "redis": ("sluiceway.transports.redis", "RedisTransport"),
    "rediss": ("sluiceway.transports.redis", "RedisTransport"),
    "sqlite": ("sluiceway.transports.sqlite", "SQLiteTransport"),
    "tls": ("sluiceway.transports.nats", "NATSTransport"),
}


def open_transport(url: str) -> Transport:
    """The transport of a URL, not yet connected. Raises OptionError for a scheme that is not known, and for a client
    library that is not installed."""
    scheme = url.partition(":")[0]
    if scheme not in _SCHEMES or "://" not in url:
        known = ", ".join(f"{one}://" for one in sorted(_SCHEMES))
        raise OptionError(f"there is no transport for {without_secrets(url)!r}; a URL starts with one of: {known}")
    module, name = _SCHEMES[scheme]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"{scheme}:// needs a client that is not installed: {error}") from error
    made: Transport = getattr(found, name).from_url(url)
    return made


class App:
    """A broker and the consumers that run over it.

    - `broker`: a URL or a Transport; unless given what the environment variable SLUICEWAY_URL says, else
      `sqlite:///sluiceway.db`, a file in the working folder.
    - `group`: the group of consumers that name none. Each group gets every message once.
    - `lifespan`: an async context manager function; what it yields is handed to every handler that takes a second
      argument. It is entered before the first message and left after the last settle.
    - `consumers`: consumers declared apart with `@consumer`.
    - `middleware`, `batch_middleware`: go round those of every consumer.
    - `publish_headers()`: is asked at each publish, the app's and a message's, and returns headers to add; those that
      the publisher names win. It carries on a trace or a request id.
    - `shutdown_timeout`: seconds a drain may take before running handlers are cancelled.
    - `max_restarts` in `max_seconds`: how often a pipeline may crash before it is given up. `give_up`: `exit` drains
      the others and raises PipelineFailed; `continue` goes on without it.

    Raises OptionError for what is not allowed.
    """

    def __init__(
        self,
        broker: str | Transport | None = None,
        *,
        group: str = "default",
        lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
        consumers: Iterable[Any] = (),
        middleware: Sequence[Middleware] = (),
        batch_middleware: Sequence[BatchMiddleware] = (),
        publish_headers: PublishHeaders | None = None,
        shutdown_timeout: float = SHUTDOWN_TIMEOUT,
        max_restarts: int = 3,
        max_seconds: float = 60.0,
        give_up: Literal["exit", "continue"] = "exit",
    ) -> None:
        check_group("App", group)
        check_run("App", shutdown_timeout, max_restarts, max_seconds, publish_headers)
        _check("give_up", give_up, give_up in ("exit", "continue"), "'exit' or 'continue'")
        what = "a function decorated with @contextlib.asynccontextmanager"
        _check("lifespan", lifespan, lifespan is None or _is_entered(lifespan), what)
        for name, value in (("middleware", middleware), ("batch_middleware", batch_middleware)):
            problem = OPTIONS[name].check(value)
            _check(name, value, problem is None, problem or "")
        if broker is None:
            broker = os.environ.get("SLUICEWAY_URL") or DEFAULT_URL
        self.url = broker if isinstance(broker, str) else None
        self.group = group
        self.middleware = middleware
        self.batch_middleware = batch_middleware
        self.publish_headers = publish_headers
        self.lifespan = lifespan
        self.shutdown_timeout = shutdown_timeout
        self.max_restarts = max_restarts
        self.max_seconds = max_seconds
        self.give_up: Literal["exit", "continue"] = give_up
        self.telemetry = Telemetry()
        self.consumers: dict[str, ConsumerDef] = {}
        self.transport: Transport = _as_transport(broker)
        self.manager = ConsumerManager(self)
        self._connected: asyncio.AbstractEventLoop | None = None
        self._users = 0
        for one in consumers:
            self.add(one)

    # -- the broker ----------------------------------------------------------------------------------------------

    def use(self, broker: str | Transport) -> None:
        """Run over another broker from now on. Raises AppError while connected, and OptionError for an unknown URL."""
        if self._connected is not None:
            raise AppError("the app is connected already; choose its broker before that")
        self.transport = _as_transport(broker)
        self.url = broker if isinstance(broker, str) else None

    @property
    def broker(self) -> str:
        """The broker as it may be shown: its URL without the password; a transport's class where no URL was given."""
        return type(self.transport).__name__ if self.url is None else without_secrets(self.url)

    # -- declaring -----------------------------------------------------------------------------------------------

    def consumer(self, *topics: str, **options: Unpack[ConsumerOptions]) -> ConsumerDecorator:
        """Declare a consumer of this app: a function or a Consumer class. Raises OptionError and AppError."""
        declare = consumer(*topics, **options)

        def register(target: Any) -> Any:
            declared = declare(target)
            self.add(declared)
            return declared

        return register

    def add(self, declared: Any) -> None:
        """Add a consumer that was declared apart. Raises AppError when the name is taken."""
        found = definition(declared)
        if found.name in self.consumers:
            raise AppError(
                f"two consumers are named {found.name!r}, on {self.consumers[found.name].topics} and {found.topics}; "
                "give one of them name=..."
            )
        self.consumers[found.name] = found

    # -- publishing ----------------------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
    ) -> str:
        """Publish one message; returns its id. Durable when it returns.

        `payload` becomes JSON; bytes go as they are. `delay` seconds pass before anyone receives it. Connects when the
        app is not connected; close with `aclose` or use `async with app:`. Raises PublishError, PayloadTooLarge and,
        for what is not allowed, OptionError.
        """
        headers = with_headers(self.publish_headers, headers)
        outgoing = make_outgoing(topic, encode(payload), key=key, headers=headers, delay=delay)
        if self._connected is not asyncio.get_running_loop():
            await self.connect()
        await self.transport.publish((outgoing,))
        if Published in self.telemetry.attached:
            self.telemetry.emit(Published(consumer="", topic=topic, count=1))
        return outgoing.id

    async def publish_many(
        self,
        topic: str,
        payloads: Iterable[Any],
        *,
        key: Callable[[Any], str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
    ) -> list[str]:
        """Publish many payloads to one topic, in order, in as few calls as the broker allows; returns their ids.

        `key` makes the key of each payload. Either all is published or PublishError says what is not (`.failed`).
        Raises OptionError for what is not allowed, and then publishes nothing.
        """
        headers = with_headers(self.publish_headers, headers)
        if isinstance(payloads, (str, bytes, bytearray, Mapping)):
            raise OptionError(f"publish_many to {topic!r}: give a list of payloads, got one {type(payloads).__name__}")
        kept = make_outgoing(topic, b"", headers=headers, delay=delay).headers
        if key is None:
            outgoing = [Outgoing(topic, encode(payload), headers=kept, delay=delay) for payload in payloads]
        else:
            outgoing = [
                make_outgoing(topic, encode(payload), key=key(payload), headers=kept, delay=delay)
                for payload in payloads
            ]
        await self._publish(outgoing)
        if outgoing and self.telemetry.wants(Published):
            self.telemetry.emit(Published(consumer="", topic=topic, count=len(outgoing)))
        return [one.id for one in outgoing]

    def publish_sync(self, topic: str, payload: Any, **options: Any) -> str:
        """`publish` for code without a loop: a script, for which it connects, publishes and closes; or a thread beside
        the loop that the app is connected in. Raises AppError inside a running loop, where `publish` is awaited."""
        published: str = self._sync(self.publish(topic, payload, **options))
        return published

    def publish_many_sync(self, topic: str, payloads: Iterable[Any], **options: Any) -> list[str]:
        """`publish_many` for code without a loop, as `publish_sync` is."""
        published: list[str] = self._sync(self.publish_many(topic, payloads, **options))
        return published

    async def _publish(self, outgoing: Sequence[Outgoing]) -> None:
        await self.connect()
        if outgoing:
            await self.transport.publish(outgoing)

    def _sync(self, work: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            work.close()
            raise AppError("publish_sync was called inside a running event loop; use `await app.publish(...)` there")
        loop = self._connected
        if loop is not None and loop.is_running():  # in another thread: a plain `def` handler publishes
            return asyncio.run_coroutine_threadsafe(work, loop).result()
        return asyncio.run(self._then_close(work))

    async def _then_close(self, work: Any) -> Any:
        try:
            return await work
        finally:
            await self.aclose()

    # -- connecting ----------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect to the broker. Idempotent. Raises ConnectError that says what to do."""
        loop = asyncio.get_running_loop()
        if self._connected is not loop:
            await self.transport.connect()
            self._connected = loop

    async def aclose(self) -> None:
        """Close the connection, unless consumers run over it. Idempotent."""
        if self._connected is not None and self._users == 0:
            self._connected = None
            await self.transport.aclose()

    async def __aenter__(self) -> App:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    # -- running -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncIterator[ConsumerManager]:
        """Run the app's consumers (all, or those named) inside a test, a script or a web app.

        Every pipeline's source is open when the body starts, so that what is published from then on is received. All
        pipelines drain when it ends.

        Raises what a pipeline that is given up or a handler that exits raised, when the body has ended. When that
        happens before, the body is cancelled, as by asyncio.timeout: once, and what it raises itself comes first.
        """
        self._users += 1
        try:
            await self.connect()
            async with self._lifespan() as context, self.manager.supervise(context, names):
                yield self.manager
        finally:
            self._users -= 1
            await self.aclose()

    async def run(self, *names: str, stop: asyncio.Event | None = None) -> None:
        """Run until SIGINT or SIGTERM (or `stop` is set), then drain. A second signal cuts the drain short.

        Raises PipelineFailed when a pipeline is given up, and what a handler that exits the app raised.
        """
        asked = stop or asyncio.Event()
        with self._signals(asked):
            async with self.running(*names):
                await asked.wait()

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[Any]:
        if self.lifespan is None:
            yield NO_CONTEXT
        else:
            async with self.lifespan() as context:
                yield context

    @contextlib.contextmanager
    def _signals(self, asked: asyncio.Event) -> Any:
        loop = asyncio.get_running_loop()

        heard: set[str] = set()

        def on_signal(name: str) -> None:
            if name in heard:  # once more in this turn of the loop: `timeout` signals us and our process group at once
                return
            heard.add(name)
            loop.call_soon(heard.clear)
            if asked.is_set():
                log.warning("%s again: running handlers are cancelled", name)
                self.manager.hurry()
            else:
                log.info("%s: draining; once more cancels what runs", name)
                asked.set()

        handled = []
        for one in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # no signals off the main thread
                loop.add_signal_handler(one, on_signal, one.name)
                handled.append(one)
        try:
            yield
        finally:
            for one in handled:
                loop.remove_signal_handler(one)


def _as_transport(broker: object) -> Transport:
    if isinstance(broker, str):
        return open_transport(broker)
    if not isinstance(broker, Transport):
        raise OptionError(f"App: broker must be a URL or a Transport, got {broker!r}")
    return broker


def _check(name: str, value: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise OptionError(f"App: {name} must be {what}; got {value!r}")


def _is_entered(lifespan: object) -> bool:
    return callable(lifespan) and not inspect.isasyncgenfunction(lifespan)
