"""Every registered method on every kind of site: all the properties of `slimtune.testing`."""

import pytest

import slimtune as st
from slimtune.testing import Check, checks

ALL = [check for name in st.methods() for check in checks(name)]


@pytest.mark.parametrize("check", ALL, ids=str)
def test_property(check: Check) -> None:
    check()
