"""Sample inputs that put every method of poise.generative under the workspace contract."""

from poise.core.testing import Sample

SAMPLES: tuple[Sample, ...] = ()
