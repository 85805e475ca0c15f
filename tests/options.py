"""The option --method FILE.py:CLASS of pytest, which `addopts = -p tests.options` loads.

    python -m pytest test_all.py --method mine.py:MyMethod     checks this method, and nothing else

A test that takes the argument `method_class` runs once for every method, or for this one.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

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
    wanted = config.getoption("--method")
    return [method_of(wanted)] if wanted else every_method()


def method_of(text):
    """The class that FILE.py:CLASS names."""
    import fl

    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise pytest.UsageError(f"--method {text}: there is no file {file!r}; write FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location("reader_" + path.stem, path.absolute())
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    M = getattr(module, name, None)
    if not (isinstance(M, type) and issubclass(M, fl.FedAvg)):
        raise pytest.UsageError(f"--method {text}: {file} has no class {name} that inherits FedAvg")
    return M


def every_method():
    """FedAvg and all classes in fl.py and methods/ that inherit it, by name."""
    import fl
    import methods

    names = [f"methods.{module.name}" for module in pkgutil.iter_modules(methods.__path__)]
    found = {}
    for module in [fl, *map(importlib.import_module, names)]:
        for name, M in vars(module).items():
            if isinstance(M, type) and issubclass(M, fl.FedAvg):
                found[name] = M
    return [found[name] for name in sorted(found)]
