"""NIfTI volumes, as scanners' images and their masks are published (``.nii``, ``.nii.gz``), read with nibabel as MONAI reads them."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def read_nifti(path: str | Path) -> npt.NDArray[np.generic]:
    """The voxels of a volume.

    Args:
        path: a NIfTI image, ``.nii`` or compressed ``.nii.gz``.

    Returns:
        (X, Y, Z, ...) in the order of the file, scaled as its header says; in the type of the file if that scales nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI image, is damaged or cut off, or holds values that are not finite.
    """
    import nibabel

    path = Path(path)
    try:
        image: Any = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist") from error
        raise ValueError(f"{path} is no NIfTI image, damaged or cut off: {error}") from error
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return voxels.astype(voxels.dtype.newbyteorder("="))
