"""A store in this process's memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from msgspec import Struct

from ...errors import OptionError
from .._checks import is_count
from .store import Claim


class _Entry(Struct, gc=False):
    token: str
    expires: float
    result: bytes | None = None  # None: claimed; else done


class MemoryStore:
    """Keeps up to `size` keys in memory, for one process: what it knows ends with it.

    When there are more, the key that was asked for least recently and is done is forgotten; claims are kept. Use it in
    one event loop. Raises OptionError.
    """

    def __init__(self, size: int = 100_000) -> None:
        if not is_count(size):
            raise OptionError(f"MemoryStore: size must be 1 or more keys; got {size!r}")
        self.size = size
        self._done: OrderedDict[str, _Entry] = OrderedDict()  # the least recently asked for first
        self._claimed: dict[str, _Entry] = {}

    async def claim(self, key: str, token: str, lease: float) -> Claim:
        now = _now()
        entry = self._done.get(key)
        if entry is not None and entry.result is not None and now < entry.expires:
            self._done.move_to_end(key)
            return Claim("done", entry.result)
        entry = self._claimed.get(key)
        if entry is not None and now < entry.expires:
            return Claim("busy")
        self._done.pop(key, None)
        self._claimed[key] = _Entry(token, now + lease)
        return Claim("claimed")

    async def renew(self, key: str, token: str, lease: float) -> bool:
        entry = self._claimed.get(key)
        if entry is None or entry.token != token:
            return False
        entry.expires = _now() + lease
        return True

    async def done(self, key: str, token: str, result: bytes, ttl: float) -> bool:
        entry = self._claimed.get(key)
        if (entry is not None and entry.token != token) or key in self._done:
            return False
        self._claimed.pop(key, None)
        self._done[key] = _Entry(token, _now() + ttl, result)
        while len(self._done) > self.size:
            self._done.popitem(last=False)
        return True

    async def release(self, key: str, token: str) -> None:
        entry = self._claimed.get(key)
        if entry is not None and entry.token == token:
            del self._claimed[key]


def _now() -> float:
    return asyncio.get_running_loop().time()
