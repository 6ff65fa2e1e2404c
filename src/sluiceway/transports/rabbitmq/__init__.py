"""RabbitMQ, through pika: quorum queues, publisher confirms, and a ladder of delay queues.

transport.py   RabbitMQTransport: connect, publish, browse
source.py      RabbitMQSource: receive and settle, as the event loop sees them
arrivals.py    what of the broker's pushes is for a source, and who is suspected
hand.py        what a source has in hand, and how that is settled
credit.py      how much the broker may push to a source
suspects.py    suspects that run alone
ordered.py     OrderedSource: `order_by`, one process after the other
ordered_hand.py  what of an ordered source goes back to its place, and what to the broker
order.py       which messages of a key are away, and what is written down of that
hub.py         what both share: the I/O thread, the outlet, where messages go
copies.py      what takes the place of a message that goes back to the broker
inlet.py       the connection of a source: pushes, acks, what is done when it is lost
outlet.py      the connection that publishes
tags.py        which deliveries are settled, and the fewest acks that say so
topology.py    exchanges, queues and the delay ladder: names, how they hang together
letters.py     messages on the wire
browser.py     looking at dead letters
wire.py        pika, made quicker and awaitable
io_thread.py   the thread on which all connections live
address.py     the URL and the options
"""

try:
    import pika  # noqa: F401
except ImportError as error:
    raise ImportError("the RabbitMQ transport needs pika: pip install 'sluiceway[rabbitmq]'") from error

from .source import RabbitMQSource
from .transport import RabbitMQTransport

__all__ = ["RabbitMQSource", "RabbitMQTransport"]
