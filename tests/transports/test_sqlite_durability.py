"""What stays, what is one transaction, and what happens to a receive that nobody waits for."""

from __future__ import annotations

import asyncio
import pickle
import random
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluiceway.errors import OptionError, PublishError
from sluiceway.message import Message, Outgoing, Settlement
from tests.transports.sqlite_kit import bodies, connected, get, numbered, publish, subscribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


async def test_messages_delays_and_counts_survive_a_reopening(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4), key="k", headers={"h": "ü"})
        failed, acked, dead, _ = await get(source, 4)
        out = (Outgoing("t.g.dead", dead.body, headers={"why": "x"}),)
        await source.settle([acked], [Settlement(failed, "retry"), Settlement(dead, "dead_letter", outputs=out)])
        await publish(transport, "t", b"later", delay=3600)
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        again = await get(source, 2)
        assert bodies(again) == [b"0", b"3"]
        assert [message.attempt for message in again] == [2, 1]
        assert again[0].key == "k"
        assert again[0].headers == {"h": "ü"}
        assert [stored.body async for stored in transport.browse("t.g.dead")] == [b"2"]
        backlog = await source.backlog()
        assert backlog is not None
        assert backlog.messages == 1


async def test_foreign_bytes_in_keys_and_texts_come_back_as_they_were(path: Path) -> None:
    key = b"caf\xe9".decode("utf-8", "surrogateescape")
    async with connected(path) as transport:
        source = await subscribe(transport, "t", order_by="key")
        await transport.publish([Outgoing("t", b"", key, {"a": "\0", "ü": key}, id=key), Outgoing("t", b"\0", "")])
        first, second = await get(source, 2)
        assert (first.key, first.id, first.body, first.headers) == (key, key, b"", {"a": "\0", "ü": key})
        assert (second.key, second.body) == ("", b"\0")


async def test_publishing_and_what_must_not_be_lost_is_synced_and_acks_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[str] = []
    mode = ["FULL"]
    async with connected(path) as transport:
        db = transport._thread._db

        def trace(cursor: Any, sql: str, bindings: Any) -> bool:
            if sql.startswith("PRAGMA synchronous"):
                mode[0] = sql.rsplit(maxsplit=1)[-1]
            elif sql == "COMMIT":
                commits.append(mode[0])
            return True

        source = await subscribe(transport, "t")
        db.exec_trace = trace
        await publish(transport, "t", *numbered(5))
        messages = await get(source, 5)
        await source.settle(messages[:1], [])
        await source.settle([], [Settlement(messages[1], "release")])
        await source.settle([], [Settlement(messages[2], "retry")])
        await source.settle([], [Settlement(messages[3], "ack", outputs=(Outgoing("o", b""),))])
        await source.suspect(messages[4])
        assert commits == ["FULL", "NORMAL", "NORMAL", "NORMAL", "FULL", "FULL", "FULL"]
        db.exec_trace = None


async def test_publishes_that_wait_share_a_commit_and_fail_alone(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        commits = 0

        def count() -> bool:
            nonlocal commits
            commits += 1
            return False

        transport._thread._db.set_commit_hook(count)
        calls: list[Any] = [transport.publish([Outgoing("t", b"%d" % n)] * 2) for n in range(100)]
        bad = [Outgoing("t", b"good"), Outgoing("t", "not bytes")]  # type: ignore[arg-type]
        await asyncio.gather(*calls)
        assert commits < 20
        results = await asyncio.gather(
            transport.publish([Outgoing("t", b"a")]),
            transport.publish(bad),
            transport.publish([Outgoing("a..b", b"")]),
            transport.publish([Outgoing("t", b"b")]),
            return_exceptions=True,
        )
        transport._thread._db.set_commit_hook(None)
        assert results[0] is results[3] is None
        assert isinstance(results[1], PublishError)
        assert list(results[1].failed) == bad
        assert "a body is not bytes" in str(results[1])
        assert isinstance(results[2], OptionError)
        received = bodies(await get(source, 202))
        assert received == [body for body in numbered(100) for _ in (1, 2)] + [b"a", b"b"]


async def test_an_output_that_cannot_be_stored_is_refused_alone_and_its_message_stays(path: Path) -> None:
    async with connected(path, max_payload=10) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        messages = await get(source, 4)
        large = Settlement(messages[0], "dead_letter", outputs=(Outgoing("d", b"x" * 11),))
        bad = Settlement(messages[1], "ack", outputs=(Outgoing("d.*", b"x"),))
        fine = Settlement(messages[2], "dead_letter", outputs=(Outgoing("d", b"x" * 10),))
        refused = await source.settle([messages[3]], [large, bad, fine])
        assert [(one.message, one.kind) for one in refused] == [(messages[0], "rejected"), (messages[1], "rejected")]
        assert refused[0].detail == "its output to 'd' has 11 bytes and the limit is 10"
        assert "pattern" in refused[1].detail
        assert bodies([stored async for stored in transport.browse("d")]) == [b"x" * 10]
        assert source.status().held_by_broker == 2
        assert not await source.settle(messages[:2], [])


async def test_settling_twice_is_harmless_and_says_so(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3))
        messages = await get(source, 3)
        assert not await source.settle(messages[:2], [])
        refused = await source.settle([*messages, messages[2]], [])
        assert [one.message for one in refused] == messages[:2]


