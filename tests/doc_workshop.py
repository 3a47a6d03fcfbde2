"""Runs the blocks of a page, in their order, in a copy of the repository, as a reader would type them.

A `Workshop` has one copy for all pages. `run_page` fails with the block that ended with another status than 0, or whose
output lacks a promised line. What a page writes stays for its later blocks. A text that stands on several pages is run
once. `vllm serve` blocks start that server, in place of the one that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from doc_pages import ADDRESS, ROOT, Block, run_blocks
from serving.server import HOST, Server, running_server, tail
from vllm_redvtp.quiet import environment

COPIED = ("benchmarks", "engine", "examples", "scripts", "training", "vllm_redvtp")
# Two minutes are what one command takes on a machine that is busy with others; the slowest starts vLLM.
SECONDS = 600
# What pages without a `vllm serve` block say in words.
USUAL = "vllm serve examples/tiny_dvlm --plugin redvtp --host 127.0.0.1"


class Workshop:
    """A copy of the repository, at most one server, and what blocks have printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        for name in COPIED:
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.logs = folder
        self.scripts = folder / "scripts"
        self.scripts.mkdir()
        self.printed: dict[tuple[str, str], str] = {}
        self.server: Server | None = None
        self.serving = ""
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        self._stack.close()
        self.server = None
        self.serving = ""

    def run_page(self, page: str) -> None:
        """Raises AssertionError naming the block that did not do what the page says."""
        server = USUAL
        above = ""
        for block in run_blocks(page):
            if block.output:
                missing = [line for line in block.text.splitlines() if line.strip() not in above]
                assert not missing, f"{block.place}: {missing} is not in the output:\n{above}"
            elif block.serves:
                server = _serve_line(block)
                self._serve(server)
            else:
                if block.asks_a_server:
                    self._serve(server)
                above = self.run(block)

    def run(self, block: Block) -> str:
        """What the block prints on stdout."""
        key = (self.serving if block.asks_a_server else "", block.text)
        if key not in self.printed:
            name = re.sub(r"\W+", "-", block.place)
            interpreter = (sys.executable,) if block.language == "python" else ("bash", "-euo", "pipefail")
            self.printed[key] = self.run_text(name, self._addressed(block.text), *interpreter)
        return self.printed[key]

    def run_text(self, name: str, text: str, *interpreter: str) -> str:
        """What the text prints on stdout, saved under this name and given to `interpreter`."""
        script = self.scripts / name
        script.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [*interpreter, str(script)],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        said = f"{done.stdout}{done.stderr}"
        assert done.returncode == 0, f"{name} ended with status {done.returncode}\n{text}\n{said}"
        return done.stdout

    def _environment(self) -> dict[str, str]:
        """The environment is active, and the copy is what is imported."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        copy = f"{self.folder / 'engine'}{os.pathsep}{self.folder}"
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "NO_PROXY": HOST, "no_proxy": HOST}
        return os.environ | offline | {"PATH": path, "PYTHONPATH": copy}

    def _addressed(self, text: str) -> str:
        """With the port of the server that runs. The example's default is that of the page."""
        if self.server is None:
            return text
        return text.replace(ADDRESS, f"{HOST}:{self.server.port}")

    def _serve(self, line: str) -> None:
        if self.server is None or self.serving != line:
            self.close()
            words = shlex.split(line)
            settings = dict(word.split("=", 1) for word in words[: words.index("vllm")])
            arguments = _without(words[words.index("serve") + 1 :], "--host", "--port")
            # Pages name the model as they do in the folder of the repository.
            model, *rest = arguments
            named: tuple[str | Path, ...] = (self.folder / model, "--served-model-name", model, *rest)
            log = self.logs / f"server-{len(list(self.logs.glob('server-*')))}.log"
            with environment(settings):
                self.server = self._stack.enter_context(running_server(log, *named))
            self.serving = line
            example = self.folder / "examples" / "chat_with_image.py"
            example.write_text(self._addressed((ROOT / "examples" / example.name).read_text(encoding="utf-8")))
        assert self.server is not None
        assert self.server.process.poll() is None, tail(self.server.log)


def serve_lines(page: str) -> list[str]:
    """The servers a page needs, in order."""
    lines = [_serve_line(block) for block in run_blocks(page) if block.serves]
    return lines or [USUAL] * any(block.asks_a_server for block in run_blocks(page) if not block.output)


def _serve_line(block: Block) -> str:
    """The block's only command besides the activation, on one line."""
    joined = block.text.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if line.strip() and "activate" not in line]
    return shlex.join(shlex.split(line, comments=True))


def _without(arguments: list[str], *flags: str) -> list[str]:
    """The arguments without these flags and their values."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument in flags:
            next(rest)
        else:
            kept.append(argument)
    return kept
