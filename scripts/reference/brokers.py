"""The page of what each broker gives."""

from __future__ import annotations

from sluiceway.app import open_transport
from sluiceway.transport import Features

HEAD = """\
# Brokers

The broker is named by a URL: `App("redis://localhost")`. Without one it is SQLite in the working folder. The consumers
stay the same; what a broker cannot give is refused at start, where an option needs it. Made from the code by
`make docs`. Why which client library is used, with the measurements: [clients](../reference/clients.md).

"""

BROKERS = {  # a URL to make one with, what to install, the page
    "memory": ("memory://", "–", "in this process; for tests"),
    "SQLite": ("sqlite:///sluiceway.db", "–", "one file, all processes of one machine"),
    "[Redis Streams](redis.md)": ("redis://localhost", "`sluiceway[redis]`", "Redis 7 and later, Valkey"),
    "[NATS JetStream](nats.md)": ("nats://localhost", "`sluiceway[nats]`", "nats-server 2.9 and later"),
    "[RabbitMQ](rabbitmq.md)": ("amqp://localhost", "`sluiceway[rabbitmq]`", "RabbitMQ 3.10 and later"),
}

MEANINGS = {
    "durable": "what was published survives the death of every process",
    "retains": "messages are kept whether a group wants them or not: a group may begin at the earliest, or at a time",
    "order": "how far `order_by` holds: over the whole group, within one process, or not",
    "delay": "who holds a retry until it is due",
    "atomic": "what a handler publishes and its ack are one transaction; else the first is confirmed before the second",
    "park": "a message can wait at the broker behind an earlier one of its key",
    "release": "a message can be handed back at once, uncounted",
    "lease": "a delivery comes back when its process stands still; else when its connection ends",
    "max_payload": "bytes, the most that a body may have unless an option says otherwise",
    "wildcards": "topics of consumers may have `*` and `#`",
    "browse": "dead letters can be listed and replayed",
    "backlog": "the broker says how much waits",
    "shares": "the processes of a group share its messages one by one; else each has whole partitions",
}


def page() -> str:
    features = {name: open_transport(url).features for name, (url, _, _) in BROKERS.items()}
    lines = [HEAD, "| | URL | install | needs |\n| --- | --- | --- | --- |\n"]
    lines += [f"| {name} | `{url}` | {install} | {needs} |\n" for name, (url, install, needs) in BROKERS.items()]
    lines.append("\n## Features\n\n")
    lines.append(f"| | {' | '.join(name.split(']')[0].strip('[') for name in BROKERS)} |\n")
    lines.append("| --- |" + " --- |" * len(BROKERS) + "\n")
    for feature in Features.__struct_fields__:
        cells = " | ".join(_cell(getattr(features[name], feature)) for name in BROKERS)
        lines.append(f"| `{feature}`: {MEANINGS[feature]} | {cells} |\n")
    lines.append(
        "\nWhich guarantee was shown on which of them is [told by the tests](../reference/guarantees.md); what happens "
        "when servers\nand connections fail, [by the fault matrix](../reference/faults.md). `compose.yaml` starts all "
        "of them:\n`docker compose up -d --wait`.\n"
    )
    return "".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
