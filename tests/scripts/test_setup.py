"""`scripts/setup.sh`: what it says is missing, its stages, and where it takes torch from."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
# What Debian's minimal system has of what the script calls before Python is there; no apt-get, no python3.
TOOLS = ("bash", "cat", "dirname", "flock", "grep", "id", "ldconfig")


def bash(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root folder of a machine with `TOOLS` and the libraries that they need."""
    root = tmp_path_factory.mktemp("bare")
    root.chmod(0o755)
    for tool in TOOLS:
        program = Path(
            shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or pytest.skip(f"no {tool} here")
        )
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", linked):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
        (root / "bin").mkdir(exist_ok=True)
        (root / "sbin").mkdir(exist_ok=True)
        shutil.copy(program, root / ("sbin" if tool == "ldconfig" else "bin") / tool)
    (root / "dev").mkdir()
    (root / "dev" / "null").touch(mode=0o666)
    (root / "dev" / "null").chmod(0o666)
    shutil.copytree(SCRIPTS, root / "repository" / "scripts")
    return root


@pytest.mark.parametrize("user", ["0", "1000"])
def test_all_that_is_missing_is_named_in_one_message(bare: Path, user: str) -> None:
    chroot = shutil.which("chroot", path=f"{os.environ['PATH']}:/usr/sbin") or pytest.skip("no chroot here")
    enter = [chroot, f"--userspec={user}:{user}", str(bare)]
    if os.getuid() != 0:
        enter = ["/usr/bin/unshare", "--map-root-user", chroot, str(bare)]
    setup = ["/bin/bash", "/repository/scripts/setup.sh"]
    if subprocess.run([*enter, "/bin/bash", "-c", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("chroot is not allowed here")
    done = subprocess.run([*enter, *setup], env={"PATH": "/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "setup: this machine lacks python3 python3-venv libnuma1",
        "setup: on Debian or Ubuntu run:",
        "setup:     sudo apt-get update && sudo apt-get install python3 python3-venv libnuma1",
        "setup: then run this command again",
    ]


STAGES = f"STAGES_OF=setup LOG=$PWD/log; . {SCRIPTS}/stages.sh; "


def test_each_stage_is_one_line_with_its_seconds(tmp_path: Path) -> None:
    script = (
        STAGES + "stage good echo much; stage slow sleep 1.1; stage bad sh -c 'echo broken; exit 3' || echo status $?"
    )
    done = bash(script, tmp_path)
    assert re.fullmatch(r"setup: good: 0 s\nsetup: slow: [12] s\nsetup: bad: failed after 0 s\n", done.stderr)
    assert done.stdout == "status 3\n"
    log = (tmp_path / "log").read_text()
    assert "much" in log
    assert "broken" in log


def test_verbose_shows_what_the_commands_print(tmp_path: Path) -> None:
    done = bash(STAGES + "stage good echo much", tmp_path, REDVTP_VERBOSE="1")
    assert done.stderr == "setup: good\nmuch\nsetup: good: 0 s\n"
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_a_terminal_sees_the_seconds_count(tmp_path: Path) -> None:
    script = shutil.which("script") or pytest.skip("util-linux's script is not installed")
    command = f"bash -euc '{STAGES}stage slow sleep 2.5'"
    done = subprocess.run([script, "-qec", command, "/dev/null"], cwd=tmp_path, capture_output=True, check=False)
    assert re.search(rb"\rsetup: slow: 1 s \r", done.stdout)
    assert re.search(rb"\rsetup: slow: [23] s\r?\n$", done.stdout)


def _wheel(folder: Path, version: str) -> Path:
    """An index with a torch in it that holds its version and nothing else."""
    wheel = folder / "torch" / f"torch-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    name = wheel.name.replace("+", "%2B")
    (wheel.parent / "index.html").write_text(f'<!DOCTYPE html><a href="{name}">{wheel.name}</a>')
    return wheel


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[str]:
    """The address of a server with `pypi` (torch 2.13.0) and `cpu` (2.13.0+cpu)."""
    _wheel(tmp_path / "served" / "pypi", "2.13.0")
    _wheel(tmp_path / "served" / "cpu", "2.13.0+cpu")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def install_torch(folder: Path, pypi: str, cpu: str) -> tuple[str, str, float]:
    """`install_torch` in a new environment: the version that is there then, what was said, and the seconds."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    started = time.monotonic()
    done = bash(
        f"{STAGES} . {SCRIPTS}/install.sh; install_torch",
        folder,
        PIP_INDEX_URL=pypi,
        REDVTP_TORCH_INDEX=cpu,
        PIP_CONFIG_FILE=os.devnull,
        NO_PROXY="127.0.0.1",
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    (installed,) = (folder / ".venv").glob("lib/*/site-packages/torch-*.dist-info")
    return installed.name.removeprefix("torch-").removesuffix(".dist-info"), done.stderr, seconds


@pytest.mark.slow
def test_the_cpu_build_is_taken_where_its_index_answers(indexes: str, tmp_path: Path) -> None:
    version, said, _ = install_torch(tmp_path, f"{indexes}/pypi", f"{indexes}/cpu")
    assert version == "2.13.0+cpu"
    lines = [line.split(": ", 2)[1] for line in said.splitlines() if "are free on this disk" not in line]
    # What it will cost is said before it is downloaded.
    assert [line.split(" at ")[0] for line in lines] == [
        "looking for the CPU build of torch",
        "found",
        "torch 2.13.0+cpu",
    ]


@pytest.mark.slow
def test_pypi_is_taken_without_a_wait_where_it_does_not(indexes: str, tmp_path: Path) -> None:
    # A port that refuses connections, as discard does nearly everywhere.
    version, said, seconds = install_torch(tmp_path, f"{indexes}/pypi", "http://127.0.0.1:9/cpu")
    assert version == "2.13.0"
    assert "not found after" in said
    assert "torch comes from PyPI, with CUDA libraries that are not used here: about " in said
    assert seconds < 60


@pytest.mark.slow
def test_pypi_is_taken_where_the_index_has_the_name_but_not_the_file(indexes: str, tmp_path: Path) -> None:
    next((tmp_path / "served" / "cpu" / "torch").glob("*.whl")).unlink()
    version, said, _ = install_torch(tmp_path, f"{indexes}/pypi", f"{indexes}/cpu")
    assert version == "2.13.0"
    assert re.search(r"torch 2\.13\.0\+cpu: failed after \d+ s", said)


@pytest.mark.slow
def test_an_empty_address_means_pypi(indexes: str, tmp_path: Path) -> None:
    version, said, _ = install_torch(tmp_path, f"{indexes}/pypi", "")
    assert version == "2.13.0"
    assert "looking for" not in said


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_files_that_commands_write_cannot_turn_the_linter_red(tmp_path: Path) -> None:
    # ruff respects .gitignore inside a repository.
    (tmp_path / ".git").mkdir()
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name in ("results/report.py", "demo-output/notes.py", "scores/a.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("import os,sys\n")
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
