"""Gates limit demand from outside a pipeline: a pause, a rate limit, a circuit breaker."""

from .circuit_breaker import CircuitBreaker
from .contract import Gate, Watch, Watcher
from .pause import Pause
from .rate_limit import RateLimit

__all__ = ["CircuitBreaker", "Gate", "Pause", "RateLimit", "Watch", "Watcher"]
