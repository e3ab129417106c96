"""Slides as files of features: the three layouts that feature extraction for whole slides leaves behind.

==========  ==================================================================================================
layout      what lies under ``root``
==========  ==================================================================================================
aem_h5      ``root`` is one HDF5 file: for each slide a group with ``feat`` and ``coords`` and the attribute ``label``
clam_h5     ``h5_files/<slide>.h5`` (or ``<slide>.h5``) with ``features`` and ``coords``
clam_pt     ``pt_files/<slide>.pt`` (or ``<slide>.pt``), one tensor of features; no coordinates
==========  ==================================================================================================
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poise.medical.mil.bags import Bag
from poise.medical.mil.slides import Slide, Slides

if TYPE_CHECKING:
    import h5py

LAYOUTS = ("aem_h5", "clam_h5", "clam_pt")


class FeatureBagDataset(Dataset[Bag]):
    """The bags of a table of slides, read one slide at a time, in the worker that needs it.

    Features may be stored in half precision and come as float32.

    Args:
        root: folder or file, see the table above.
        layout: how the features are stored.
        slides: which slides, with their labels; those of an ``aem_h5`` file are in the file, see :func:`slides_of_h5`.

    Attributes:
        labels: of every bag.
        classes: the name of every class.

    Raises:
        ValueError: an unknown layout, no slide, or slides without a file of features.
        FileNotFoundError: ``root`` does not exist.
    """

    def __init__(self, root: Path | str, layout: str, slides: Slides) -> None:
        self.root, self.layout = Path(root), layout
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if not self.root.exists():
            raise FileNotFoundError(f"{self.root} does not exist")
        if not len(slides):
            raise ValueError("no slides: a data set needs at least one")
        self.slides, self.classes = slides.rows, slides.classes
        self.labels = torch.tensor([slide.label for slide in self.slides])
        if missing := self._missing():
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{len(missing)} of {len(slides)} slides have no features in {self.root} ({layout}): {shown}"
            )

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> Bag:
        """The bag of one slide.

        Raises:
            ValueError: the file lacks its features, or they are not finite or empty.
        """
        slide = self.slides[index]
        features, coords = self._read(slide)
        return Bag(features, slide.label, coords, slide.id)

    def _read(self, slide: Slide) -> tuple[Tensor, Tensor | None]:
        if self.layout == "clam_pt":
            features = torch.load(self._file(slide.id), map_location="cpu", weights_only=True)
            if not isinstance(features, Tensor):
                raise ValueError(f"{self._file(slide.id)} must hold one tensor, got {type(features).__name__}")
            return features.float(), None
        import h5py

        if self.layout == "clam_h5":
            with h5py.File(self._file(slide.id)) as file:
                return _arrays(file, "features", f"{slide.id}.h5")
        with h5py.File(self.root) as file:
            return _arrays(file[slide.id], "feat", f"{self.root.name}, slide {slide.id!r}")

    def _missing(self) -> Sequence[str]:
        if self.layout != "aem_h5":
            return [slide.id for slide in self.slides if not self._file(slide.id).is_file()]
        with _one_file(self.root) as file:
            return [slide.id for slide in self.slides if slide.id not in file]

    def _file(self, slide: str) -> Path:
        folder, suffix = {"clam_h5": ("h5_files", ".h5"), "clam_pt": ("pt_files", ".pt")}[self.layout]
        inside = self.root / folder
        return (inside if inside.is_dir() else self.root) / f"{slide}{suffix}"


def slides_of_h5(path: Path | str) -> Slides:
    """The slides of an ``aem_h5`` file with the labels it holds; every slide is a patient of its own, and in no split yet.

    Raises:
        ValueError: not such a file, or a slide without a label.
        FileNotFoundError: there is no such file.
    """
    with _one_file(Path(path)) as file:
        unlabelled = [name for name, group in file.items() if "label" not in group.attrs]
        if unlabelled:
            raise ValueError(f"{Path(path).name}: slides without the attribute label: {', '.join(unlabelled[:5])}")
        return Slides.of(Slide(name, int(group.attrs["label"]), name) for name, group in file.items())


def _one_file(path: Path) -> "h5py.File":
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir() or not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file with a group for every slide")
    return h5py.File(path)


def _arrays(group: Any, name: str, where: str) -> tuple[Tensor, Tensor | None]:
    if name not in group:
        raise ValueError(f"{where} has no dataset {name!r}, only {sorted(group)}")
    features = torch.from_numpy(group[name][:].astype(np.float32, copy=False))
    coords = torch.from_numpy(group["coords"][:].astype(np.int64)) if "coords" in group else None
    return features, coords
