"""Declaring an app: its own options, its consumers, its broker. Nothing here connects to anything."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sluiceway import App, AppError, Consumer, FunctionConsumer, Message, OptionError, consumer
from sluiceway.app import DEFAULT_URL, open_transport
from sluiceway.message import Outgoing
from sluiceway.transports.memory import MemoryTransport


def app(**options: Any) -> App:
    return App("memory://", **options)


@consumer("payments.created")
async def payments(message: Message[str]) -> None: ...


@consumer("orders.*", name="orders", group="billing", concurrency=2)
class Orders(Consumer[str]):
    async def handle(self, message: Message[str]) -> None: ...


# -- its options -------------------------------------------------------------------------------------------------------


async def plain_generator() -> AsyncIterator[None]:
    yield


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"group": ""}, "App: group must be words of letters, digits and _-:/@+=~, joined by dots; got ''"),
    ({"group": "my shop"}, "App: group must be words of letters, digits and _-:/@+=~, joined by dots; got 'my shop'"),
    ({"group": "#"}, "App: group must be words of letters, digits and _-:/@+=~, joined by dots; got '#'"),
    ({"group": None}, "App: group must be words of letters, digits and _-:/@+=~, joined by dots; got None"),
    ({"shutdown_timeout": -1}, "App: shutdown_timeout must be 0 or more seconds; got -1"),
    ({"shutdown_timeout": math.nan}, "App: shutdown_timeout must be 0 or more seconds; got nan"),
    ({"shutdown_timeout": None}, "App: shutdown_timeout must be 0 or more seconds; got None"),
    ({"max_restarts": -1}, "App: max_restarts must be a whole number, 0 or more; got -1"),
    ({"max_restarts": 1.5}, "App: max_restarts must be a whole number, 0 or more; got 1.5"),
    ({"max_restarts": True}, "App: max_restarts must be a whole number, 0 or more; got True"),
    ({"max_seconds": 0}, "App: max_seconds must be seconds, more than 0; got 0"),
    ({"max_seconds": math.inf}, "App: max_seconds must be seconds, more than 0; got inf"),
    ({"give_up": "stop"}, "App: give_up must be 'exit' or 'continue'; got 'stop'"),
    ({"lifespan": plain_generator}, "App: lifespan must be a function decorated with @contextlib.asynccontextmanager"),
    ({"lifespan": 5}, "App: lifespan must be a function decorated with @contextlib.asynccontextmanager; got 5"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=range(len(WRONG)))
def test_an_option_that_cannot_be_names_its_value_and_what_is_allowed(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        app(**options)
    assert str(caught.value).startswith(text)


def test_good_options_are_kept() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        yield "ledger"

    made = app(
        group="shop.eu", lifespan=lifespan, shutdown_timeout=0, max_restarts=0, max_seconds=0.5, give_up="continue"
    )
    assert (made.group, made.lifespan, made.give_up) == ("shop.eu", lifespan, "continue")
    assert (made.shutdown_timeout, made.max_restarts, made.max_seconds) == (0, 0, 0.5)


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="shutdown_time"):
        app(shutdown_time=5)


# -- its broker --------------------------------------------------------------------------------------------------------


def test_without_a_broker_it_is_a_file_in_the_working_folder_that_is_not_yet_touched(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert App().url == DEFAULT_URL == "sqlite:///sluiceway.db"
    assert list(tmp_path.iterdir()) == []


def test_a_transport_can_be_given_as_it_is() -> None:
    transport = MemoryTransport.from_url("memory://")
    made = App(transport)
    assert made.transport is transport
    assert made.url is None
    assert made.broker == "MemoryTransport"


@pytest.mark.parametrize("broker", [5, object(), MemoryTransport], ids=["int", "object", "class"])
def test_what_is_no_broker_is_refused(broker: Any) -> None:
    with pytest.raises(OptionError) as caught:
        App(broker)
    assert str(caught.value) == f"App: broker must be a URL or a Transport, got {broker!r}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("kafkaesque://localhost", "kafkaesque://localhost"),
        ("sluiceway.db", "sluiceway.db"),
        ("", ""),
        ("memory:", "memory:"),
        ("bunny://ann:secret@host/x", "bunny://ann:***@host/x"),
        ("bunny://:secret@host", "bunny://:***@host"),
        ("bunny://ann:se@cr:et@host", "bunny://ann:***@host"),
    ],
)
def test_an_unknown_url_says_which_there_are_and_never_shows_a_password(url: str, shown: str) -> None:
    with pytest.raises(OptionError) as caught:
        open_transport(url)
    schemes = "amqp://, amqps://, kafka://, kafkas://, memory://, nats://, redis://, rediss://, sqlite://, tls://"
    assert str(caught.value) == f"there is no transport for {shown!r}; a URL starts with one of: {schemes}"


@pytest.mark.parametrize(
    ("scheme", "client"), [("redis", "hiredis"), ("nats", "nats"), ("amqp", "pika"), ("amqps", "pika")]
)
def test_a_client_that_is_missing_is_named_with_how_to_install_it(scheme: str, client: str) -> None:
    code = f"""
