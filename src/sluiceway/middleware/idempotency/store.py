"""What Idempotency needs of a store: claims, each a lease with a token."""

from __future__ import annotations

from typing import Literal, Protocol

from msgspec import Struct


class Claim(Struct, frozen=True):
    """What a store says to a claim.

    `claimed`: the key is the caller's until its lease runs out; `busy`: it is another's; `done`: it was done, with this
    `result`.
    """

    state: Literal["claimed", "busy", "done"]
    result: bytes = b""


class Store(Protocol):
    """Keeps keys that are claimed or done.

    A claim is held under the `token` that it was made with, which no other claim has. A call with another token changes
    nothing, so a claimant whose lease ran out cannot undo what the next one did. Every call is atomic. `lease` and
    `ttl` are seconds; what a call raises fails the message.
    """

    async def claim(self, key: str, token: str, lease: float) -> Claim:
        """Claim `key` for `lease` seconds, unless it is done or another's."""
        ...

    async def renew(self, key: str, token: str, lease: float) -> bool:
        """Hold the claim for `lease` seconds from now; False: it is no longer ours."""
        ...

    async def done(self, key: str, token: str, result: bytes, ttl: float) -> bool:
        """The key is done, and that is known for `ttl` seconds; False: it is another's by now.

        A claim that ran out and that nobody took since is still good.
        """
        ...

    async def release(self, key: str, token: str) -> None:
        """Give the claim up; does nothing to one that is done or another's. Idempotent."""
        ...
