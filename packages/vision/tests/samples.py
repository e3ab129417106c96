"""Sample inputs that put every method of poise.vision under the workspace contract."""

from poise.core.testing import Sample

SAMPLES: tuple[Sample, ...] = ()
