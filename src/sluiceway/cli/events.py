"""What a run tells: to the screen, as JSON lines with `--json`, and from a worker to its parent."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from .topology import ConsumerView


class Started(Struct, frozen=True, kw_only=True, tag_field="event", tag="started"):
    """Every source is open (with workers: in every worker). `workers` are their process ids.

    `file` is where the broker's file is, when its URL says so only from this folder.
    """

    app: str
    how: str
    broker: str
    file: str | None = None
    pid: int
    workers: tuple[int, ...] = ()
    consumers: tuple[ConsumerView, ...] = ()


class ConsumerStatus(Struct, frozen=True, kw_only=True):
    """One consumer at one moment; counts are messages since the start.

    `failed` are attempts that failed. The others say how deliveries ended: `handled` were acknowledged; `retried` come
    again; `dead_lettered` do not, dropped ones among them, and also those whose handler succeeded and asked for it;
    `released` went back untouched. `in_hand` are received and unsettled. `waiting` at the broker: None, not known.
    """

    consumer: str
    state: str
    reason: str | None = None
    restarts: int = 0
    handled: int = 0
    rate: float = 0.0
    in_hand: int = 0
    window: int = 0
    failed: int = 0
    retried: int = 0
    dead_lettered: int = 0
    released: int = 0
    waiting: int | None = None


class Status(Struct, frozen=True, kw_only=True, tag_field="event", tag="status"):
    """The consumers after `seconds` of running."""

    seconds: float
    consumers: tuple[ConsumerStatus, ...]
    workers: tuple[int, ...] = ()


class WorkerChanged(Struct, frozen=True, kw_only=True, tag_field="event", tag="worker"):
    """A worker process began or ended. `code` is its exit code, negative for the signal that killed it."""

    worker: int
    pid: int
    state: str
    code: int | None = None


class Stopped(Struct, frozen=True, kw_only=True, tag_field="event", tag="stopped"):
    """The end: `code` is the exit code, `reason` why it is not 0.

    Of the drain: `drain_seconds`; `drain_released` went back unstarted, `cancelled` were cut off while running and
    `unsettled` stayed with the broker, to come back by themselves. `opened`: whether every source had been open.
    """

    code: int
    reason: str | None
    seconds: float
    drain_seconds: float
    handled: int
    failed: int
    retried: int
    dead_lettered: int
    drain_released: int
    cancelled: int
    unsettled: int
    opened: bool = True


Event = Started | Status | WorkerChanged | Stopped

_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_encoder = msgspec.json.Encoder()


def encode(event: Event) -> bytes:
    """One JSON line."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    """The event of a line. Raises msgspec.DecodeError for anything else."""
    return _decoder.decode(line)


_WORST = ("failed", "blocked", "connecting", "starting", "draining", "paused", "running", "stopped")


def together(rows: Iterable[ConsumerStatus]) -> ConsumerStatus:
    """One consumer over several workers: counts add up, the state is the worst one's."""
    parts = list(rows)
    worst = min(parts, key=lambda one: _WORST.index(one.state) if one.state in _WORST else 0)
    known = [one.waiting for one in parts if one.waiting is not None]
    return ConsumerStatus(
        consumer=worst.consumer,
        state=worst.state,
        reason=worst.reason,
        restarts=sum(one.restarts for one in parts),
        handled=sum(one.handled for one in parts),
        rate=sum(one.rate for one in parts),
        in_hand=sum(one.in_hand for one in parts),
        window=sum(one.window for one in parts),
        failed=sum(one.failed for one in parts),
        retried=sum(one.retried for one in parts),
        dead_lettered=sum(one.dead_lettered for one in parts),
        released=sum(one.released for one in parts),
        waiting=max(known) if known else None,
    )
