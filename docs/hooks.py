"""What mkdocs needs beside its configuration: formulas as MathML, and the package where mkdocstrings finds it."""

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config):
    """The package is the repository's root: griffe looks for a folder `orthoact`."""
    link = ROOT / "build" / "api" / "orthoact"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    return config


def on_page_content(html, **_):
    """Browsers draw MathML by themselves: no script, no network."""

    def formula(match):
        text = unescape(match[2]).strip().removeprefix("\\(").removesuffix("\\)")
        text = text.removeprefix("\\[").removesuffix("\\]")
        return convert(text, display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, html)
