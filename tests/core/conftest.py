"""What tests of several recurrences share."""

from __future__ import annotations

import pytest

from ssmrl.core import native


@pytest.fixture(params=["C++", "Python"])
def _language(request, monkeypatch):
    """Time loops in C++, and in Python."""
    if request.param == "Python":
        monkeypatch.setattr(native, "run", lambda *_, **__: False)
    elif not native.is_available():
        pytest.skip("built without a compiler")
