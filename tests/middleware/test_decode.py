"""The decoding middleware: bodies as their headers say, within a bound."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import lz4.frame
import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sluiceway import DecodeError, Message, OptionError, Retry
from sluiceway.message import Handler
from sluiceway.middleware._compression import decompress
from sluiceway.middleware.decode import Decode
from tests.middleware.kit import ONCE, Shop

WAYS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "deflate": zlib.compress,
    "lz4": lz4.frame.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


class Order(msgspec.Struct):
    id: str
    cents: int


class Model(BaseModel):
    id: str
    cents: int


ORDER = {"id": "A1", "cents": 5}
ONE = Order("A1", 5)


async def payloads(body: bytes, headers: dict[str, str], annotation: Any = Order, **options: Any) -> list[Any]:
    """What the handler gets; raises DecodeError with the text of the dead letter when it gets nothing."""
    shop = Shop(middleware=[Decode(**options)])
    got: list[Any] = []

    async def handle(message: Message[Any]) -> None:
        assert message.body == body
        got.append(message.payload)

    shop.app.consumer("t", payload=annotation, retry=ONCE)(handle)
    await shop.run(body, headers=headers)
    for dead in await shop.dead():
        assert dead.body == body  # as it came
        assert dead.headers["sluiceway-dead-type"] == "sluiceway.errors.DecodeError"
        raise DecodeError(dead.headers["sluiceway-dead-error"])
    return got


pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("header", ["content-encoding", "Content-Encoding"])
async def test_a_compressed_body_is_undone_and_decoded_to_the_handlers_type(way: str, header: str) -> None:
    body = WAYS[way](msgspec.json.encode(ORDER))
    assert await payloads(body, {header: way}) == [ONE]


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/vnd.shop+json", "TEXT/JSON", ""]
)
async def test_json_is_told_by_its_content_type_and_is_what_a_message_without_one_is(kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    assert await payloads(msgspec.json.encode(ORDER), headers) == [ONE]


@pytest.mark.parametrize("kind", ["application/msgpack", "application/x-msgpack", "application/vnd.shop+msgpack"])
@pytest.mark.parametrize(("annotation", "expected"), [(Order, ONE), (Model, Model(**ORDER)), (Any, ORDER)])
async def test_messagepack_is_told_by_its_content_type(kind: str, annotation: Any, expected: Any) -> None:
    assert await payloads(msgspec.msgpack.encode(ORDER), {"content-type": kind}, annotation) == [expected]


async def test_pydantic_models_inside_other_types_come_from_messagepack_too() -> None:
    headers = {"content-type": "application/msgpack"}
    assert await payloads(msgspec.msgpack.encode([ORDER]), headers, list[Model]) == [[Model(**ORDER)]]


async def test_several_compressions_are_undone_from_the_last_to_the_first() -> None:
    body = zlib.compress(gzip.compress(b'"x"'))
    assert await payloads(body, {"content-encoding": "gzip, deflate"}, str) == ["x"]


async def test_for_bytes_it_is_the_undone_body_whatever_the_content_type() -> None:
    headers = {"content-encoding": "gzip", "content-type": "image/png"}
    assert await payloads(gzip.compress(b"pixels"), headers, bytes) == [b"pixels"]


async def test_decoders_of_ones_own_go_by_content_type() -> None:
    decoders = {"text/CSV": lambda body: body.decode().split(",")}
    assert await payloads(b"a,b", {"content-type": "text/csv; header=absent"}, decoders=decoders) == [["a", "b"]]
    with pytest.raises(DecodeError, match="the body is not text/csv: UnicodeDecodeError"):
        await payloads(b"\xff", {"content-type": "text/csv"}, decoders=decoders)


UNDECODABLE: list[tuple[bytes, dict[str, str], str]] = [
    (b"{}", {}, "the body is not Order: Object missing required field `id`"),
    (b"\xc1", {"content-type": "application/msgpack"}, "the body is not Order: MessagePack data is malformed"),
    (b"{}", {"content-type": "text/xml"}, "there is no decoder for content-type 'text/xml'; known: application/j"),
    (b"{}", {"content-encoding": "br"}, "there is no content-encoding 'br'; known: identity, gzip, x-gzip, zlib"),
    *((b"not compressed", {"content-encoding": way}, f"the body is not {way}: ") for way in WAYS),
    *((data(b"{}" * 500)[:-5], {"content-encoding": way}, f"the body is not {way}: ") for way, data in WAYS.items()),
    *(
        (data(b"{}") + data(b"{}"), {"content-encoding": way}, f"the body has data after its {way} ends")
        for way, data in WAYS.items()
    ),
]


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    UNDECODABLE,
    ids=map(str, range(len(UNDECODABLE))),  # compressed bytes tell the time
)
async def test_what_cannot_be_decoded_is_a_dead_letter_that_says_why(
    body: bytes, headers: dict[str, str], said: str
) -> None:
    with pytest.raises(DecodeError) as caught:
        await payloads(body, headers)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_over_the_bound_is_a_dead_letter_and_one_of_just_the_bound_is_not(way: str) -> None:
    assert await payloads(WAYS[way](b"x" * 1000), {"content-encoding": way}, bytes, max_bytes=1000) == [b"x" * 1000]
    with pytest.raises(DecodeError, match=f"more than 999 bytes when its {way} is undone"):
        await payloads(WAYS[way](b"x" * 1000), {"content-encoding": way}, bytes, max_bytes=999)


BOMB = """
import resource, sys
from sluiceway import DecodeError
from sluiceway.middleware._compression import decompress
import lz4.frame, zstandard
body = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decompress(body, sys.argv[1], 1_000_000)
except DecodeError as error:
    assert "more than 1000000 bytes" in str(error), error
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_bomb_costs_no_more_memory_than_the_bound_and_a_little(way: str) -> None:
    bomb = WAYS[way](bytes(100_000_000))
    done = subprocess.run([sys.executable, "-c", BOMB, way], input=bomb, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 40_000  # KiB


@given(data=st.binary(max_size=3000), way=st.sampled_from(sorted(WAYS)), cut=st.integers(0, 3000), limit=st.integers(1))
@settings(max_examples=200, deadline=None)
def test_whatever_comes_is_undone_or_a_decode_error(data: bytes, way: str, cut: int, limit: int) -> None:
    limit = min(limit, 10_000)
    body = WAYS[way](data)
    if len(data) <= limit:
        assert decompress(body, way, limit) == data
    for broken in (body[:cut], data, body[:cut] + data):
        if broken != body:
            try:
                assert len(decompress(broken, way, limit)) <= limit
            except DecodeError:
                pass


@pytest.mark.parametrize(("way", "library"), [("lz4", "lz4.frame"), ("zstd", "zstandard")])
async def test_without_its_library_an_encoding_says_what_to_install(
    way: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DecodeError, match=r"nothing here undoes .*: pip install 'sluiceway\[compression\]'"):
        await payloads(WAYS[way](b"{}"), {"content-encoding": way})


async def test_middleware_further_out_sees_the_body_and_further_in_the_payload() -> None:
    seen: list[Any] = []

    async def look(message: Message[Any], call_next: Handler) -> Any:
        seen.append(message.payload)
        return await call_next(message)

    shop = Shop(middleware=[look, Decode()])

    @shop.app.consumer("t", middleware=[look], retry=Retry())
    async def handle(message: Message[int]) -> None: ...

    await shop.run(5)
    assert seen == [b"5", 5]


async def test_a_payload_type_that_cannot_be_is_told_at_start() -> None:
    class Foreign: ...

    shop = Shop(middleware=[Decode()])

    @shop.app.consumer("t", payload=Foreign)
    async def handle(message: Message[Any]) -> None: ...

    with pytest.raises(OptionError, match="handle: payload type Foreign cannot be decoded from JSON"):
        await shop.run()


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, None, "1"])
def test_a_bound_that_cannot_be_is_an_option_error(wrong: Any) -> None:
    with pytest.raises(OptionError, match="Decode: max_bytes must be 1 or more bytes"):
        Decode(max_bytes=wrong)
