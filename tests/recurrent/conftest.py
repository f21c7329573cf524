"""Tiny random models of each kind of state."""

import pytest

from support.families import KINDS, STATEFUL, build


@pytest.fixture(scope="session", params=KINDS)
def stateful(request):
    return build(KINDS[request.param], STATEFUL[KINDS[request.param]])