async def test_tokens_can_be_pickled_and_renewed_by_a_pickled_renewer(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a")
        (message,) = await get(source, 1)
        token, make = pickle.loads(pickle.dumps((message.token, source.renewer)))
        renewer = await asyncio.to_thread(make)
        assert await asyncio.to_thread(renewer.renew, [token]) == []
        await source.aclose()
        assert await asyncio.to_thread(renewer.renew, [token, token]) == [token, token]
        await asyncio.to_thread(renewer.close)


async def test_stopping_a_receive_at_any_instant_loses_and_repeats_nothing(path: Path) -> None:
    """Sources come and go; each is stopped, paused or cancelled while it may be claiming."""
    rng = random.Random(2)
    count = 400
    seen: list[Message[Any]] = []
    async with connected(path) as transport:
        await (await subscribe(transport, "t")).aclose()
        publisher = asyncio.create_task(_drip(transport, count))
        while len(seen) < count:
            source = await subscribe(transport, "t")
            for _ in range(5):
                call = asyncio.create_task(source.receive(3))
                await asyncio.wait([call], timeout=rng.choice([0, 0.0005, 0.001, 0.003]))
                way = rng.choice(["resize", "cancel", "stop", "wait"])
                if way == "cancel":
                    call.cancel()
                elif way == "resize":
                    source.resize(0)
                elif way == "stop" or publisher.done():
                    source.stop()
                await asyncio.wait([call])
                if not call.cancelled():
                    seen += call.result()
                    assert not await source.settle(call.result(), [])
                source.resize(100)
            await source.aclose()
        await publisher
    assert sorted(int(message.body) for message in seen) == list(range(count))
    assert all(message.deliveries == 1 and not message.suspect for message in seen)


async def _drip(transport: Any, count: int) -> None:
    for number in range(count):
        await publish(transport, "t", b"%d" % number)


async def test_a_claim_for_a_receive_that_was_cancelled_comes_with_the_next(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(5))
        call = asyncio.create_task(source.receive(3))
        await asyncio.sleep(0)
        while source.status().held_by_broker == 0 and not call.done():  # the claim is committed, its caller goes away
            call.cancel()
            await asyncio.sleep(0)
        assert bodies(await get(source, 5)) == numbered(5)


async def test_a_pause_gives_back_what_no_receive_has_returned(path: Path) -> None:
    async with connected(path) as transport:
        source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
        await publish(transport, "t", *numbered(2))
        source._left = await get(source, 2)
        source.resize(0)
        assert await source.receive(10) == []
        again = await get(other, 2)
        assert bodies(again) == numbered(2)
        assert not any(message.suspect for message in again)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_message_is_in_one_place_whatever_is_done_to_it(tmp_path: Path, data: st.DataObject) -> None:
    """Two sources receive and settle as hypothesis likes; nothing is lost, held twice, or handed out when not ready."""

    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.db"  # one folder serves all examples

    async def run() -> None:
        ordered = data.draw(st.sampled_from([None, "key"]), label="order_by")
        async with connected(path) as one, connected(path) as two:
            sources = [await subscribe(one, "t", order_by=ordered), await subscribe(two, "t", order_by=ordered)]
            count = data.draw(st.integers(1, 12), label="count")
            for number in range(count):
                await publish(one, "t", b"%d" % number, key=f"k{number % 3}")
            held: list[list[Message[Any]]] = [[], []]
            done: set[bytes] = set()
            for _ in range(data.draw(st.integers(1, 12), label="steps")):
                who = data.draw(st.integers(0, 1), label="who")
                if data.draw(st.booleans(), label="receive"):
                    call = asyncio.create_task(sources[who].receive(data.draw(st.integers(1, 5), label="demand")))
                    await asyncio.wait([call], timeout=0.01)
                    sources[who].resize(0)
                    held[who] += await call
                    sources[who].resize(100)
                elif held[who]:
                    message = held[who].pop(0)
                    way = data.draw(st.sampled_from(["ack", "retry", "release", "park", "drop"]), label="way")
                    if way == "ack":
                        assert not await sources[who].settle([message], [])
                        done.add(message.body)
                    else:
                        outcome: Any = "dead_letter" if way == "drop" else way
                        assert not await sources[who].settle([], [Settlement(message, outcome)])
                        if way == "drop":
                            done.add(message.body)
                in_hand = [message.body for messages in held for message in messages]
                assert len(in_hand) == len(set(in_hand))
                assert not done & set(in_hand)
            for source in sources:
                await source.aclose()
            last = await subscribe(one, "t")
            rest = await get(last, count - len(done)) if count > len(done) else []
            assert {message.body for message in rest} | done == set(numbered(count))
            assert not any(message.suspect for message in rest)

    asyncio.run(run())


async def test_a_database_that_another_tool_reads_and_locks_for_a_moment_is_waited_for(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        tool = apsw.Connection(str(path))
        tool.execute("BEGIN IMMEDIATE")
        call = asyncio.create_task(publish(transport, "t", b"a"))
        done, _ = await asyncio.wait([call], timeout=0.1)
        assert not done
        tool.execute("COMMIT")
        await call
        assert bodies(await get(source, 1)) == [b"a"]
        tool.close()
