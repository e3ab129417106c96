"""Sample inputs that put every method of poise.ot under the workspace contract."""

from poise.core.testing import Sample

SAMPLES: tuple[Sample, ...] = ()
