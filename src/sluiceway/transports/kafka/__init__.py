"""Apache Kafka, over confluent-kafka.

transport.py    KafkaTransport: connect, ensure, publish, subscribe, browse, remove
source.py       KafkaSource: receives from a member, and says how it is
member.py       one member of a group: the thread that alone touches its consumer
books.py        who asks, what is handed out and settled, what is committed of that
reading.py      reads by demand, pauses and resumes
joining.py      what it is given and what is taken away: begins, hands over
partition.py    a partition that is ours: what has come, what is in hand, what is finished
requests.py     what the event loop asks of the thread
publishing.py   publishes, confirmed
topics.py       topics, where groups begin
browsing.py     what rests in topics: shown, removed, counted
wire.py         records and messages
settings.py     options, URLs, what the client is told

What is kept where. A group's committed offset of a partition is that of the first record that is not finished. What
is known of the records above it stands in the commit's metadata: which are finished, how often others have failed,
and how many may be in hand. All sources that one transport opens for a group share one member of it, and what comes is
dealt among those that ask. A retry without a delay is a note in the metadata, and the record is handed out again. A
retry with a delay is a copy on the topic `{topic}.{group}.retry`, confirmed before the record is finished; there it
waits until it is due.

What can go wrong, and how it ends:

- A process that dies: its partitions go to other members after its session timeout. What it had in hand comes again,
  as suspects; at most as many as the metadata says, and the first of those that are not finished.
- A partition that is taken away: what runs gets half the session timeout to finish. What has not then is repeated.
- A commit that fails: it is tried again. What it tells of is not settled until it is there.
- Metadata that would be too long (thousands of finished records between unfinished ones): nothing more of that
  partition is handed out until some of the earlier ones are finished.
- A topic that is deleted and made anew: its id is in the metadata, so the group begins at its first record.
"""

try:
    import confluent_kafka as _client  # noqa: F401
except ImportError as error:
    raise ImportError("the Kafka transport needs confluent-kafka: pip install 'sluiceway[kafka]'") from error

from .source import KafkaSource
from .transport import KafkaTransport

__all__ = ["KafkaSource", "KafkaTransport"]
