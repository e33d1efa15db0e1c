"""Leave the slow tests out unless they are asked for."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if "slow" in item.keywords and "tests/loops" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="minutes on a cold machine: run with -m slow"))
