"""The loops that move messages; one file per stage. What to do is decided in `_decisions`."""
