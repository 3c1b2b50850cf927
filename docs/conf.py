"""How the pages and the docstrings become a site: ``make docs``, into ``site``, without network."""

import sys
from functools import reduce
from pathlib import Path
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lightning_dd import __version__

project, author, release = "lightning_dd", "the lightning_dd developers", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = ["_templates"]
html_theme, html_title = "furo", f"lightning_dd {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = ["Warns"]
napoleon_numpy_docstring = False
nitpicky = True  # a reference to something of this project that is not there fails the build
nitpick_ignore_regex = [
    (r"py:.*", r"(?!lightning_dd\.).*"),
    (r"py:class", r".*\.(_\w+|Item|Key|Kind)"),  # bases of our own, and type variables
]


def by_its_home(app: Sphinx, env: BuildEnvironment, node: Element, content: Element) -> Element | None:
    """Resolve a name that a package passes on, as ``lightning_dd.data.RealData``, by the module that defines it."""
    parts = str(node.get("reftarget", "")).split(".")
    known = next((count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in sys.modules), 0)
    try:
        found: Any = reduce(getattr, parts[known:], sys.modules[".".join(parts[:known])])
        home = f"{found.__module__}.{found.__qualname__}"
    except (KeyError, AttributeError):
        return None
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, content)


def whole(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in the words on an attribute for its type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def setup(app: Sphinx) -> None:
    """Let Sphinx ask above."""
    app.connect("missing-reference", by_its_home)
    app.connect("autodoc-process-docstring", whole, priority=400)  # napoleon's is 500
