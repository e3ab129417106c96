"""What the site needs beyond its plugins: methods in the navigation, verdict badges, nothing loaded from outside."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from refresh_results import FIELDS

from poise.core.lab.catalogs import installed

OUTSIDE = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=["']?(?:https?:)?//[^>]*>""")
"""Elements that would make a reader's browser ask another host. Ordinary links (<a href>) do not."""

VERDICT_CELL = re.compile(r"<td>(?P<sign>[✓·✗]) (?P<verdict>holds|undecided|refuted)</td>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the methods' pages under Methods, by field."""
    groups: dict[str, list[dict[str, str]]] = {}
    for method in installed().values():
        page = f"methods/{method.name}.md"
        if Path(config.docs_dir, page).is_file():
            groups.setdefault(FIELDS[method.package], []).append({method.title: page})
    assert config.nav is not None
    section = next(entry["Methods"] for entry in config.nav if "Methods" in entry)
    section.extend({field: pages} for field, pages in groups.items())
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Turn a table cell that holds a verdict into a badge."""
    return VERDICT_CELL.sub(r'<td><span class="verdict \g<verdict>">\g<sign> \g<verdict></span></td>', html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that asks another host for anything.

    Raises:
        PluginError: it does.
    """
    if found := OUTSIDE.search(output):
        raise PluginError(f"{page.file.src_uri} would load from outside: {found.group()}")
    return output
