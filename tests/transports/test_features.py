"""What transports have in common in saying what they give, and in refusing what is too large."""

from __future__ import annotations

import pytest
from msgspec.structs import asdict

from sluiceway.errors import PayloadTooLarge
from sluiceway.message import Outgoing
from sluiceway.transport import Features


def test_a_broker_that_gives_everything_says_only_what_it_lacks() -> None:
    features = Features.all_but(max_payload=7, order="process", wildcards=False)
    assert (features.order, features.wildcards, features.max_payload) == ("process", False, 7)
    rest = {"order", "wildcards", "max_payload", "delay"}
    assert all(value is True for name, value in asdict(features).items() if name not in rest)
    with pytest.raises(TypeError):
        Features.all_but(max_payload=7, wildcard=False)


def test_bodies_over_the_limit_are_refused_and_told_and_those_at_it_are_not() -> None:
    features = Features.all_but(max_payload=3)
    fits, large, larger = Outgoing("t", b"123"), Outgoing("t", b"1234", id="x"), Outgoing("u", b"12345")
    features.check_sizes([fits])
    with pytest.raises(PayloadTooLarge, match=r"message x to 't' has a body of 4 bytes and the limit is 3") as caught:
        features.check_sizes([fits, large, larger])
    assert caught.value.failed == (large, larger)
