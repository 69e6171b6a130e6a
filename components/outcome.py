"""The exit code and message of an exception that ends a program, so that no user's situation is a traceback.

A retry code (69, 74) only for what a retry can mend.  What is none of these is a bug of this project: exit code 70, one
line that says where to report it, and the traceback in a file.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import traceback

from components import findings
from runtime import environment
from runtime.errors import Problem, Refused, StorageFailure, Unreachable, WrongParameters
from runtime.manifest import failed_path
from runtime.redaction import redacted

BUG = Problem.exit_code  # EX_SOFTWARE
HINTS = {  # what to do, by errno
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path: a part of it is a file.",
    errno.EISDIR: "Check the path: it is a folder.",
    errno.EEXIST: "Check the path: something else is there.",
    errno.EACCES: "Check owner and permissions, and the user that runs this program.",
    errno.EPERM: "Check owner and permissions, and the user that runs this program.",
    errno.EROFS: "Write to another file system, or mount this one writable.",
    errno.ENAMETOOLONG: "Use a shorter path.",
    errno.ELOOP: "Check the path: its links form a loop.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the system's limit of open files (fs.file-max).",
    errno.EXDEV: "The file system cannot move folders (layers of container images cannot be moved): write to a volume.",
    errno.EPIPE: "A process of this program has ended unexpectedly; run the same command again.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or use another file system.",
    errno.ENOSPC: "Free space, then run the same command again.",
    errno.EDQUOT: "Free space or raise the quota, then run the same command again.",
    errno.ENOMEM: "Free memory, or allow the container more, then run the same command again.",
    errno.ESTALE: "The file server has lost the file; run the same command again.",
    errno.EIO: "Check the disk or the file server, then run the same command again.",
}
FINAL = {  # a retry does not help
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EXDEV,
}  # fmt: skip
OUT_OF_MEMORY = re.compile(
    r"(CUDA out of memory|DefaultCPUAllocator).*?allocate ([\d.]+ \w+)", re.DOTALL
)  # torch's words
LESS_MEMORY = "End other programs there, or lower train.micro_batch_size or evaluate.batch_pixels; then run again."
NETWORK = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.ENETDOWN, errno.ETIMEDOUT, errno.EADDRNOTAVAIL,
}  # fmt: skip


def outcome(error: Exception) -> tuple[int, str]:
    """Exit code and message.  What a message does not list goes to a file, and so does the traceback of a bug."""
    if isinstance(error, Problem):
        return error.exit_code, f"{error}{findings.rest(error)}"
    if isinstance(error, OSError) and error.errno:
        return _of_system(error)
    if isinstance(error, OSError) and "AF_UNIX path too long" in str(error):  # a socket between processes; no errno
        return WrongParameters.exit_code, f"TMPDIR={tempfile.gettempdir()}: too long for sockets. Set a shorter path."
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map" in str(error)):
        return StorageFailure.exit_code, f"out of memory. {HINTS[errno.ENOMEM]}"
    if isinstance(error, RuntimeError) and (found := OUT_OF_MEMORY.search(str(error))):
        return StorageFailure.exit_code, f"out of memory, {found[2]} more are needed. {LESS_MEMORY}"
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("components", "runtime", "vgg"):
        return Refused.exit_code, f"{error}. Install the packages of this repository: make install"
    if _is_of_accelerator(error):
        reason = str(error).strip().partition("\n")[0]
        return StorageFailure.exit_code, f"the GPU failed: {reason}. Check it (nvidia-smi), then run again."
    return BUG, _bug(error)


def _of_system(error: OSError) -> tuple[int, str]:
    number = error.errno or 0
    reason = error.strerror or os.strerror(number)
    path = failed_path(error)
    where = "" if path is None else f"{path}: "
    if number in NETWORK:
        return Unreachable.exit_code, f"{where}{reason}. Check the network and the server, then run again."
    code = WrongParameters.exit_code if number in FINAL else StorageFailure.exit_code
    hint = HINTS.get(number, "Check the disk or the file server, then run the same command again.")
    return code, f"{where}{reason}. {hint}"


def _is_of_accelerator(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, getattr(torch, "AcceleratorError", ()))


def _bug(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:300]
    text = redacted("".join(traceback.format_exception(error)))
    file = "stderr"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vgg-", suffix=".traceback", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as written:
            written.write(text)
            file = written.name
    except OSError:
        print(text, file=sys.stderr)
    if environment.LAST_WORDS.get() and file != "stderr":  # a step's container, whose files are lost at its end
        print(text, file=sys.stderr)
    return (
        f"internal error, {type(error).__name__} in {frame.filename}:{frame.lineno}: {reason}\n"
        f"This is a bug of this program. Please report it as CONTRIBUTING.md says, with the traceback in {file}"
    )
