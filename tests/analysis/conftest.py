"""A healthy run, once per file: tests look at it or break a copy."""

import pytest
from doctor_kit import trained


@pytest.fixture(scope="module")
def healthy():
    return trained()
