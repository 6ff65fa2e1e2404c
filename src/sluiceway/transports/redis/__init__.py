"""Redis Streams: each topic is a stream of that name, each group a consumer group on it.

transport.py   RedisTransport: connect, publish, browse
source.py      RedisSource: receive and settle
reception.py   what a source reads, and what it has in hand
settling.py    how deliveries end: which commands, and what is known of those sent before
groups.py      consumer groups, and the server's settings
keys.py        the keys of a topic and of a group
entries.py     stream entries from and to messages
lua.py         what the scripts have in common, and how the lanes of keys in order are kept
taking.py      the scripts that receive, with and without order
scripts.py     what else must happen in one step
wire.py        one connection: hiredis behind a protocol of asyncio
settings.py    the URL and its options
renewer.py     leases, from a thread

Beside the topic's stream a group has one for its retries, a sorted set of what waits for its time, and one of leases:
a lease belongs to a source and covers all that it holds. Released messages stay in the group's pending list, where they
belong to the consumer `sluiceway:free` until a source takes them. A `bell` in the retry stream wakes one that waits.
"""

from .renewer import RedisRenewer
from .source import RedisSource
from .transport import RedisTransport

__all__ = ["RedisRenewer", "RedisSource", "RedisTransport"]
