"""What the site shows beside the pages of docs/: a hook of mkdocs, see mkdocs.yml.

README.md and other pages of the repository become pages of the site, each package gets a page of
its public names, and links between them are turned so that they lead on. A link to a file that is
no page stays as its text: a reader of the site has the name, and whoever has the files finds it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {  # of the repository, and where the site has them
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "alibi_spec/conformance/README.md": "conformance.md",
}
MODULES = {  # of each package, public ones that it does not offer itself
    "alibi_spec": ("bounds", "cache", "sampling", "sharding", "conformance"),
    "alibi_torch": ("linear", "sharding", "transformers"),
    "alibi_flax": ("sharding",),
    "alibi_convert": (),
    "alibi_verify": (),
    "alibi_train": (),
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+://)([^)#\s]*)(#[^)\s]*)?\)")
_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+://)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=turned(text, source, page)))
    for picture in (ROOT / "benchmarks/results").glob("*.png"):
        uri = str(picture.relative_to(ROOT))
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    for package, modules in MODULES.items():
        sections = [f"# {package}\n\n::: {package}\n"]
        sections += [f"## {package}.{name}\n\n::: {package}.{name}\n" for name in modules]
        text = "\n".join(sections)
        files.append(File.generated(config, f"reference/{package}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else turned(markdown, f"docs/{uri}", uri)


def turned(text: str, source: str, page: str) -> str:
    """A text with links as the site has them.

    Args:
        text: Markdown, with links relative to where it is in the repository.
        source: its path in the repository.
        page: its path in the site.
    """

    def link(match: re.Match[str]) -> str:
        label, target, section = match[1], match[2], match[3] or ""
        if not target:
            return match[0]
        place = _on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if place is None:
            return label if "`" in label else f"`{label}`" if "/" in label else label
        return f"[{label}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{section})"

    def picture(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        place = target.removeprefix("docs/")
        return f"![{match[1]}]({posixpath.relpath(place, posixpath.dirname(page) or '.')})"

    return _LINK.sub(link, _PICTURE.sub(picture, text))


def _on_site(path: str) -> str | None:
    """Where the site has a file of the repository, if it has it."""
    if path in PAGES:
        return PAGES[path]
    is_there = path.startswith("docs/") and (ROOT / path).is_file()
    return path.removeprefix("docs/") if is_there else None
