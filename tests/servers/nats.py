"""A NATS server with JetStream of the tests' own, with its data in a folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nats

from tests.servers.server import Server, find


class NATSServer(Server):
    """`settings` go into its configuration as they are, such as `{"authorization": {"token": "secret"}}`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None, *, jetstream: bool = True) -> None:
        super().__init__(folder)
        self._program = find("nats-server")
        config: dict[str, Any] = {"listen": f"127.0.0.1:{self.port}", **(settings or {})}
        if jetstream:
            config["jetstream"] = {"store_dir": str(folder / "data"), "max_mem": 1 << 28, "max_file": 1 << 31}
        self._config = folder / "nats.conf"
        self._config.write_text(json.dumps(config))

    def command(self) -> Sequence[str]:
        return [self._program, "-c", str(self._config)]

    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def empty(self) -> None:
        """Delete all streams."""
        client = await nats.connect(self.url())
        manager = client.jetstream()
        for info in await manager.streams_info():
            assert info.config.name is not None
            await manager.delete_stream(info.config.name)
        await client.close()

    async def publish(self, subject: str, body: bytes, headers: Mapping[str, bytes]) -> None:
        """As any program would, with header values of any bytes; stored when it returns."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in headers.items())
        block = b"NATS/1.0\r\n%b\r\n" % lines
        sizes = b"%d %d" % (len(block), len(block) + len(body))
        writer.write(b'CONNECT {"verbose": false, "headers": true, "no_responders": true}\r\nSUB stored 1\r\n')
        writer.write(b"HPUB %b stored %b\r\n%b%b\r\n" % (subject.encode(), sizes, block, body))
        while b'"seq"' not in (line := await asyncio.wait_for(reader.readline(), 5)):
            assert b"ERR" not in line, line
            assert b"HMSG" not in line, f"no stream has {subject!r}"
        writer.close()
