"""A data set that says which example it gives.

>>> items = IndexedDataset([("cat", 0), ("dog", 1)])
>>> items[1], len(items)
(('dog', 1, 1), 2)
"""

from typing import Any

from torch.utils.data import Dataset


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """Appends to each item its number, by which methods that remember something per example find it again.

    Wrap the data set that defines the numbering, and take subsets of the wrapper: a subset inside would number anew.

    Args:
        dataset: anything with ``len`` and items by number; an item that is no tuple or list becomes the first entry of one.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        return (*item, index) if isinstance(item, tuple | list) else (item, index)
