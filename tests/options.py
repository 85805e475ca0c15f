"""The option --method FILE.py:CLASS of pytest, which `addopts = -p tests.options` loads.

    python -m pytest test_all.py --method mine.py:MyMethod     checks this method, and nothing else

A test that takes the argument `method_class` runs once for every method, or for this one.
"""

import pytest


def pytest_addoption(parser):
    text = "check this method only (tests/check_method.py)"
    parser.addoption("--method", metavar="FILE.py:CLASS", help=text)


def pytest_generate_tests(metafunc):
    if "method_class" in metafunc.fixturenames:
        methods = methods_to_check(metafunc.config)
        metafunc.parametrize("method_class", methods, ids=[M.__name__ for M in methods])


def pytest_collection_modifyitems(config, items):
    """With --method, only the tests of a method are run."""
    if config.getoption("--method"):
        others = [item for item in items if "method_class" not in item.fixturenames]
        items[:] = [item for item in items if "method_class" in item.fixturenames]
        config.hook.pytest_deselected(items=others)


def methods_to_check(config):
    """The method of --method, or all methods of fl.py and methods/."""
    from plumbing.settings import find

    wanted = config.getoption("--method")
    try:
        return [find("algo", wanted)] if wanted else every_method()
    except ValueError as error:
        raise pytest.UsageError(f"--method {wanted}: {error}") from None


def every_method():
    """FedAvg and all classes in fl.py and methods/ that inherit it."""
    from plumbing.settings import parts

    return list(parts("algo").values())
