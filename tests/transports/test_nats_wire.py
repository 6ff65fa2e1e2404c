"""NATS on the wire: the parser reads what nats-py's does, and headers carry anything."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from nats.protocol.parser import Parser

from sluiceway.message import Outgoing
from sluiceway.transports.nats.consumers import consumer_name
from sluiceway.transports.nats.headers import Note, path_of, place_of, read_delivery, read_headers, write_headers
from sluiceway.transports.nats.wire import Frame, WireParser


class Client:
    """What a parser asks of its client."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.seen.append((b"%d" % sid, (subject, reply, headers or b"", data)))

    async def _process_ping(self) -> None:
        self.seen.append("ping")

    async def _process_pong(self) -> None:
        self.seen.append("pong")

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.seen.append(info)

    async def _process_err(self, text: str) -> None:
        self.seen.append(text)


STREAM = (
    b"PING\r\nMSG a 1 5\r\nhello\r\nMSG a.b 2 $JS.ACK.x 0\r\n\r\nPONG\r\n"
    b"HMSG a 1 12 17\r\nNATS/1.0\r\n\r\nab\r\nc\r\nHMSG in.1 3 $JS.r 16 16\r\nNATS/1.0 404\r\n\r\n\r\n+OK\r\n"
    b'INFO {"server_id":"x"}\r\n-ERR \'Permissions Violation\'\r\nMSG last 1 1\r\nz\r\n'
)


def reading(step: int | None) -> list[Any]:
    """What our parser makes of it, in pieces of so many bytes."""
    client: Any = Client()

    def take(found: dict[bytes, list[Frame]]) -> None:
        client.seen += [(sid, frame) for sid, frames in found.items() for frame in frames]

    async def run() -> None:
        parser = WireParser(client, take)
        size = step or len(STREAM)
        for at in range(0, len(STREAM), size):
            await parser.parse(STREAM[at : at + size])

    asyncio.run(run())
    return client.seen


def key(one: Any) -> str:
    return repr(one)


@pytest.mark.parametrize("step", [None, *range(1, 60)])
def test_the_parser_reads_what_that_of_the_client_reads_however_it_is_cut(step: int | None) -> None:
    theirs: Any = Client()
    asyncio.run(Parser(theirs).parse(STREAM))
    assert len(theirs.seen) == 9
    assert sorted(reading(step), key=key) == sorted(theirs.seen, key=key)


def test_messages_of_one_subscription_keep_their_order() -> None:
    bodies = [one[1][3] for one in reading(7) if isinstance(one, tuple) and one[0] == b"1"]
    assert bodies == [b"hello", b"ab\r\nc", b"z"]


def test_a_large_body_in_many_reads_is_not_copied_each_time() -> None:
    body = b"x" * 8_000_000
    data = b"MSG a 1 %d\r\n%b\r\n" % (len(body), body)
    got: list[Frame] = []
    client: Any = Client()
    parser = WireParser(client, lambda found: got.extend(found[b"1"]))

    async def run() -> None:
        for at in range(0, len(data), 32_768):
            await parser.parse(data[at : at + 32_768])
            assert len(parser._parts) <= len(data) // 32_768 + 1

    asyncio.run(asyncio.wait_for(run(), 2))
    assert got == [(b"a", b"", b"", body)]


ODD = {
    "plain": "a b",
    "ünï": "✓",
    "line": "a\r\nb",
    "space": " x ",
    "": "no name",
    "colon:": "c",
    "cut\udcff": "\udc80",
}


def test_any_header_comes_back_and_none_breaks_the_block() -> None:
    message = Outgoing("t", b"", "k\r\n", dict(ODD), id="own\nid", timestamp=1.5, delay=0.25)
    block = write_headers(message, now=7.0, dedupe="d")
    assert block.isascii()
    assert block.count(b"\r\n\r\n") == 1
    read = read_headers(block)
    assert dict(read.envelope.headers) == ODD
    assert (read.envelope.id, read.envelope.key, read.envelope.timestamp) == ("own\nid", "k\r\n", 1.5)
    assert (read.due, read.delay, read.stranger) == (7.25, 0.25, "d")


