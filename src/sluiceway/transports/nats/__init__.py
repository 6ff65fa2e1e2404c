"""NATS JetStream."""

from .renewer import NATSRenewer
from .source import NATSSource
from .transport import NATSTransport

__all__ = ["NATSRenewer", "NATSSource", "NATSTransport"]
