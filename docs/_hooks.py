"""Makes links to files outside of docs/ work on the site, as they do in a checkout.

A page may link to any file of the repository by a relative path. Markdown files and images get a
place under `source/` of the site, other files and folders get a page there that shows them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
KATEX = ROOT / "build" / "docs" / "katex"
IMAGES = {".png", ".svg"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(?=[)#\s])")
NEEDS = re.compile(r'^(```python) requires="([^"]+)"$', re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|``[^`]+``|`[^`\n]+`", re.DOTALL | re.MULTILINE)


class Examples(griffe.Extension):
    """Shows the section "Example" of a docstring as code, as the parser does with "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)


def on_files(files: Files, config: Any) -> Files:
    """Adds KaTeX, and every file outside of docs/ that a page links to."""
    for path in [*KATEX.glob("*.min.*"), *KATEX.glob("contrib/auto-render.min.js")]:
        _add_asset(files, config, path)
    for path in KATEX.glob("fonts/*.woff2"):
        _add_asset(files, config, path)
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while todo:
        origin = todo.pop()
        for target in _links(origin, (ROOT / origin).read_text()):
            path = ROOT / target
            uri = _uri(target)
            if target.startswith("docs/") or not path.exists() or files.get_file_from_path(uri):
                continue
            if path.suffix in IMAGES:
                files.append(File.generated(config, uri, content=path.read_bytes()))
            else:
                files.append(File.generated(config, uri, content=_page(target)))
                todo += [target] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Points the links of a page to where the site has the files."""
    uri = page.file.src_uri
    origin = uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"
    if _uri(origin) != uri:  # it shows a file that is no Markdown
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = _resolve(origin, match[1])
        return posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")

    if uri.startswith("results/"):
        page.meta["hide"] = ["toc"]  # the tables are wide
    markdown = markdown.replace(" ± ", "\u00a0±\u00a0")
    return NEEDS.sub(r'\1 title="Needs \2"', _outside_code(LINK, moved, markdown))


def _outside_code(pattern: re.Pattern[str], change: Any, text: str) -> str:
    """Substitutes outside of code; a link whose text is code is outside."""
    parts, end = [], 0
    for block in CODE.finditer(text):
        parts += [pattern.sub(change, text[end : block.start()] + "\0"), block[0]]
        end = block.end()
    return "".join([*parts, pattern.sub(change, text[end:])]).replace("\0", "")


def _links(origin: str, text: str) -> list[str]:
    found: list[str] = []
    _outside_code(LINK, lambda match: found.append(_resolve(origin, match[1])) or match[0], text)
    return found


def _resolve(origin: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _uri(target: str) -> str:
    """Where the site has a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    path = ROOT / target
    if path.is_dir():
        return f"source/{target}/index.md"
    return f"source/{target}" + ".md" * (path.suffix not in {".md", *IMAGES})


def _page(target: str) -> str:
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text()
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix and not p.name.startswith("."))
        text = "\n".join(f"- `{name}`" for name in names)
    else:
        language = {".py": "python", ".json": "json"}.get(path.suffix, "text")
        text = f"````{language}\n{path.read_text()}\n````"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n\n{text}\n"


def _add_asset(files: Files, config: Any, path: Path) -> None:
    uri = f"assets/katex/{path.relative_to(KATEX).as_posix()}"
    files.append(File.generated(config, uri, content=path.read_bytes()))
