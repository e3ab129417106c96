"""NIfTI-1 volumes, as scanners' images and their masks are published (``.nii``, ``.nii.gz``).

Read with NumPy alone: a header of 348 bytes, then the voxels. For other formats and for orientation use MONAI's ``LoadImage``.

The format: https://nifti.nimh.nih.gov/nifti-1.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

HEADER = 348
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


class Volume(NamedTuple):
    """Voxels and their size.

    Attributes:
        voxels: (X, Y, Z, ...) in the order of the file, scaled as its header says.
        spacing: size of a voxel along each axis, as a rule in mm.
    """

    voxels: npt.NDArray[np.generic]
    spacing: tuple[float, ...]


def read_nifti(path: str | Path) -> Volume:
    """Read a volume.

    Args:
        path: a single-file NIfTI-1 image, ``.nii`` or compressed ``.nii.gz``.

    Returns:
        The voxels, in the type of the file unless the header scales them (then float32), and their spacing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not NIfTI-1, is cut off, holds another type of number, or values that are not finite.
    """
    path = Path(path)
    data = _content(path)
    if len(data) < HEADER:
        raise ValueError(f"{path} is cut off: a NIfTI header has {HEADER} bytes, the file {len(data)}")
    order = next((each for each in "<>" if struct.unpack_from(f"{each}i", data)[0] == HEADER), None)
    if order is None or data[344:347] != b"n+1":
        raise ValueError(f"{path} is not a single-file NIfTI-1 image")
    dims, *shape = struct.unpack_from(f"{order}8h", data, 40)
    code = struct.unpack_from(f"{order}h", data, 70)[0]
    spacing = struct.unpack_from(f"{order}8f", data, 76)[1:]
    offset, slope, intercept = struct.unpack_from(f"{order}3f", data, 108)
    if not 1 <= dims <= 7 or min(shape[:dims]) < 1:
        raise ValueError(f"{path} has a damaged header: {dims} dimensions, {tuple(shape)}")
    if code not in _TYPES:
        raise ValueError(f"{path} holds numbers of NIfTI type {code}; real numbers are needed")
    dtype = np.dtype(order + _TYPES[code])
    count = int(np.prod(shape[:dims], dtype=np.int64))
    if len(data) < int(offset) + count * dtype.itemsize:
        raise ValueError(f"{path} is cut off: {tuple(shape[:dims])} voxels do not fit into {len(data)} bytes")
    voxels = np.frombuffer(data, dtype, count, int(offset)).reshape(shape[:dims], order="F")
    if np.issubdtype(dtype, np.floating) and not np.isfinite(voxels).all():
        raise ValueError(f"{path} holds NaN or infinity")
    if slope not in (0.0, 1.0) or (slope == 1 and intercept != 0):  # slope 0: not scaled, says the format
        voxels = voxels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return Volume(voxels.astype(voxels.dtype.newbyteorder("=")), tuple(spacing[:dims]))


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
