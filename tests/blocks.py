"""Run the code blocks of a document as a reader would: in order, in one folder, each where it stands.

`bash` lines that begin with `orthoact` run in this process through the real command line, the others in a shell;
`python` blocks share one namespace; a block with a title becomes a file of that name. `console` blocks show what the
tests cannot run (an installation) and must say so by their language.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from click.testing import CliRunner

from orthoact.cli import main

FENCE = re.compile(r"^```(\w*)(?: +title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = {"console", "text", "json"}


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, title and code of each block."""
    return FENCE.findall(text)


def commands(code: str) -> list[str]:
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]


def run(text: str, name: str, folder: Path) -> int:
    """Run all blocks in `folder`, which is the current one; returns how many commands and blocks ran."""
    count, space = 0, {"__name__": "__main__"}  # type: dict[Any, Any]
    for language, title, code in blocks(text):
        if title:
            (folder / title).write_text(code)
        elif language == "python":
            exec(compile(code, name, "exec"), space)
            count += 1
        elif language in ("bash", "sh"):
            for line in commands(code):
                command(line, name)
                count += 1
        else:
            assert language in SHOWN, f"{name}: a block of {language or 'no language'} that nobody runs: {code[:80]}"
    return count


def command(line: str, name: str) -> None:
    if line.startswith("orthoact "):
        result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{name}: {line}: {result.output} {result.exception!r}"
    else:
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {line}: {done.stderr}"
