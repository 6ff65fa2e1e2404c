"""One file per broker. Transports know neither each other nor the runtime."""
