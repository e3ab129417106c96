"""The site lists every method, loads nothing from outside, and shows notes and docstrings as they are meant."""

import re
from pathlib import Path

import pytest
import refresh_results

from poise.core.lab.catalogs import installed

ROOT = Path(refresh_results.ROOT)


NOTES = (
    "Which part to use",
    "Practical advice",
    "Where paper and released code differ",
    "How it is computed",
    "What the experiment shows",
)


@pytest.mark.parametrize("notes", sorted(ROOT.glob("docs/methods/*/*.notes.md")), ids=lambda path: path.name)
def test_notes_belong_to_a_method_and_start_at_the_second_level(notes: Path) -> None:
    assert f"{notes.parent.name}/{notes.name.removesuffix('.notes.md')}" in installed()
    text = re.sub(r"```.*?```", "", notes.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^(#+) ", text, flags=re.MULTILINE)
    assert text.startswith("## "), "begin with a heading of the second level: the page's title is above"
    assert "#" not in headings
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert sections == [name for name in NOTES if name in sections], "the sections of all notes, in one order"
    assert {*NOTES} - {*sections} <= {"How it is computed"}


def test_site_lists_every_method_and_loads_nothing_from_outside() -> None:
    pytest.importorskip("mkdocs", reason="the group docs is not installed")
    import mkdocs_hooks
    from mkdocs.config import load_config
    from mkdocs.exceptions import PluginError

    config = mkdocs_hooks.on_config(load_config(str(ROOT / "mkdocs.yml"), nav=[{"Methods": ["methods/index.md"]}]))
    assert config.nav is not None
    groups = [pages for group in config.nav[0]["Methods"][1:] for pages in group.values()]
    listed = {title: page for pages in groups for entry in pages for title, page in entry.items()}
    assert listed == {method.title: f"methods/{name}.md" for name, method in installed().items()}

    badge = mkdocs_hooks.on_page_content("<td>✗ refuted</td><td>a ✓ holds</td>")
    assert badge == '<td><span class="verdict refuted">✗ refuted</span></td><td>a ✓ holds</td>'

    page = type("Page", (), {"file": type("File", (), {"src_uri": "index.md"})})
    inside = '<a href="https://example.org">paper</a><script src="assets/math.js"></script>'
    assert mkdocs_hooks.on_post_page(inside, page=page) == inside
    with pytest.raises(PluginError, match=r"index\.md would load from outside"):
        mkdocs_hooks.on_post_page('<script defer src="https://cdn.example.org/x.js"></script>', page=page)
    styles = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/assets").rglob("*.css")]
    assert not any(re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style) for style in styles)


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="the group docs is not installed")
    from griffe_docstrings import markdown

    docstring = r"""The size :math:`|x|` of ``x``; see :meth:`~poise.core.Penalty.step`.

.. math:: |x| =
    \sqrt{x^2}

>>> abs(-1)
1

Source:
    A. Author,
    section 2.
"""
    expected = r"""The size $|x|$ of ``x``; see `poise.core.Penalty.step`.


$$
|x| =
\sqrt{x^2}
$$


```pycon
>>> abs(-1)
1
```

**Source:** A. Author, section 2."""
    assert markdown(docstring) == expected