import sys
sys.modules[{client!r}] = None  # as if it were not installed
from sluiceway import App, OptionError
try:
    App("{scheme}://localhost").transport
except OptionError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.startswith(f"{scheme}:// needs a client that is not installed: the ")
    assert "pip install 'sluiceway[" in told


def test_without_a_broker_the_environment_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICEWAY_URL", "memory://")
    assert App().url == "memory://"
    assert App("sqlite:///own.db").url == "sqlite:///own.db"
    monkeypatch.setenv("SLUICEWAY_URL", "")
    assert App().url == "sqlite:///sluiceway.db"


def test_another_broker_can_be_chosen_until_it_is_connected() -> None:
    made = App("sqlite:///elsewhere.db")
    made.use("memory://")
    assert isinstance(made.transport, MemoryTransport)
    assert made.broker == "memory://"
    with pytest.raises(OptionError, match="broker must be a URL or a Transport, got 5"):
        made.use(5)  # type: ignore[arg-type]


async def test_while_it_is_connected_no_other_broker_can_be_chosen() -> None:
    async with app() as made:
        with pytest.raises(AppError, match="connected already; choose its broker before that"):
            made.use("memory://")


# -- its consumers -----------------------------------------------------------------------------------------------------


def test_consumers_declared_apart_are_listed_in_order() -> None:
    made = app(consumers=[Orders, payments])
    assert list(made.consumers) == ["orders", "payments"]
    assert made.consumers["payments"] is payments
    assert made.consumers["orders"].topics == ("orders.*",)
    assert made.consumers["orders"].value("concurrency") == 2


def test_consumers_declared_with_the_app_are_what_they_are_apart() -> None:
    made = app()

    @made.consumer("a")
    async def first(message: Message[str]) -> None: ...

    @made.consumer("b", "c", timeout=1.0)
    class Second(Consumer[str]):
        async def handle(self, message: Message[str]) -> None: ...

    assert isinstance(first, FunctionConsumer)
    assert isinstance(Second, type)
    assert list(made.consumers) == ["first", "Second"]
    assert made.consumers["first"] is first
    assert made.consumers["Second"].topics == ("b", "c")


def test_one_declaration_can_be_in_two_apps() -> None:
    assert list(app(consumers=[payments]).consumers) == list(app(consumers=[payments]).consumers) == ["payments"]


def test_two_consumers_of_one_name_are_refused_with_what_to_do_about_it() -> None:
    made = app(consumers=[payments])
    with pytest.raises(AppError) as caught:

        @made.consumer("payments.deleted", name="payments")
        async def other(message: Message[str]) -> None: ...

    assert str(caught.value) == (
        "two consumers are named 'payments', on ('payments.created',) and ('payments.deleted',); "
        "give one of them name=..."
    )
    assert made.consumers["payments"] is payments
    with pytest.raises(AppError, match="two consumers are named 'orders'"):
        app(consumers=[Orders, Orders])


def test_what_is_not_a_consumer_cannot_be_added() -> None:
    with pytest.raises(AppError, match="5 is not a consumer; decorate it with @consumer"):
        app(consumers=[5])
    with pytest.raises(AppError, match="is not a consumer"):
        app().add(lambda message: None)


async def test_a_consumer_that_does_not_exist_is_told_with_the_nearest_name() -> None:
    made = app(consumers=[payments])
    with pytest.raises(OptionError, match="app: there is no consumer 'payment'; did you mean 'payments'"):
        async with made.running("payment"):
            pass


