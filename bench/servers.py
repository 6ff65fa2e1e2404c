"""The servers of the brokers: started for one case, on the core that the measures leave free."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.server import Server

from .child import MeasureFailed, first_core

PROGRAMS = {"redis": "redis-server", "nats": "nats-server", "rabbitmq": "rabbitmq-server"}  # and Debian's packages


@contextlib.contextmanager
def server(name: str, folder: Path) -> Iterator[str]:
    """The URL of a server of that name; it ends with the block. Raises MeasureFailed where it cannot be started.

    Redis syncs its append-only file each second, as it does unless told otherwise; the others are as they come.
    """
    program = PROGRAMS.get(name)
    if program is not None and shutil.which(program) is None:
        raise MeasureFailed(f"{program} is not installed; on Debian or Ubuntu: apt-get install {program}")
    try:
        made = _made(name, folder)
    except pytest.skip.Exception as error:  # how tests are told that one is missing
        raise MeasureFailed(str(error)) from None
    try:
        with _on(first_core()):  # and so are all threads and processes that it starts
            try:
                made.start()
            except RuntimeError as error:
                raise MeasureFailed(str(error)) from error
        yield made.url()
    finally:
        made.kill()


def _made(name: str, folder: Path) -> Server:
    if name == "redis":
        from tests.servers.redis import RedisServer

        return RedisServer(folder, {"appendfsync": "everysec"})
    if name == "nats":
        from tests.servers.nats import NATSServer

        return NATSServer(folder)
    if name == "kafka":
        from tests.servers.kafka import Kafka

        return Kafka(folder, java=("-Xmx1g", "-XX:TieredStopAtLevel=4"))  # tests have it compile in haste
    from tests.servers.rabbitmq import RabbitMQServer

    return RabbitMQServer(folder)


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
