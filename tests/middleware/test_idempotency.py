"""Idempotency: what was handled is not handled again, and nothing is lost by that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sluiceway import App, Message, OptionError, Pipeline, Release, Retry
from sluiceway.message import Outgoing
from sluiceway.middleware.idempotency import Claim, Idempotency, MemoryStore, _packed, _unpacked
from sluiceway.transports.memory import MemoryTransport
from tests.middleware.kit import ONCE, Shop
from tests.runtime.recording import Broker, running

pytestmark = pytest.mark.virtual_time


def body(message: Message[Any]) -> str:
    return message.body.decode()


def shop_of(
    handle: Callable[[Message[Any]], Awaitable[None]], store: Any = None, retry: Retry | None = None, **options: Any
) -> Shop:
    shop = Shop()
    middleware = [Idempotency(store or MemoryStore(), **{"key": body, **options})]
    shop.app.consumer("t", middleware=middleware, retry=retry or ONCE)(handle)
    return shop


async def test_a_duplicate_of_something_done_is_acked_without_its_handler() -> None:
    handled: list[Any] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.payload)

    shop = shop_of(pay)
    await shop.run(1, 2, 1, 2, 1)
    assert handled == [1, 2]
    assert await shop.dead() == []


async def test_a_message_that_acked_itself_is_done_also_when_its_handler_fails_then() -> None:
    handled: list[Any] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.payload)
        message.publish("paid", message.payload)
        await message.ack()
        raise ValueError("of no account")

    shop = shop_of(pay)
    await shop.run(1)
    await shop.run(1)
    assert handled == [1]
    assert await shop.dead() == []
    paid = [one.id async for one in shop.transport.browse("paid")]
    assert len(paid) == 2
    assert len(set(paid)) == 1  # what it published is published again for the duplicate, under the same id


async def test_the_key_is_the_messages_id_unless_given() -> None:
    handled: list[Any] = []
    store = MemoryStore()

    async def pay(message: Message[Any]) -> None:
        handled.append(message.payload)

    shop = shop_of(pay, store, key=None)
    await shop.run("same", "same")
    assert handled == ["same", "same"]
    again = Outgoing("t", b'"again"', id="m-1")
    async with shop.app:
        await shop.transport.publish([again])
        await shop.transport.publish([again])
    await shop.run()
    assert handled == ["same", "same", "again"]


async def test_a_message_without_a_key_is_always_handled() -> None:
    handled: list[Any] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.payload)

    await shop_of(pay, key=lambda message: None).run(1, 1)
    assert handled == [1, 1]


async def test_keys_of_other_consumers_and_groups_are_others() -> None:
    store = MemoryStore()
    handled: list[str] = []
    app = App(MemoryTransport(), middleware=[Idempotency(store, key=body)])
    for name, group in (("a", "g"), ("b", "h"), ("c", "g")):

        async def handle(message: Message[Any], name: str = name) -> None:
            handled.append(name)

        app.consumer("t" if name != "c" else "u", name=name, group=group, payload=int)(handle)
    async with app.running() as manager:
        for topic in ("t", "u"):
            await app.publish(topic, 1)
        await manager.idle()
    assert sorted(handled) == ["a", "b", "c"]


async def test_a_duplicate_of_something_in_progress_waits_uncounted_and_runs_not_at_all() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.attempt)
        await asyncio.sleep(10)

    shop = shop_of(pay, retry_after=0.5)
    await shop.run("x", "x", "x")
    assert handled == [1]
    assert await shop.dead() == []  # though it has one attempt and came some twenty times


async def test_a_handler_that_fails_gives_its_claim_up_and_runs_again() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.attempt)
        if message.attempt == 1:
            raise ValueError("no")
        if message.attempt == 2:
            message.fail("neither")

    shop = shop_of(pay, retry=Retry(attempts=3, base_delay=1, jitter=0))
    await shop.run("x")
    assert handled == [1, 2, 3]
    await shop.run("x")
    assert handled == [1, 2, 3]
    assert await shop.dead() == []


async def test_a_handler_that_runs_longer_than_its_lease_keeps_its_claim() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.attempt)
        await asyncio.sleep(100)

    await shop_of(pay, lease=3).run("x", "x")
    assert handled == [1]


async def test_a_claim_whose_process_died_runs_out_and_the_message_is_handled_then() -> None:
    store = MemoryStore()
    handled: list[float] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(asyncio.get_running_loop().time())

    shop = shop_of(pay, store, lease=30)
    await store.claim("shop:pay:1", "of the dead", 30)
    died = asyncio.get_running_loop().time()
    await shop.run(1)
    (handled_at,) = handled
    assert 30 <= handled_at - died < 32  # it looks once a second
    assert await shop.dead() == []


async def test_what_a_handler_published_goes_out_again_for_a_duplicate_since_its_process_may_have_died() -> None:
    store = MemoryStore()
    handled: list[str] = []
    broker = Broker("x", "x")

    async def pay(message: Message[Any]) -> None:
        handled.append(message.id)
        message.publish("next", {"paid": 5}, key="k\udcff", headers={"a": "b"}, delay=2.0)

    pipeline = Pipeline(broker.open, pay, middleware=[Idempotency(store, key=body)], payload=bytes, concurrency=1)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert handled == ["m1"]
    (first,), (second,) = (one.outputs for one in broker.ended)
    assert (first.body, first.key, dict(first.headers), first.delay) == (b'{"paid":5}', "k\udcff", {"a": "b"}, 2.0)
    fields = ("topic", "body", "key", "id", "timestamp", "delay", "group")
    assert [getattr(first, name) for name in fields] == [getattr(second, name) for name in fields]
    assert dict(second.headers) == dict(first.headers)


def test_what_is_published_survives_its_way_through_a_store() -> None:
    one = Outgoing("t", b"\xff", None, id="id", timestamp=1.5, group="g")
    (other,) = _unpacked(_packed([one]))
    assert (other.topic, other.body, other.key, dict(other.headers), other.id, other.timestamp, other.group) == (
        "t", b"\xff", None, {}, "id", 1.5, "g"
    )  # fmt: skip


async def test_a_message_that_is_to_come_again_is_not_done() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(len(handled))
        if len(handled) == 1:
            message.configure(on_success="release")

    await shop_of(pay).run("x")
    assert handled == [0, 1]


class Flaky(MemoryStore):
    """A store whose calls fail, or never return, as told."""

    def __init__(self, *fail: str, hang: str = "") -> None:
        super().__init__()
        self.fail = list(fail)
        self.hang = hang
        self.hung = asyncio.Event()
        self.calls: list[str] = []

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            self.fail.remove(name)
            raise ConnectionError(f"{name} cannot reach the store")
        if name == self.hang:
            self.hang = ""
            self.hung.set()
            await asyncio.sleep(1000)

    async def claim(self, key: str, token: str, lease: float) -> Claim:
        found = await super().claim(key, token, lease)
        await self._call("claim")
        return found

    async def renew(self, key: str, token: str, lease: float) -> bool:
        await self._call("renew")
        return await super().renew(key, token, lease)

    async def done(self, key: str, token: str, result: bytes, ttl: float) -> bool:
        await self._call("done")
        return await super().done(key, token, result, ttl)

    async def release(self, key: str, token: str) -> None:
        await self._call("release")
        await super().release(key, token)


@pytest.mark.parametrize(("failing", "runs"), [("done", 2), ("renew", 1)])
async def test_a_store_that_fails_costs_a_retry_at_most(failing: str, runs: int) -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.attempt)
        await asyncio.sleep(15)

    shop = shop_of(pay, Flaky(failing), retry=Retry(attempts=2))
    await shop.run("x")
    assert len(handled) == runs
    assert await shop.dead() == []


async def test_a_claim_that_fails_is_a_failure_of_its_message_and_given_up_in_case_it_was_made() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.attempt)

    store = Flaky("claim")
    shop = shop_of(pay, store, retry=Retry(attempts=2, base_delay=1, jitter=0))
    await shop.run("x")
    assert store.calls == ["claim", "release", "claim", "done"]
    assert handled == [2]


async def test_a_release_that_fails_is_logged_and_the_handlers_own_error_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def pay(message: Message[Any]) -> None:
        raise ValueError("the handler's")

    shop = shop_of(pay, Flaky("release"))
    await shop.run("x")
    assert await shop.why_dead() == ["the handler's"]
    assert "could not be released (ConnectionError: release cannot reach the store); it is free again in 30 s" in (
        caplog.text
    )


@pytest.mark.parametrize("where", ["claim", "done"])
async def test_cut_off_while_the_store_answers_the_claim_is_given_up_and_the_message_goes_back(where: str) -> None:
    store = Flaky(hang=where)
    broker = Broker("x")
    handled: list[str] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(message.id)

    pipeline = Pipeline(broker.open, pay, middleware=[Idempotency(store, key=body)], payload=bytes, shutdown_timeout=1)
    async with running(pipeline, broker):
        await store.hung.wait()
    assert broker.outcomes("m1") == ["release"]
    assert store.calls[-1] == "release"
    assert not store._claimed
    async with running(pipeline, broker):  # and it is handled at once by whoever gets it
        await broker.settled(1)
    assert handled == ["m1"] * (1 if where == "claim" else 2)


async def test_a_claim_that_another_took_meanwhile_is_told_and_the_message_is_acked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()

    async def pay(message: Message[Any]) -> None:
        store._claimed["shop:pay:1"].token = "another's"

    shop = shop_of(pay, store)
    await shop.run(1)
    assert await shop.dead() == []
    assert "'shop:pay:1' was claimed by another while its handler ran here; it may have run there too" in caplog.text


def test_a_thread_that_runs_on_keeps_its_claim_until_the_lease_runs_out() -> None:
    import threading

    go = threading.Event()
    handled: list[str] = []

    def pay(message: Message[Any]) -> None:
        handled.append(message.id)
        go.wait(10)

    async def main() -> None:  # threads: in real time
        store = Flaky()
        broker = Broker("x")
        pipeline = Pipeline(
            broker.open,
            pay,
            middleware=[Idempotency(store, key=body, lease=30)],
            payload=bytes,
            timeout=0.1,
            retry=ONCE,
        )
        async with running(pipeline, broker):
            await broker.settled(1)
        assert [one.id for one in broker.dead] == ["m1"]
        assert "release" not in store.calls
        assert (await store.claim("default:pay:x", "another's", 30)).state == "busy"
        go.set()

    asyncio.run(main())
    assert handled == ["m1"]


async def test_a_release_by_the_handler_gives_its_claim_up() -> None:
    handled: list[int] = []

    async def pay(message: Message[Any]) -> None:
        handled.append(len(handled))
        if len(handled) == 1:
            raise Release

    await shop_of(pay).run("x")
    assert handled == [0, 1]


async def test_with_batches_it_is_an_option_error_that_says_what_to_do() -> None:
    shop = Shop(middleware=[Idempotency(MemoryStore())])

    @shop.app.consumer("t")
    async def pay(message: Message[int]) -> None: ...

    @pay.batch()
    async def book(batch: Any) -> None: ...

    with pytest.raises(
        OptionError, match=r"pay: Idempotency would call a message done when its handler returned.*upsert"
    ):
        await shop.run()


@pytest.mark.parametrize(
    "wrong",
    [
        {"lease": 0},
        {"ttl": -1},
        {"retry_after": "1"},
        {"lease": True},
        {"key": "id"},
        {"store": MemoryStore},
        {"store": 5},
    ],
)
def test_what_cannot_be_is_an_option_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"Idempotency: {next(iter(wrong))} must be "):
        Idempotency(**{"store": MemoryStore(), **wrong})