# -- publishing: what is refused before anything is sent ------------------------------------------------------------


class Recorder:
    """Stands in for a transport's publish."""

    def __init__(self, made: App, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Outgoing] = []
        monkeypatch.setattr(made.transport, "publish", self.publish)

    async def publish(self, messages: Any) -> None:
        self.sent.extend(messages)


async def test_publish_many_makes_one_message_per_payload_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with app() as made:
        recorder = Recorder(made, monkeypatch)
        ids = await made.publish_many("t", [1, 2], key=lambda payload: f"k{payload}", headers={"h": "v"}, delay=3)
        ids += await made.publish_many("t", [3], delay=1.5)
        assert await made.publish_many("t", []) == []
    assert ids == [one.id for one in recorder.sent]
    assert [(one.body, one.key, one.headers, one.delay) for one in recorder.sent] == [
        (b"1", "k1", {"h": "v"}, 3), (b"2", "k2", {"h": "v"}, 3), (b"3", None, {}, 1.5),
    ]  # fmt: skip


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, "delay must be 0 or more seconds, got -1"),
    ({"delay": math.nan}, "delay must be 0 or more seconds, got nan"),
    ({"headers": {"a": 1}}, "headers are strings, got 'a': 1"),
    ({"topic": "a.#"}, "topic 'a.#' is a pattern"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=range(len(REFUSED)))
async def test_what_cannot_be_published_is_refused_before_the_app_connects(given: dict[str, Any], text: str) -> None:
    made = App("sqlite:////no/such/folder/x.db")
    topic = given.pop("topic", "t")
    with pytest.raises(OptionError) as caught:
        await made.publish(topic, 1, **given)
    assert text in str(caught.value)
    with pytest.raises(OptionError) as caught:
        await made.publish_many(topic, [1], **given)
    assert text in str(caught.value)


async def test_a_key_function_that_gives_no_string_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with app() as made:
        recorder = Recorder(made, monkeypatch)
        with pytest.raises(OptionError, match="key must be a string or None, got 2"):
            await made.publish_many("t", ["1", 2], key=lambda payload: payload)
    assert recorder.sent == []


async def test_publishing_without_a_loop_is_refused_inside_one() -> None:
    with pytest.raises(AppError, match=r"publish_sync was called inside a running event loop; use `await app.publish"):
        app().publish_sync("t", 1)


async def test_a_plain_handler_publishes_over_the_connection_of_its_app() -> None:
    """It would else open a second one in its thread, under the feet of the first."""
    made, received = app(publish_headers=lambda: {"by": threading.current_thread().name}), asyncio.Queue[Message[int]]()

    @made.consumer("numbers")
    def double(message: Message[int]) -> None:
        made.publish_sync("one", 2 * message.payload)
        made.publish_many_sync("many", [message.payload, 3 * message.payload])

    @made.consumer("one", "many")
    async def listen(message: Message[int]) -> None:
        await received.put(message)

    async with made.running():
        await made.publish("numbers", 7)
        async with asyncio.timeout(20):
            messages = [await received.get() for _ in range(3)]
            await made.publish("one", 0)  # the app is as connected as before
            messages.append(await received.get())
    assert sorted(one.payload for one in messages) == [0, 7, 14, 21]
    assert {one.headers["by"] for one in messages} == {threading.main_thread().name}


def test_a_script_without_a_loop_publishes_and_closes(tmp_path: Path) -> None:
    made = App(f"sqlite:///{tmp_path}/shop.db")
    ids = [made.publish_sync("numbers", 1), *made.publish_many_sync("numbers", [2, 3])]

    async def stored() -> list[tuple[str, bytes]]:
        async with made:
            return [(one.id, one.body) async for one in made.transport.browse("numbers")]

    assert asyncio.run(stored()) == list(zip(ids, [b"1", b"2", b"3"], strict=True))


@pytest.mark.parametrize("payloads", ["abc", b"abc", {"id": 1}], ids=["text", "bytes", "mapping"])
async def test_one_payload_is_not_taken_for_many(payloads: Any) -> None:
    with pytest.raises(OptionError, match=r"publish_many to 't': give a list of payloads, got one"):
        await App(MemoryTransport()).publish_many("t", payloads)
