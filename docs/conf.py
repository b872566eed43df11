"""Sphinx: the Markdown of the repository as a site. `make docs` builds it; a dead link or reference fails the build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

project = "dagster-prefs"
extensions = ["myst_parser"]
# The source folder is the repository, so that a link works on the site as it does in the repository.
root_doc = "docs/index"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "infra/terraform/README.md",
    "dagster_prefs/console/runbook.md",
]  # fmt: skip
exclude_patterns = ["**/.*", "**/node_modules"]
myst_heading_anchors = 4
nitpicky = True
# Fences without a language show output and drawings.
highlight_language = "none"
# SQL with Jinja is neither language.
suppress_warnings = ["misc.highlighting_failure"]
html_theme = "furo"
html_title = "dagster-prefs"
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_show_copyright = False
html_copy_source = False


def forward_from_the_root(app: Any, error: Exception | None) -> None:
    """Make the site's root lead to its first page, which is that of the folder docs."""
    if error is None and app.builder.format == "html":
        forward = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        page = f"<!doctype html>{forward}<title>dagster-prefs</title>\n"
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Any) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("build-finished", forward_from_the_root)
