"""poise.science is found by its entry point."""

from importlib.metadata import entry_points

from poise.science.catalog import METHODS


def test_package_announces_its_catalog() -> None:
    (point,) = entry_points(group="poise.domains", name="science")
    assert point.load() is METHODS
