"""What mkdocs needs beside its configuration: formulas as MathML, examples as code, and where the package is."""

import re
from contextlib import suppress
from html import unescape
from pathlib import Path

from griffe import Extension
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class Examples(Extension):
    """Docstrings are plain Markdown, in which an example would be a quotation of a quotation of a quotation."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)


def on_config(config):
    """The package is the repository's root: griffe looks for a folder `orthoact`, and walks all of it."""
    package = ROOT / "build" / "api" / "orthoact"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "_version.py", "cli.py", "interp", "convert", "finetune"):
        with suppress(FileExistsError):  # of an earlier or another build
            (package / name).symlink_to(ROOT / name)
    return config


def on_page_content(html, **_):
    """Browsers draw MathML by themselves: no script, no network."""

    def formula(match):
        text = unescape(match[2]).strip().removeprefix("\\(").removesuffix("\\)")
        text = text.removeprefix("\\[").removesuffix("\\]")
        return convert(text, display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, html)
