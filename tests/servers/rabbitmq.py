"""A RabbitMQ server of the tests' own: one node, with its own Erlang port mapper, all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.servers.server import Server, find, free_port

_SCRIPTS = Path("/usr/lib/rabbitmq/bin")  # Debian's; those in /usr/sbin switch to a user of their own

# An Erlang node that asks the leader of each queue that is named to it; `rabbitmqctl` takes a second for one answer.
_PROBE = """
    Node = list_to_atom("sluiceway%d@localhost"),
    Ask = fun(Again) ->
        Name = list_to_binary(string:trim(io:get_line(""))),
        Name =:= <<>> andalso halt(),
        Held = case rpc:call(Node, rabbit_amqqueue, lookup, [{resource, <<"/">>, queue, Name}]) of
            {ok, Queue} ->
                Leader = rpc:call(Node, amqqueue, get_pid, [Queue]),
                Count = fun rabbit_fifo:query_messages_checked_out/1,
                {ok, {_, Now}, _} = rpc:call(Node, ra, local_query, [Leader, Count]),
                Now;
            _ -> 0
        end,
        io:format("~b~n", [Held]),
        Again(Again)
    end,
    Ask(Ask).
"""


class RabbitMQServer(Server):
    """`settings` are lines of rabbitmq.conf, `erlang` arguments for its virtual machine.

    With `certificate`, `key` and `ca` it takes TLS too, on `tls_port`; with `ask_client` only from those whose
    certificate `ca` has signed.
    """

    ready_in = 60.0

    def __init__(
        self,
        folder: Path,
        *,
        settings: Sequence[str] = (),
        certificate: Path | None = None,
        key: Path | None = None,
        ca: Path | None = None,
        ask_client: bool = False,
        erlang: str = "",
    ) -> None:
        super().__init__(folder)
        self._program = self._script("rabbitmq-server")
        self._control = self._script("rabbitmqctl")
        self._epmd_port = free_port()
        self._dist_port = free_port()
        self._erlang = f"+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none {erlang}"
        self.tls_port = free_port() if certificate is not None else None
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "num_acceptors.tcp = 2",
            "disk_free_limit.absolute = 10MB",
            "log.console = true",
            "log.file = false",
            *settings,
        ]
        if self.tls_port is not None:
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {ca}",
                f"ssl_options.certfile = {certificate}",
                f"ssl_options.keyfile = {key}",
                "ssl_options.verify = verify_peer",
                f"ssl_options.fail_if_no_peer_cert = {str(ask_client).lower()}",
            ]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (folder / "enabled_plugins").write_text("[].\n")

    @staticmethod
    def _script(name: str) -> str:
        if (_SCRIPTS / name).exists():
            return str(_SCRIPTS / name)
        return shutil.which(name) or find(name)

    def command(self) -> Sequence[str]:
        # The port mapper would go to the background and outlive the server; here it is of the server's process group.
        mapper = f"epmd -port {self._epmd_port} -address 127.0.0.1"
        return ["sh", "-c", f"{mapper} & exec {self._program}"]

    def environment(self) -> Mapping[str, str]:
        folder = str(self.folder)
        return {
            "HOME": folder,  # where the cookie is
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"sluiceway{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": self._erlang,
        }

    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    def is_ready(self) -> bool:
        """Whether it takes connections; also whether what quorum queues need has started, which comes later."""
        return "Server startup complete" in self.log()[self._began :] and super().is_ready()

    _began = 0
    _probe: subprocess.Popen[str] | None = None

    def start(self) -> RabbitMQServer:
        path = self.folder / "server.log"
        self._began = len(path.read_text(errors="replace")) if path.exists() else 0
        return super().start()

    def _end(self, number: signal.Signals) -> None:
        if self._probe is not None:
            self._probe.kill()
            self._probe.communicate()
            self._probe = None
        group = self.process.pid if self.process is not None else None
        super()._end(number)
        if group is not None:
            with contextlib.suppress(ProcessLookupError):  # the port mapper outlives a server that ended by itself
                os.killpg(group, signal.SIGKILL)

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl`; it takes a second or two."""
        environment = {**os.environ, **self.environment()}
        done = subprocess.run(
            [self._control, "-q", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def held(self, queue: str) -> int:
        """How many messages of a quorum queue consumers hold, as its leader counts now; what is listed is old."""
        if self._probe is None or self._probe.poll() is not None:
            self._probe = subprocess.Popen(
                ["erl", "-noshell", "-sname", f"probe{self.port}@localhost", "-eval", _PROBE % self.port],
                env={**os.environ, **self.environment()}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                cwd=self.folder, text=True,
            )  # fmt: skip
        assert self._probe.stdin is not None
        assert self._probe.stdout is not None
        self._probe.stdin.write(queue + "\n")
        self._probe.stdin.flush()
        return int(self._probe.stdout.readline())

    def rows(self, what: str, *columns: str) -> list[dict[str, object]]:
        """What `rabbitmqctl list_…` lists."""
        listed: list[dict[str, object]] = json.loads(self.control(f"list_{what}", *columns, "--formatter", "json"))
        return listed
