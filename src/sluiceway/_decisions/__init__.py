"""Pure decisions: they take `now` and return what to do. No asyncio, socket, time or threading below here."""
