"""What poise.toy offers."""

from poise.core.catalog import Headline, Method

METHODS = (
    Method(
        slug="blobs",
        package="toy",
        title="Blobs",
        kind="training",
        problem="tell two clouds of points apart",
        summary="shrinks the weights of a small network while it learns.",
        formula=r"\lambda \lVert w \rVert^2",
        usage="print('blobs')",
        api=("poise.core.Penalty",),
        presets=("quick", "paper"),
        arms=("baseline", "decay"),
        headline=Headline(
            promise="the error falls",
            metric="error",
            arm="decay",
            step="a step",
        ),
        paper="A. Nobody, On blobs, 2026",
        url="https://example.org/blobs",
        bibtex="@misc{nobody2026blobs,\n  title={On blobs},\n  author={Nobody, A.},\n  year={2026}\n}",
    ),
)
