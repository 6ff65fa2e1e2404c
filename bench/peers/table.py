"""Which libraries are measured, in which versions, with which settings."""

from __future__ import annotations

from msgspec import Struct

PINS: dict[str, tuple[str, ...]] = {
    "faststream": (
        "faststream[redis,nats,rabbit]==0.7.8", "redis==8.1.0", "nats-py==2.16.0", "aio-pika==10.2.1",
        "hiredis==3.5.0", "uvloop==0.23.0",
    ),
    "taskiq": (
        "taskiq==0.13.0", "taskiq-redis==1.2.4", "taskiq-nats==0.7.0", "taskiq-aio-pika==0.6.1", "redis==8.1.0",
        "nats-py==2.16.0", "aio-pika==10.2.1", "hiredis==3.5.0", "uvloop==0.23.0",
    ),
    "dramatiq": ("dramatiq[redis,rabbitmq]==2.2.1", "redis==8.1.0", "pika==1.4.4", "hiredis==3.5.0"),
    "arq": ("arq==0.28.0", "hiredis==3.5.0", "uvloop==0.23.0"),
    "celery": ("celery[redis]==5.7.0", "kombu==5.7.0", "pydantic==2.14.3", "hiredis==3.5.0"),
}  # fmt: skip
"""What is installed for each, in an environment of its own. Sluiceway has the one that the bench runs in."""

NAMES = {"sluiceway": "Sluiceway", "faststream": "FastStream", "celery": "Celery"}


class Peer(Struct, frozen=True):
    """One row: a library over a broker. `settings` names what it is run with; `batch`: with a batch handler.

    `floor`: Sluiceway must be at least so many times as fast over the same broker.
    """

    library: str
    broker: str
    settings: str
    batch: bool = False
    floor: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.library == "sluiceway"

    @property
    def name(self) -> str:
        """As the table shows it."""
        name = NAMES.get(self.library, self.library)
        version = next((pin.partition("==")[2] for pin in PINS.get(self.library, ())), "")
        return f"{name} {version}".strip() + (", batches of 100" if self.batch else "")


_SLUICEWAY = "concurrency 10, automatic window; msgspec; ack after the handler"
_FASTSTREAM = "pydantic; ack after the handler"
_TASKIQ = "100 tasks at once; pydantic; ack when executed"
_DRAMATIQ = "8 threads, prefetch 100; sync handler, JSON to a dataclass in it; ack after it"
_CELERY = "10 threads, prefetch 64 each; sync handler, pydantic; acks_late, results ignored"

PEERS = (
    Peer("sluiceway", "redis", _SLUICEWAY),
    Peer("sluiceway", "redis", _SLUICEWAY, batch=True),
    Peer("faststream", "redis", f"stream and group, max_workers 10, max_records 100; {_FASTSTREAM}", floor=25),
    Peer("faststream", "redis", f"stream and group, max_records 100; {_FASTSTREAM}", batch=True),
    Peer("taskiq", "redis", f"stream, xread_count 100; {_TASKIQ}"),
    Peer("dramatiq", "redis", _DRAMATIQ),
    Peer("arq", "redis", "max_jobs 100, poll_delay 10 ms, keep_result 0; pickled dataclass; removed after the handler"),
    Peer("celery", "redis", _CELERY),
    Peer("sluiceway", "nats", _SLUICEWAY),
    Peer("sluiceway", "nats", _SLUICEWAY, batch=True),
    Peer("faststream", "nats", f"pull of 100, max_workers 10; {_FASTSTREAM}", floor=3),
    Peer("faststream", "nats", f"pull of 100; {_FASTSTREAM}", batch=True),
    Peer("taskiq", "nats", f"pull of 100, for 1 s; {_TASKIQ}"),
    Peer("sluiceway", "rabbitmq", _SLUICEWAY),
    Peer("sluiceway", "rabbitmq", _SLUICEWAY, batch=True),
    Peer("faststream", "rabbitmq", f"quorum queue, prefetch 100; {_FASTSTREAM}", floor=4),
    Peer("taskiq", "rabbitmq", f"quorum queue, qos 100; {_TASKIQ}"),
    Peer("dramatiq", "rabbitmq", f"classic queue; {_DRAMATIQ}"),
    Peer("celery", "rabbitmq", f"quorum queue; {_CELERY}"),
)
