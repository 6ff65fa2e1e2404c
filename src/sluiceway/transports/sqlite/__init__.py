"""The embedded broker: one SQLite file that all processes of one machine can share.

transport.py   SQLiteTransport: connect, publish, browse
source.py      SQLiteSource: receive and settle, as the event loop sees them
io_thread.py   the one thread that runs SQL; group commit
reception.py   claims that wait, what wakes them, owners and their leases
store.py       publish, claim, settle, browse in SQL
routing.py     groups' queues, owners, and which messages go where
schema.py      the file: tables, opening, and what is said when it cannot be opened
liveness.py    locked files that say who lives
doorbell.py    datagrams that wake other processes
"""

from .renewer import SQLiteRenewer
from .source import SQLiteSource
from .transport import SQLiteTransport

__all__ = ["SQLiteRenewer", "SQLiteSource", "SQLiteTransport"]
