"""A site per test: whatever the test starts there has ended when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.kit import Site, opened


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with opened(tmp_path, request.node.name) as made:
        yield made
