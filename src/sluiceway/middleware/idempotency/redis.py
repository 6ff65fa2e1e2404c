"""A store in Redis, for the processes of many machines: needs the extra `redis`."""

from __future__ import annotations

from typing import Any

from ...address import split_url
from ...errors import OptionError
from .store import Claim

try:
    from redis.asyncio import Redis
except ImportError as error:
    raise ImportError("the Redis store needs redis: pip install 'sluiceway[redis]'") from error

# A key is a hash: its claim's token, and its result once it is done. Redis lets it expire. Times are in milliseconds.
_CLAIM = """
local found = redis.call('HMGET', KEYS[1], 'token', 'result')
if found[2] then return {'done', found[2]} end
if found[1] then return {'busy', ''} end
redis.call('HSET', KEYS[1], 'token', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'claimed', ''}
"""
_RENEW = """
local found = redis.call('HMGET', KEYS[1], 'token', 'result')
if found[1] ~= ARGV[1] or found[2] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_DONE = """
local found = redis.call('HMGET', KEYS[1], 'token', 'result')
if found[2] or (found[1] and found[1] ~= ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'result', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
_RELEASE = """
local found = redis.call('HMGET', KEYS[1], 'token', 'result')
if found[1] == ARGV[1] and not found[2] then redis.call('DEL', KEYS[1]) end
"""


class RedisStore:
    """Keeps keys in Redis, each under `prefix`, for as many processes and machines as reach it.

    `redis` is a URL or a redis.asyncio client, which must not decode responses; a client of yours stays open at
    `aclose`. What Redis forgets in a crash, by its settings for persistence and eviction, is handled again. Raises
    OptionError for what is neither.
    """

    def __init__(self, redis: str | Redis = "redis://localhost", *, prefix: str = "sluiceway:idempotency:") -> None:
        if not (isinstance(redis, str) or callable(getattr(redis, "register_script", None))):
            raise OptionError(f"RedisStore: redis must be a URL or a redis.asyncio.Redis; got {redis!r}")
        if isinstance(redis, str):
            split_url(redis)  # what the client says of a wrong one may have its password
        self._own = isinstance(redis, str)
        client: Any = Redis.from_url(redis) if isinstance(redis, str) else redis
        self._client = client
        self._prefix = prefix
        self._claim = client.register_script(_CLAIM)
        self._renew = client.register_script(_RENEW)
        self._done = client.register_script(_DONE)
        self._release = client.register_script(_RELEASE)

    async def claim(self, key: str, token: str, lease: float) -> Claim:
        state, result = await self._run(self._claim, key, token, _milliseconds(lease))
        return Claim(state.decode(), result)

    async def renew(self, key: str, token: str, lease: float) -> bool:
        return bool(await self._run(self._renew, key, token, _milliseconds(lease)))

    async def done(self, key: str, token: str, result: bytes, ttl: float) -> bool:
        return bool(await self._run(self._done, key, token, _milliseconds(ttl), result))

    async def release(self, key: str, token: str) -> None:
        await self._run(self._release, key, token)

    async def aclose(self) -> None:
        """Close the connections, unless the client was given. Idempotent."""
        if self._own:
            await self._client.aclose()

    async def __aenter__(self) -> RedisStore:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _run(self, script: Any, key: str, *arguments: Any) -> Any:
        return await script(keys=[self._prefix + key], args=arguments)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
