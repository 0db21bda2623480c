"""What the tests of this room share."""

from __future__ import annotations

import pytest
from made_endpoint import MadeEndpoint


@pytest.fixture
def made():
    return MadeEndpoint
