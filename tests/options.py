"""The options --method and --compressor of pytest, which `addopts = -p tests.options` loads.

    python -m pytest test_all.py --method mine.py:MyMethod         checks this method
    python -m pytest test_all.py --compressor mine.py:MyCodec      checks this compressor

and nothing else. A test that takes the argument `method_class` or `compressor_class` runs once for
every method or compressor, or for this one.
"""

import pytest

KINDS = {"method": "algo", "compressor": "compress"}  # and what settings.py calls them


def pytest_addoption(parser):
    for word in KINDS:
        text = f"check this {word} only (tests/check_{word}.py)"
        parser.addoption(f"--{word}", metavar="FILE.py:CLASS", help=text)


def pytest_generate_tests(metafunc):
    for word in KINDS:
        if f"{word}_class" in metafunc.fixturenames:
            found = to_check(metafunc.config, word)
            metafunc.parametrize(f"{word}_class", found, ids=[part.__name__ for part in found])


def pytest_collection_modifyitems(config, items):
    """With one of the options, only the tests of this method or compressor are run."""
    wanted = {f"{word}_class" for word in KINDS if config.getoption(f"--{word}")}
    if wanted:
        others = [item for item in items if not wanted & set(item.fixturenames)]
        items[:] = [item for item in items if wanted & set(item.fixturenames)]
        config.hook.pytest_deselected(items=others)


def to_check(config, word):
    """The part that the option names, or all of the book and its folders."""
    from plumbing.settings import find, parts

    wanted, kind = config.getoption(f"--{word}"), KINDS[word]
    try:
        return [find(kind, wanted)] if wanted else list(parts(kind).values())
    except ValueError as error:
        raise pytest.UsageError(f"--{word} {wanted}: {error}") from None
