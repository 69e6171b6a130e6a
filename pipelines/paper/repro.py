"""DVC in the worktree of a run: dvc repro, stopped when this program is, with the failed program's own exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from pipelines.kfp.failure import RunFailed
from runtime import environment, manifest
from runtime.errors import Refused

STOP_SECONDS = 300  # for a training to save its checkpoint; then it is killed, and continues from the one before
UNSET = (  # of the caller: other packages, other runs
    "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "MLFLOW_RUN_ID", "VGG_PIPELINE_RUN", "VGG_GIT_COMMIT",
    "VGG_IMAGE",
)  # fmt: skip
_locks: list[int] = []


def inherited_lock(descriptor: int) -> None:
    """An open lock that DVC's process holds too, so that a run goes on being locked if this program is killed."""
    _locks[:] = [descriptor]


def share_cache(worktree: Path, project: Path) -> None:
    """Use the project's cache.  Files are linked from it, not copied: ImageNet's shards have 150 GB."""
    folder = dvc(project, project, "cache", "dir").strip()
    config = f'[cache]\n    dir = {Path(project, folder)}\n    type = "reflink,hardlink,copy"\n'
    manifest.write_atomically(worktree / ".dvc/config.local", lambda file: file.write(config.encode()))


def dvc(where: Path, project: Path, *arguments: str) -> str:
    """What a command of DVC prints.  Raises Refused if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=where, env=_environment(project), capture_output=True,
        encoding="utf-8", errors="backslashreplace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise Refused(f"{where}: dvc {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def repro(worktree: Path, project: Path, name: str, *arguments: str) -> None:
    """dvc repro of stages alone, without those before them.

    Raises RunFailed with the exit code and message of the program that failed.  If this program is stopped, so is the
    one that DVC runs, and its end is awaited.
    """
    words = worktree.with_name(f"{worktree.name}.words")
    words.unlink(missing_ok=True)
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", *arguments], cwd=worktree,
        env={**_environment(project), environment.LAST_WORDS.name: str(words)}, start_new_session=True,
        pass_fds=_locks, preexec_fn=_notice_interrupts,
    )  # fmt: skip
    try:
        code = running.wait()
    except BaseException:
        _stop(running)
        raise
    finally:
        last = _last_words(words)
        words.unlink(missing_ok=True)
    if code:
        where = f"run {name} failed in {worktree}"
        if last:
            raise RunFailed(f"{where}, exit code {last[0]}: {last[1]}", last[0])
        raise RunFailed(f"{where}: dvc repro ended with {code}; its output is above. Run again to continue.", 1)


def _notice_interrupts() -> None:
    """A shell's background process ignores SIGINT, and so would DVC."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(running: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for DVC and its program: DVC waits for it, and it saves its state.  SIGTERM would end DVC alone."""
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, 10)):
        try:
            os.killpg(running.pid, number)
            running.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def _last_words(path: Path) -> tuple[int, str] | None:
    """Exit code and message of the program that failed, as components.program.end() writes them."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        return int(entry["exit_code"]), str(entry["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _environment(project: Path) -> dict[str, str]:
    """As the user's, with the packages of this Python and the code of the worktree.  DVC_ROOT: the stages track into
    the project, as those of DVC's own queued experiments do."""
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}"
    return {**inherited, "PATH": path, environment.PROJECT.name: str(project)}
