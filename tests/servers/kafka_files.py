"""What scripts/servers has fetched of Kafka, and what all its starts share: made once, by the first who needs it."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.servers.server import Server, find, free_port, missing

ROOT = Path(__file__).resolve().parents[2]
JARS = ROOT / "build" / "kafka"
_NAMES = ROOT / "scripts" / "kafka.sha256"
_SHARED = JARS / "shared"
_FORMATTED, _CLASSES = "formatted", "classes.jsa"

STARTED = "Kafka Server started"  # what its log says when it serves clients

# A small heap, the quick compiler alone, nothing in /tmp.
_JAVA = ("-Xmx256m", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xlog:disable")
_LOG = {
    "defaultLogLevel": "warn", "log.kafka.server.KafkaRaftServer": "info",
    "showDateTime": "true", "dateTimeFormat": "HH:mm:ss.SSS",
}  # fmt: skip


def require() -> None:
    """Skip the test where Kafka is not installed, fail in CI; see to what starts share."""
    find("java", package="default-jre-headless")
    if not all(jar.exists() for jar in _jars()):
        missing("Kafka", "run scripts/servers, which needs Maven; on Debian or Ubuntu: apt-get install maven")
    with (JARS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        if not _SHARED.exists():
            _make()


def command(main: str, *arguments: str, java: Sequence[str] = ()) -> list[str]:
    """The command line that runs a class of Kafka's."""
    log = [f"-Dorg.slf4j.simpleLogger.{name}={value}" for name, value in _LOG.items()]
    archive = _SHARED / _CLASSES
    classes = [f"-XX:SharedArchiveFile={archive}"] if archive.exists() else []  # another Java passes it over
    path = ":".join(map(str, _jars()))
    return ["java", *_JAVA, *classes, *log, *java, "-cp", path, main, *arguments]


def format_data(folder: Path, node: int, identity: str) -> None:
    """Make the data folder of a new server. Its cluster is everybody's: what tells clusters apart is where they are."""
    shutil.copytree(_SHARED / _FORMATTED, folder)
    path = folder / "meta.properties"
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))
    write(path, {**lines, "node.id": str(node), "directory.id": identity})


def write(path: Path, lines: Mapping[str, str]) -> None:
    """Write a properties file."""
    path.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))


def _jars() -> list[Path]:
    return [JARS / line.split()[1] for line in _NAMES.read_text().splitlines()]


class _First(Server):
    """A server whose classes are archived when it ends."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        controller = free_port()
        lines = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "log.dirs": str(folder / "data"),
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "controller.listener.names": "CONTROLLER",
        }
        write(folder / "server.properties", lines)

    def command(self) -> Sequence[str]:
        return command("kafka.Kafka", "server.properties", java=[f"-XX:ArchiveClassesAtExit={self.folder / _CLASSES}"])

    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        return STARTED in self.log()


def _make() -> None:
    """Format a data folder with Kafka's own tool, which takes a second, and archive the classes of a running server,
    without which each start takes twice as long."""
    with tempfile.TemporaryDirectory(dir=JARS) as name:
        folder = Path(name)
        first = _First(folder)
        asked = ["format", "--cluster-id", "c2x1aWNld2F5LXRlc3RzLQ", "--config", "server.properties"]
        subprocess.run(command("kafka.tools.StorageTool", *asked), cwd=folder, check=True, capture_output=True)
        shutil.copytree(folder / "data", folder / _FORMATTED)
        first.start().stop()
        shutil.rmtree(folder / "data")
        folder.rename(_SHARED)
        folder.mkdir()  # for the context manager to remove