@pytest.mark.parametrize(
    "lines",
    [b"sluiceway-due: nan", b"sluiceway-due: -1", b"sluiceway-odd: {", b"sluiceway-odd: [1]", b"nothing", b": x"],
)
def test_headers_that_make_no_sense_are_read_all_the_same(lines: bytes) -> None:
    read = read_headers(b"NATS/1.0\r\ncolour: \xff\r\n%b\r\n\r\n" % lines)
    assert read.due == 0.0
    assert read.envelope.headers["colour"] == "\udcff"


@pytest.mark.parametrize(
    ("note", "wait"),
    [
        (b'{"due": 102.5, "delay": 5.0}', 2.5),
        (b'{"due": 99.0, "delay": 5.0}', 0.0),
        (b'{"due": 3700.0, "delay": 5.0}', 5.0),  # by a clock that is an hour ahead
        (b'{"due": 3700.0}', 3600.0),
        (b'{"due": 102.5, "delay": 5.0, "hop": 7}', 2.5),  # of a newer version
        (b"{}", 0.0),
    ],
)
def test_a_note_says_how_long_its_message_must_wait(note: bytes, wait: float) -> None:
    assert msgspec.json.decode(note, type=Note).left(100.0) == wait


def test_the_short_way_reads_what_the_long_way_reads() -> None:
    plain = write_headers(Outgoing("t", b"", timestamp=1234567890.25, id="abc"))
    longer = plain[:-2] + b"x: y\r\n\r\n"
    short, long = read_headers(plain), read_headers(longer)
    assert (short.envelope.id, short.envelope.timestamp) == (long.envelope.id, long.envelope.timestamp)
    assert (long.envelope.id, long.envelope.timestamp) == ("abc", 1234567890.25)


@pytest.mark.parametrize("name", ["abc-1", "with space", "über", "", "a\r\nb", " a", "\udcff"])
def test_the_short_way_writes_what_the_long_way_writes(name: str) -> None:
    for message in (Outgoing("t", b"", timestamp=1.5, id=name), Outgoing("t", b"", name, timestamp=1.5, id="own")):
        short, long = (write_headers(message, dedupe=dedupe) for dedupe in (None, "d"))
        assert short == long.replace(b"Nats-Msg-Id: d\r\n", b"")
        for block in (short, long):
            envelope = read_headers(block).envelope
            # an empty id is none
            assert (envelope.id, envelope.key, envelope.timestamp) == (message.id or None, message.key, 1.5)


def test_an_ack_subject_is_read_with_and_without_a_domain() -> None:
    short = read_delivery(b"$JS.ACK.s.c.2.30.4.5000000000.6")
    assert (short.stream, short.consumer, short.count, short.seq, short.stored, short.pending) == (
        "s",
        "c",
        2,
        30,
        5.0,
        6,
    )
    assert read_delivery(b"$JS.ACK.hub.acc.s.c.2.30.4.5000000000.6.rnd") == short
    assert path_of(b"$JS.ACK.s.c.2.30.4.5000000000.6") == b"s.c"
    assert place_of(b"$JS.ACK.s.c.2.30.4.5000000000.6") == ("s", 30)
    assert place_of(b"$JS.ACK.hub.acc.s.c.2.30.4.5000000000.6.rnd") == ("s", 30)
    assert path_of(b"$JS.ACK.hub.acc.s.c.2.30.4.5000000000.6.rnd") == b"s.c"


def test_consumers_of_groups_and_topics_that_look_alike_have_names_of_their_own() -> None:
    pairs = [("a", "b.c"), ("a", "b_c"), ("a-b", "c"), ("a", "b-c"), ("a/b", "c"), ("a" * 300, "b")]
    names = {consumer_name(group, topic, topic) for group, topic in pairs}
    assert len(names) == len(pairs)
    assert all(len(name) < 200 and not set(name) & set(">*. /\\\t\r\n") for name in names)
