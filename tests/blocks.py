"""Run the code blocks of a document as a reader would: in order, in one folder, each where it stands.

`bash` lines that begin with `orthoact` run in this process through the real command line, the others in a shell;
`python` blocks share one namespace; a block with a title becomes a file of that name. `console` blocks show what the
tests cannot run (an installation) and must say so by their language.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from loopback_hub import environment, hub

from orthoact.cli import main

FENCE = re.compile(r"^```(\w*)(?: +title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = {"console", "text", "json"}


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, title and code of each block."""
    return FENCE.findall(text)


def commands(code: str) -> list[str]:
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]


def run(text: str, name: str, folder: Path) -> int:
    """Run all blocks in `folder`, which is the current one; returns how many commands and blocks ran.

    What pushes to the Hub, or loads what was pushed to `you/...`, talks to a Hub on the loopback interface, in a
    process of its own.
    """
    count, space = 0, {"__name__": "__main__"}  # type: dict[Any, Any]
    with hub(folder / ".hub") as made:
        made.writable = ("tester", "you")
        online = environment(made, folder / ".home")
        for language, title, code in blocks(text):
            if title:
                (folder / title).write_text(code)
            elif language == "python" and '"you/' in code:
                shell([sys.executable, "-W", "ignore", "-c", code], name, online)
                count += 1
            elif language == "python":
                exec(compile(code, name, "exec"), space)
                count += 1
            elif language in ("bash", "sh"):
                for line in commands(code):
                    command(line, name, online)
                    count += 1
            else:
                assert language in SHOWN, (
                    f"{name}: a block of {language or 'no language'} that nobody runs: {code[:80]}"
                )
    return count


def command(line: str, name: str, online: dict[str, str]) -> None:
    args = shlex.split(line, comments=True)
    if args[0] == "orthoact" and (
        "push" in args[1] or "--push-to-hub" in args or any(a.startswith("you/") for a in args)
    ):
        shell([sys.executable, "-W", "ignore", "-m", "orthoact", *args[1:]], name, online)
    elif args[0] == "orthoact" and ">" not in args:
        result = CliRunner().invoke(main, args[1:])
        assert result.exit_code == 0, f"{name}: {line}: {result.output} {result.exception!r}"
    else:
        shell(["bash", "-c", line], name, {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def shell(args: list[str], name: str, env: dict[str, str]) -> None:
    done = subprocess.run(args, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, f"{name}: {args}: {done.stdout} {done.stderr}"
