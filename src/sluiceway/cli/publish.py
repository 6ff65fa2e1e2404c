"""`sluiceway publish`: payloads from arguments, a file or standard input, in batches."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import io
import os
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
from msgspec import Struct

from .._decisions.topics import matches
from ..app import App
from ..errors import PublishError
from ..message import Outgoing, make_outgoing
from .exits import GAVE_UP, Fault
from .find import find_broker, is_private
from .groups import make_groups_of
from .progress import Bar
from .words import hint, many

EPILOG = """\b
Examples:
  sluiceway publish greetings '"Ada"'
  sluiceway publish greetings --text Ada Grace
  sluiceway publish payments.created --file payments.jsonl --key-field id
  zcat flights.jsonl.gz | sluiceway publish flights
  sluiceway publish reminders '{"to": "Ada"}' --delay 60 --header source=cron

\b
Which broker: --url, else SLUICEWAY_URL, else that of --app, SLUICEWAY_APP, the
app in pyproject.toml or in this folder, else sqlite:///sluiceway.db here.
RabbitMQ keeps nothing for a consumer that never ran; for those of that app, the
queues are made first, so that the messages wait for them as elsewhere.

\b
Exit codes: 0 all is published, 1 the broker refused messages, 2 wrong use or a
bad line, 3 no broker, 130 interrupted. What was published is said each time."""

CHUNK = 64 * 1024
BATCH = 1_000


class Making(Struct, frozen=True, kw_only=True):
    """How a payload becomes a message."""

    topic: str
    text: bool
    key: str | None
    key_field: str | None
    headers: dict[str, str]
    delay: float
    limit: int

    def message(self, raw: bytes, where: str) -> Outgoing:
        """The message of an argument or a line. Raises Fault that says where and why."""
        body, value = raw, None
        if self.text:
            body = msgspec.json.encode(_utf8(raw, where))
        else:
            try:
                value = msgspec.json.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Fault(f"{where} is not JSON ({error}): {_short(raw)}") from None
        if len(body) > self.limit:
            raise Fault(f"{where} has {len(body):,} bytes and the broker's limit is {self.limit:,}")
        key = self.key if self.key_field is None else _key(value, self.key_field, where)
        return make_outgoing(self.topic, body, key=key, headers=self.headers, delay=self.delay)


@click.command(epilog=EPILOG, short_help="Publish payloads: arguments, a file or standard input.")
@click.argument("topic")
@click.argument("payloads", metavar="[JSON...]", nargs=-1)
@click.option("--file", "-f", "file", metavar="FILE", help="JSON lines to publish; - is standard input.")
@click.option("--text", is_flag=True, help="Take arguments and lines as plain strings, not as JSON.")
@click.option("--key", help="The key of every message.")
@click.option("--key-field", metavar="NAME", help="The field of each JSON object that is its key.")
@click.option("headers", "--header", multiple=True, metavar="NAME=VALUE", help="A header of every message. Repeatable.")
@click.option("--delay", type=float, default=0.0, metavar="SECONDS", help="Nobody receives them for so long.")
@click.option("--url", metavar="URL", help="The broker.")
@click.option("--app", "reference", metavar="MODULE:APP", help="The app whose broker it is.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object with the id of each message.")
def publish(
    topic: str,
    payloads: tuple[str, ...],
    file: str | None,
    text: bool,
    key: str | None,
    key_field: str | None,
    headers: tuple[str, ...],
    delay: float,
    url: str | None,
    reference: str | None,
    as_json: bool,
) -> None:
    """Publish to TOPIC: each JSON argument, or each line of a file or of standard input. Blank lines are skipped."""
    if key is not None and key_field is not None:
        raise click.UsageError("give --key or --key-field, not both")
    if key_field is not None and text:
        raise click.UsageError("--key-field needs JSON objects, and --text makes strings")
    app = _shared_broker(reference, url)
    making = Making(
        topic=topic,
        text=text,
        key=key,
        key_field=key_field,
        headers=dict(map(_header, headers)),
        delay=delay,
        limit=app.transport.features.max_payload,
    )
    make_outgoing(topic, b"", headers=making.headers, delay=delay)  # refuses what is wrong before anything is read
    _hint_unread(app, topic)
    publisher = Publisher(app, making, as_json)
    if payloads == ("-",):
        payloads, file = (), file or "-"
    if payloads and file:
        raise click.UsageError("give payloads as arguments or a --file, not both")
    if payloads:
        publisher.run(_at_once([_argument(one, making) for one in payloads]), None)
    else:
        with _lines(file) as (stream, size):
            publisher.run(_batches(stream, making), size)


def _shared_broker(reference: str | None, url: str | None) -> App:
    app = find_broker(reference, url)
    if is_private(app):
        raise Fault(
            f"{app.broker} lives inside one process: what is published here would reach nobody; "
            f"name another broker with --url"
        )
    return app


def _hint_unread(app: App, topic: str) -> None:
    """Say when the topic looks like a misspelt one of the app's consumers."""
    read = [name for one in app.consumers.values() for name in one.topics]
    if not any(matches(pattern, topic) for pattern in read):
        hint(f"no consumer of the app reads {topic!r}", topic, read)


