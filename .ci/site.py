"""A hook of mkdocs: pages that include files of the repository's root link to each other as pages."""

import re
from typing import Any

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to files of the root into links to their pages."""
    return re.sub(
        r"\]\(\.\./([A-Z]+\.md)(#[^)]*)?\)", lambda m: f"]({PAGES.get(m[1], m[1])}{m[2] or ''})", markdown
    )  # fmt: skip
