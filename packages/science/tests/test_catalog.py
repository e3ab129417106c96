"""poise.science is found by its entry point, and holds no method yet."""

from importlib.metadata import entry_points

from poise.science.catalog import METHODS


def test_package_announces_its_catalog() -> None:
    (point,) = entry_points(group="poise.domains", name="science")
    assert point.load() is METHODS


def test_catalog_is_empty_so_far() -> None:
    assert METHODS == (), "the first method has arrived: remove this test"
