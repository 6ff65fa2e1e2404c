"""Every broker through the commonest faults: nothing is lost, and the messages flow again.

`make chaos` takes them through all. Here are those that others do not show: the tests of each transport cover its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chaos.broker import Broker
from chaos.brokers import BROKERS
from chaos.cell import run_cell
from chaos.faults import FAULTS, Fault

USUAL = ("restart", "cut", "kill worker", "locked file")
IN_ORDER = ("kill worker",)


def cells() -> Iterator[Any]:
    """One group per broker: its cells follow each other over one server."""
    for make in BROKERS:
        name = make.name.replace(", ", "-").replace(" ", "-")
        for fault in FAULTS:
            if fault.name in (IN_ORDER if make.ordered else USUAL) and fault.fits(make):
                marks = [pytest.mark.crash, pytest.mark.slow, pytest.mark.xdist_group(f"chaos-{name}")]
                yield pytest.param(make, fault, marks=marks, id=f"{name}-{fault.name.replace(' ', '-')}")


@pytest.fixture(scope="module")
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with request.param(tmp_path_factory.mktemp(request.param.name)) as made:
        yield made


@pytest.mark.parametrize(("broker", "fault"), list(cells()), indirect=["broker"])
def test_nothing_is_lost_and_messages_flow_again(broker: Broker, fault: Fault) -> None:
    row = run_cell(broker, fault)
    print(row)
    assert row.error is None, row
    assert (row.lost, row.dead, row.left) == (0, 0, 0), row
    assert row.repeated <= row.at_most, row
    assert not row.overtaken, row
    assert row.recovered is not None, row
    assert row.ok
