"""What the hooks of the stages do before somebody sets them."""

from __future__ import annotations

from ..message import Message


def nothing() -> None:
    pass


def nothing_with(message: Message[object]) -> None:
    pass


def no(message: Message[object]) -> bool:
    return False


def always(message: Message[object]) -> bool:
    return True


def raise_it(error: BaseException) -> None:
    raise error
