"""poise.rl is found by its entry point."""

from importlib.metadata import entry_points

from poise.rl.catalog import METHODS


def test_package_announces_its_catalog() -> None:
    (point,) = entry_points(group="poise.domains", name="rl")
    assert point.load() is METHODS
