"""Tables of numbers: measurements of patients and of wines, in their own units."""

from typing import Any

import torch

from poise.core.data.dataset import Dataset
from poise.core.data.wheels import wheel_file

FILES = {
    "breast_cancer": ("sklearn", "datasets/data/breast_cancer.csv"),
    "wine": ("sklearn", "datasets/data/wine_data.csv"),
    "diabetes": ("sklearn", "datasets/data/diabetes_data_raw.csv.gz"),
}
"""Package and path of each table."""


def breast_cancer() -> Dataset:
    """Cell nuclei of breast masses: 569 x 30 measurements, classes malignant and benign."""
    return _dataset(
        "breast_cancer",
        licence="CC-BY-4.0",
        source="W. Wolberg, O. Mangasarian, N. Street and W. Street, Breast Cancer Wisconsin (Diagnostic), UCI, 1995",
    )


def wine() -> Dataset:
    """Chemical analysis of wines of three growers: 178 x 13 measurements, three classes."""
    return _dataset("wine", licence="CC-BY-4.0", source="S. Aeberhard and M. Forina, Wine, UCI, 1992")


def diabetes() -> Dataset:
    """Disease progression one year after baseline, a number, from 10 measurements (not standardised) of 442 patients."""
    return _dataset(
        "diabetes",
        licence="not stated",
        source="B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least Angle Regression, 2004",
        scaled=False,
    )


def _dataset(name: str, *, licence: str, source: str, **options: Any) -> Dataset:
    wheel_file(*FILES[name])  # says what to install if it is missing
    from sklearn import datasets

    table = getattr(datasets, f"load_{name}")(**options)
    classes = tuple(str(label) for label in table.get("target_names", ()))
    return Dataset(
        name=name,
        inputs=torch.tensor(table.data, dtype=torch.float32),
        targets=torch.tensor(table.target, dtype=torch.int64 if classes else torch.float32),
        classes=classes,
        licence=licence,
        source=f"{source}; in scikit-learn",
        features=tuple(table.feature_names),
    )