class Publisher:
    """Publishes batches, counts, and says what was published however it ends."""

    def __init__(self, app: App, making: Making, as_json: bool) -> None:
        self.count = 0
        self._app = app
        self._making = making
        self._as_json = as_json

    def run(self, batches: AsyncIterator[Batched], size: int | None) -> None:
        """Publish all. Raises Fault and what the broker raises, after saying what was published before."""
        try:
            asyncio.run(self._publish(batches, size))
        except (Fault, PublishError) as error:
            before = self._said("published before that, and nothing after")
            code = error.code if isinstance(error, Fault) else GAVE_UP
            raise Fault(f"{error}\n{before}{self._without_app(error)}", code) from None
        except BaseException:
            if self.count:
                click.echo(self._said("published, perhaps a batch more"), err=True)
            raise
        click.echo(self._said("published"), err=self._as_json)

    async def _publish(self, batches: AsyncIterator[Batched], size: int | None) -> None:
        async with self._app:
            await make_groups_of(self._app, self._making.topic)
            with Bar(size) as bar:
                async for batch in batches:
                    await self._send(batch.messages)
                    bar.advance(batch.size, self.count)
                    if batch.fault is not None:
                        raise batch.fault

    async def _send(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        try:
            await self._app.transport.publish(messages)
        except PublishError as error:
            failed = {id(one) for one in error.failed}
            accepted = [one for one in messages if id(one) not in failed] if failed else []
            self._done(accepted)
            raise
        self._done(messages)

    def _done(self, messages: Sequence[Outgoing]) -> None:
        self.count += len(messages)
        if self._as_json:
            lines = [msgspec.json.encode({"id": one.id, "topic": one.topic, "key": one.key}) for one in messages]
            click.echo(b"".join(line + b"\n" for line in lines), nl=False)

    def _without_app(self, error: Fault | PublishError) -> str:
        """What else to do where the broker keeps nothing for consumers that never ran, and none are known here."""
        if isinstance(error, Fault) or self._app.consumers or self._app.transport.features.retains:
            return ""
        return "\nif its consumers never ran, name its app with --app: what they need at the broker is made first"

    def _said(self, what: str) -> str:
        return f"{many(self.count, 'message')} {what}: {self._making.topic} on {self._app.broker}"


# -- where payloads come from ----------------------------------------------------------------------------------------


class Batched(Struct, frozen=True, kw_only=True):
    """Messages to publish together, how many bytes of input they were, and what was wrong with the line after them."""

    messages: list[Outgoing]
    size: int
    fault: Fault | None = None


async def _at_once(messages: list[Outgoing]) -> AsyncIterator[Batched]:
    for start in range(0, len(messages), BATCH):
        yield Batched(messages=messages[start : start + BATCH], size=0)


def _hand_over(put: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> bool:
    """Run `put` in another thread's loop and wait for it; False when that loop has ended."""
    try:
        asyncio.run_coroutine_threadsafe(put, loop).result()
    except (RuntimeError, concurrent.futures.CancelledError):
        put.close()
        return False
    return True


@contextlib.contextmanager
def _lines(file: str | None) -> Iterator[tuple[BinaryIO, int | None]]:
    """The input, and its size where that is known."""
    if file is None or file == "-":
        if file is None and sys.stdin.isatty():
            raise click.UsageError("give payloads as arguments, a --file, or lines on standard input")
        yield _standard_input(), None
        return
    try:
        opened = Path(file).open("rb")  # noqa: SIM115 # closed below; only opening it is tried
    except OSError as error:
        raise Fault(f"{file}: {error.strerror}") from None
    with opened:
        yield opened, Path(file).stat().st_size if Path(file).is_file() else None


def _standard_input() -> BinaryIO:
    """Standard input without a buffer, so that lines go out as they come."""
    try:
        return io.FileIO(sys.stdin.fileno(), closefd=False)
    except (OSError, ValueError):  # not a real file, in a test
        return sys.stdin.buffer


async def _batches(stream: BinaryIO, making: Making) -> AsyncIterator[Batched]:
    """The lines of a stream as messages, in batches, as soon as they are there."""
    rest, number = b"", 0
    async for chunk in _chunks(stream):
        *lines, rest = (rest + chunk).split(b"\n") if chunk else [rest, b""]
        if len(rest) > making.limit:
            fault = Fault(f"line {number + len(lines) + 1} is longer than the broker's limit of {making.limit:,} bytes")
            lines, rest = [*lines], b""
        else:
            fault = None
        for start in range(0, len(lines), BATCH):
            part = lines[start : start + BATCH]
            batch = _batch(part, number, making)
            number += len(part)
            yield batch
        if fault is not None:
            yield Batched(messages=[], size=0, fault=fault)


def _batch(lines: list[bytes], number: int, making: Making) -> Batched:
    """The messages of lines, up to the first bad one; `number` lines were before."""
    messages: list[Outgoing] = []
    size = sum(map(len, lines)) + len(lines)
    for offset, line in enumerate(lines, number + 1):
        text = line.strip()
        if offset == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        if text:
            try:
                messages.append(making.message(text, f"line {offset}"))
            except Fault as fault:
                return Batched(messages=messages, size=size, fault=fault)
    return Batched(messages=messages, size=size)


async def _chunks(stream: BinaryIO) -> AsyncIterator[bytes]:
    """Chunks of a stream, an empty one at its end, read by a thread of its own: the loop lives while a pipe is silent.

    The thread is a daemon and holds no lock, so that it never keeps the process.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue(2)

    def read() -> None:
        chunk: bytes | OSError = b"-"
        while chunk and not isinstance(chunk, OSError):
            try:
                chunk = stream.read(CHUNK)
            except OSError as error:
                chunk = error
            except ValueError:  # closed: the command has ended before its input
                return
            if not _hand_over(chunks.put(chunk), loop):
                return

    threading.Thread(target=read, name="input", daemon=True).start()
    while True:
        chunk = await chunks.get()
        if isinstance(chunk, OSError):
            raise Fault(f"the input cannot be read: {chunk.strerror}")
        yield chunk
        if not chunk:
            return


# -- small things ----------------------------------------------------------------------------------------------------


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--header takes name=value, got {text!r}")
    return name, value


def _key(value: Any, field: str, where: str) -> str | None:
    if not isinstance(value, dict):
        raise Fault(f"{where} is no JSON object, so it has no field {field!r}")
    if field not in value:
        raise Fault(f"{where} has no field {field!r}; its fields: {', '.join(value) or 'none'}")
    key = value[field]
    if key is None or isinstance(key, str):
        return key
    if isinstance(key, (int, float)) and not isinstance(key, bool):
        return str(key)
    raise Fault(
        f"{where}: the key field {field!r} must be a string or a number, got {_short(msgspec.json.encode(key))}"
    )


def _argument(text: str, making: Making) -> Outgoing:
    """The message of an argument. Raises Fault; for one that is not JSON it shows how to write it."""
    where = f"the argument {_short(os.fsencode(text))}"
    try:
        if not making.text:
            msgspec.json.decode(os.fsencode(text))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        quoted = msgspec.json.encode(text.encode(errors="replace").decode()).decode().replace("'", "'\\''")
        hint = f"; for a string write '{quoted}', or use --text" if len(text) <= 60 else ""
        if text.startswith(("{", "[")):
            hint = "; write JSON in single quotes, so that the shell leaves its own double quotes"
        raise Fault(f"{where} is not JSON ({error}){hint}") from None
    return making.message(os.fsencode(text), where)


def _utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Fault(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _short(raw: bytes, limit: int = 60) -> str:
    text = raw[: limit * 4].decode(errors="replace")
    return repr(text if len(text) <= limit else text[:limit] + "…")
