"""Radiology slices in the DICOM format, in physical units."""

import torch

from poise.core.data.pictures import Picture
from poise.core.data.wheels import wheel_file

FILES = {
    "ct_slice": ("pydicom", "data/test_files/CT_small.dcm"),
    "mr_slice": ("pydicom", "data/test_files/MR_small.dcm"),
}
"""Package and path of each slice."""


def ct_slice() -> Picture:
    """A CT slice, 1 x 128 x 128, in Hounsfield units (air -1000, water 0); a pixel is 0.66 mm wide."""
    return _dicom("ct_slice", "Hounsfield units")


def mr_slice() -> Picture:
    """An MR slice, 1 x 64 x 64, in the scanner's arbitrary units; a pixel is 0.31 mm wide."""
    return _dicom("mr_slice", "arbitrary units")


def _dicom(name: str, unit: str) -> Picture:
    path = wheel_file(*FILES[name])
    from pydicom import dcmread

    record = dcmread(path)
    # The linear modality transform of the standard (PS3.3, C.11.1): stored value -> unit.
    pixels = record.pixel_array * float(record.get("RescaleSlope", 1)) + float(record.get("RescaleIntercept", 0))
    height, width = (float(side) for side in record.PixelSpacing)
    return Picture(
        name=name,
        pixels=torch.tensor(pixels, dtype=torch.float32).unsqueeze(0),
        licence="no known restrictions",
        source="NEMA DICOM working group 4, made smaller by the pydicom authors; in pydicom",
        unit=unit,
        spacing=(height, width),
    )
