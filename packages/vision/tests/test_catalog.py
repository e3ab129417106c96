"""poise.vision is found by its entry point."""

from importlib.metadata import entry_points

from poise.vision.catalog import METHODS


def test_package_announces_its_catalog() -> None:
    (point,) = entry_points(group="poise.domains", name="vision")
    assert point.load() is METHODS
