"""What the tests of several experiments need."""

import pytest

from poise.core.lab import Run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out figures, which take longer than all else in a test of a few steps that looks at none."""
    monkeypatch.setattr(Run, "figure", lambda *_: None)
