"""The model families in small."""

from __future__ import annotations

import pytest

from peftkit.files.families.names import Family
from tests.support.small_families import use_small_families


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    """Small weights under the genuine names."""
    return use_small_families(monkeypatch)
