"""A Redis server of the tests' own, which keeps all that it has confirmed when it is killed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redis import Connection, Redis
from redis.exceptions import RedisError

from tests.servers.server import Server, find


class RedisServer(Server):
    """`settings` are lines of its configuration, such as `{"requirepass": "secret"}`; `tls` the files of a server that
    speaks TLS alone, and then wants a certificate of its clients too if it is told so."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        *,
        tls: Mapping[str, Path] | None = None,
        ask_client: bool = False,
    ) -> None:
        super().__init__(folder)
        self._program = find("redis-server")
        self.settings = dict(settings or {})
        self.tls = tls
        lines = {
            "bind": "127.0.0.1", "port": str(self.port), "dir": f'"{folder}"', "save": '""', "appendonly": "yes",
            "appendfsync": "always", "auto-aof-rewrite-percentage": "0",
        }  # fmt: skip
        if tls is not None:
            lines |= {
                "port": "0", "tls-port": str(self.port),
                "tls-cert-file": str(tls["cert"]), "tls-key-file": str(tls["key"]),
                "tls-ca-cert-file": str(tls["ca"]), "tls-auth-clients": "yes" if ask_client else "no",
            }  # fmt: skip
        self._config = folder / "redis.conf"
        self._config.write_text("".join(f"{name} {value}\n" for name, value in {**lines, **self.settings}.items()))

    def command(self) -> Sequence[str]:
        return [self._program, str(self._config)]

    def url(self) -> str:
        return f"redis{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Whether it takes commands: it has loaded its file."""
        if self.tls is not None:
            return super().is_ready()
        line = Connection(port=self.port, protocol=2)
        try:
            line.send_command("PING")
            line.read_response()
        except (RedisError, OSError) as error:
            return "NOAUTH" in str(error) or "Authentication required" in str(error)
        finally:
            with contextlib.suppress(RedisError):
                line.disconnect()
        return True

    def client(self) -> Redis:
        """A plain client, as a program without Sluiceway has."""
        return Redis(port=self.port, protocol=2, password=self.settings.get("requirepass"))

    def ask(self, *command: Any) -> Any:
        """One command's answer as it comes. Raises RedisError for a refusal."""
        line = Connection(port=self.port, protocol=2, password=self.settings.get("requirepass"))
        try:
            line.send_command(*command)
            return line.read_response()
        finally:
            line.disconnect()
