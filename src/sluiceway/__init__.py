"""Sluiceway runs message consumers: it pulls from a broker only as fast as the handlers can take, and loses nothing."""

from ._decisions.occupancy import TimeSpent
from ._runtime.supervisor import PipelineStats
from .acknowledger import Acknowledger
from .app import App
from .batch import Batch, BatchInfo, Split
from .consumer import Consumer, FunctionConsumer, consumer
from .errors import (
    AlreadySettled,
    AppError,
    ConnectError,
    DecodeError,
    ForeignMessage,
    HandlerTimeout,
    LeaseLost,
    OptionError,
    PayloadTooLarge,
    PipelineFailed,
    PublishError,
    Reject,
    Release,
    RetryLater,
    RoutingError,
    SluicewayError,
    TransportError,
    Unsupported,
)
from .gate import CircuitBreaker, Gate, Pause, RateLimit
from .manager import ConsumerManager
from .message import Message, Outgoing
from .middleware import BatchMiddleware, Middleware
from .options import Batching, ConsumerOptions
from .pipeline import Pipeline
from .retry import Retry

__version__ = "0.1.0"

__all__ = [
    "Acknowledger",
    "AlreadySettled",
    "App",
    "AppError",
    "Batch",
    "BatchInfo",
    "BatchMiddleware",
    "Batching",
    "CircuitBreaker",
    "ConnectError",
    "Consumer",
    "ConsumerManager",
    "ConsumerOptions",
    "DecodeError",
    "ForeignMessage",
    "FunctionConsumer",
    "Gate",
    "HandlerTimeout",
    "LeaseLost",
    "Message",
    "Middleware",
    "OptionError",
    "Outgoing",
    "Pause",
    "PayloadTooLarge",
    "Pipeline",
    "PipelineFailed",
    "PipelineStats",
    "PublishError",
    "RateLimit",
    "Reject",
    "Release",
    "Retry",
    "RetryLater",
    "RoutingError",
    "SluicewayError",
    "Split",
    "TimeSpent",
    "TransportError",
    "Unsupported",
    "consumer",
]
