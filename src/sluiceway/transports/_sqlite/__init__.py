"""The parts of the SQLite transport: schema, SQL, I/O thread, liveness, doorbell."""
