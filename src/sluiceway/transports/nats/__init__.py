"""NATS JetStream, 2.9 or newer, over nats-py.

transport.py    NATSTransport: connect, ensure, publish, subscribe, browse
source.py       NATSSource: receives, and says how it is
pulls.py        pull requests, by free demand
reading.py      messages of what came
hand.py         what a source holds, and how that ends
notes.py        what is written down of messages that went back
order.py        `order_by`: what came too early waits
publishing.py   publishes, confirmed
streams.py      topics and the streams that have them
consumers.py    groups and their durable consumers
headers.py      headers, ack subjects, what a note says
renewer.py      leases, and what renews them from a thread
connection.py   the connection: many questions in one write, reconnects
answers.py      what the server says to them; why not, and what to change
wire.py         what is private of nats-py
settings.py     options, URLs, TLS

What is kept where. The server keeps a message until its stream's limits say otherwise, and for each group who has it
in hand and how often it was handed over. It counts each hand-over, also those that were given back, and keeps nothing
else. So each message that goes back (a retry, a release, one that came before it is due) first gets a *note* in the
stream `sluiceway-notes`: its failures and suspicions, how many hand-overs count nothing, when it is due. The note is
confirmed before the nak is sent, replaces an earlier one, is read when a message comes again, and goes when the message
is acked. A hand-over that no note explains is a suspect's.

What can go wrong, and how it ends:

- A nak that is lost: the message comes when its lease ends, and the note explains it.
- A server killed: it keeps its latest acks and naks in memory for a moment, so some messages come again, as suspects
  where no note explains them. It keeps when a message comes again only until it ends; a note keeps when it is due, so
  it comes and is sent back until then.
- A connection cut while messages are on their way: they come again when their leases end, as suspects.
- A message sent back and acked, whose note could not be deleted: the note harms nobody. It is deleted when all up to
  its message are settled.
- A consumer deleted by hand: it is made anew behind the last message up to which all were settled when it was last
  looked at, at most 5 s before. Hand-overs are counted anew then, failures are not. A stream deleted by hand is made
  anew, without its messages; not at once, since the server (2.9) would delete the new one's files with the old one's.
- A server that stops takes no acks a moment before it closes its connections: they are sent again.
- Acks are not fenced by the server: whoever acks a message ends the hand-over that another has. So what is over its
  lease by our clock is refused as lost, and is not sent.
- Another process's exact topic takes a topic from a pattern of its group; the pattern notices within 30 s, and till
  then both get it.
- A message that waits for its delay counts as held at the server; beyond `max_delayed` of them retries with a delay
  are refused.
- A key's messages while other processes take part in the group: order holds within each process.
"""

try:
    import nats as _nats  # noqa: F401
except ImportError as error:
    raise ImportError("the NATS transport needs nats-py: pip install 'sluiceway[nats]'") from error

from .renewer import NATSRenewer
from .source import NATSSource
from .transport import NATSTransport

__all__ = ["NATSRenewer", "NATSSource", "NATSTransport"]
