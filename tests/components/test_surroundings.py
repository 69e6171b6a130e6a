"""The programs in broken surroundings: one message and a code of the contract; never a traceback or a vain retry."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVALUATE, REGISTER, ROOT, SHARD, TRAIN, draw_images, environment, flags, once, program

from components import outcome
from components.program import run
from runtime import filesystem
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet

USER = "unshare --user --map-user=4242 --map-group=4242"  # no user of that number, no home; files as for their owner
ODD = "strace -f -qq -o /dev/null {paths} -e trace=flock,fsync,chmod,utimensat,mmap" + "".join(
    f" -e inject={call}:error={error}"
    for call, error in [
        ("flock", "ENOLCK"),
        ("fsync", "EINVAL"),
        ("chmod", "EPERM"),
        ("utimensat", "EPERM"),
        ("mmap", "ENODEV"),
    ]
)
CODES = {0, 64, 65, 69, 74, 75, 78}
STAGES = ("shard", "train", "evaluate", "register")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A folder in which all stages have run."""

    def make(folder: Path) -> None:
        shutil.copy(empty_database, folder / "mlflow.db")
        draw_images(folder / "images")
        sections = {"shard": SHARD, "train": {**TRAIN, "classifier_width": 16}, "evaluate": EVALUATE}
        (folder / "params.yaml").write_text(json.dumps({**sections, "register": REGISTER}))
        for stage in STAGES:
            done = program(stage, *flags(stage, folder, folder / "params.yaml"), cwd=folder)
            assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "finished", make)


COMMANDS = {  # programs that are not a stage
    "gate": "components.register.gate --params params.yaml --shards shards --predictions predictions "
    "--evaluation m/evaluate.json --answer yes",
    "report": 'components.report --status {"state":"SUCCEEDED"} --summary page.md',
    "plan": "components.train.plan --params params.yaml --shards shards",
    "verify": "components.shard verify shards/manifest.json",
    "lineage": "components.lineage model --verify",
    "reproduce": "components.lineage reproduce model",
    "doctor": "components.doctor --deep",
    "replay": "components.tracking replay",
    "launch": "components.launch 1 components.train.plan --params params.yaml --shards shards",
    "step": "components.step --attempts 1 components.train.plan --params params.yaml --shards shards",
    "closure": "components.closure train",
    "images": "components.images",
    "environment": "components.environment",
    "summary": "components.summary",
    "selftest": "components.selftest data",
    "compile": "pipelines.submit --compile package.yaml",
    "preflight": "pipelines.submit --preflight",
    "params": "vgg.params",
}
OTHERS = {name: command.split() for name, command in COMMANDS.items()}


class Surroundings:
    """A copy of the finished folder, in which one stage runs once more in a shell."""

    def __init__(self, finished: Path, where: Path, stage: str) -> None:
        self.folder, self.stage = where / "run", stage
        shutil.copytree(finished, self.folder, symlinks=True)
        shutil.rmtree(self.folder / ".tracking", ignore_errors=True)
        for path in {"shard": ["shards"], "train": ["model"], "evaluate": ["predictions"]}.get(stage, []):
            shutil.rmtree(self.folder / path)

    def run(self, before: str = "", prefix: str = "", after: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """before: shell commands.  prefix: of the program's command.  after: redirections."""
        module, *arguments = OTHERS.get(self.stage) or [
            f"components.{self.stage}", *map(str, flags(self.stage, Path(), "params.yaml"))
        ]  # fmt: skip
        paths = " ".join(f"-P {p}" for p in self.folder.rglob("*") if not p.is_relative_to(self.folder / "images"))
        paths += "".join(f" -P {self.folder}/{name}.lock" for name in ("shards", "model", "predictions"))
        command = " ".join([prefix.format(paths=paths), sys.executable, "-m", module, *map(shlex.quote, arguments)])
        variables = {
            name: value for name, value in environment(**env).items() if name not in ("HOME", "USER", "LOGNAME")
        }
        return subprocess.run(
            ["unshare", "--mount", "bash", "-c", f"{before}\nexec {command} {after}"],
            cwd=self.folder, env={**variables, "VGG_WORKERS": "0", **env}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip


CASES = [  # name, how, stages, exit code, what the message says
    ("unknown user", {"prefix": USER}, STAGES, 0, "HOME: user 4242 has none; using /tmp/vgg-home-4242"),
    ("read-only folder", {"before": "chmod -R a-w .", "prefix": USER}, STAGES, 64, "not a writable folder"),
    ("unreadable input", {"before": "chmod 0 shards images", "prefix": USER}, STAGES, 64, "Permission denied"),
    ("few files", {"before": "ulimit -n 64"}, STAGES, 0, ""),
    ("closed output", {"after": ">&- 2>&-"}, STAGES, 0, ""),
    (
        "a folder for metrics",
        {"before": "rm -r m; mkdir -p m/{shard,train,evaluate,register}.json"},
        STAGES,
        64,
        "is a folder",
    ),
    (
        "a folder for parameters",
        {"before": "rm params.yaml; mkdir params.yaml"},
        STAGES,
        64,
        "params.yaml: cannot be read",
    ),
    ("binary parameters", {"before": "printf '\\377\\376' > params.yaml"}, STAGES, 64, "not a text file in UTF-8"),
    ("small /dev/shm", {"before": "mount -t tmpfs -o size=64k none /dev/shm"}, STAGES, 0, ""),
    ("no temporary folder", {"TMPDIR": "/nonexistent"}, STAGES, 0, ""),
    (
        "long temporary folder",
        {"before": "export TMPDIR=$PWD/$(printf 'long%.0s' {1..30}); mkdir $TMPDIR"},
        ("shard",),
        64,
        "too long for sockets",
    ),
    (
        "limited file size",
        {"before": "ulimit -f 8"},
        ("train",),
        64,
        "model/step-00000002.tmp/weights.safetensors: File too large. Raise the limit",
    ),
    ("little memory", {"before": "ulimit -v 1500000"}, ("train", "evaluate"), 74, "out of memory"),
    ("deleted folder", {"before": "mkdir gone; cd gone; rmdir ../gone"}, STAGES, 64, "current folder does not exist"),
    ("wrong variables", {"VGG_WORKERS": "many", "VGG_HANG_SECONDS": "-1"}, STAGES, 64, "VGG_HANG_SECONDS: must be"),
    ("odd file system", {"prefix": ODD}, STAGES, 0, ""),
]
QUICK = ("unknown user", "read-only folder", "a folder for metrics", "wrong variables")


def expect(done: subprocess.CompletedProcess[str], folder: Path, code: int, message: str) -> None:
    subprocess.run(["chmod", "-R", "u+rwX", folder], check=True, timeout=20)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == (code != 0)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", QUICK)
def test_sharding_in_broken_surroundings(name: str, params_file: Path, shards: ShardSet, tmp_path: Path) -> None:
    """One message and a code of the contract; or the bytes of a run in good surroundings."""
    begun = tmp_path / "begun"
    (begun / "m").mkdir(parents=True)
    (begun / "shards").mkdir()
    for path in (params_file, tmp_path / "mlflow.db"):
        shutil.copy(path, begun)
    shutil.copytree(tmp_path / "images", begun / "images")
    _, how, _, code, message = next(case for case in CASES if case[0] == name)
    surroundings = Surroundings(begun, tmp_path, "shard")
    expect(surroundings.run(**how), surroundings.folder, code, message)
    if code == 0:
        for tar in shards.directory.glob("*.tar"):
            assert (surroundings.folder / "shards" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "how", "code", "message"),
    [
        pytest.param(stage, how, code, message, id=f"{name}-{stage}")
        for name, how, stages, code, message in CASES
        for stage in stages
    ],
)
def test_all_stages_in_broken_surroundings(
    stage: str, how: dict[str, str], code: int, message: str, finished: Path, tmp_path: Path
) -> None:
    surroundings = Surroundings(finished, tmp_path, stage)
    expect(surroundings.run(**how), surroundings.folder, code, message)
    if code == 0:
        compared = {"shard": "shards/manifest.json", "train": "model/step-00000008/weights.safetensors",
                    "evaluate": "predictions/predictions.npy", "register": "params.yaml"}[stage]  # fmt: skip
        assert (surroundings.folder / compared).read_bytes() == (finished / compared).read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize(
    "how", ["unknown user", "read-only folder", "closed output", "deleted folder", "wrong variables"]
)
@pytest.mark.parametrize("name", OTHERS)
def test_all_other_programs_end_with_a_code_of_the_contract(
    name: str, how: str, finished: Path, tmp_path: Path
) -> None:
    surroundings = Surroundings(finished, tmp_path, name)
    done = surroundings.run(**next(case[1] for case in CASES if case[0] == how))
    subprocess.run(["chmod", "-R", "u+rwX", surroundings.folder], check=True, timeout=20)
    assert done.returncode in CODES, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout or done.stderr or how == "closed output"


def ended(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a program that raises."""

    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(work)
    return int(str(caught.value)), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 74, "error: No space left on device. Free space"),
        (OSError(28, "No space left on device", "/x/y"), 74, "error: /x/y: No space left on device. Free space"),
        (OSError(5, "Input/output error", "/x"), 74, "error: /x: Input/output error. Check the disk"),
        (OSError(13, "Permission denied", "/x"), 64, "error: /x: Permission denied. Check owner"),
        (OSError(24, "Too many open files"), 64, "error: Too many open files. Raise the limit"),
        (OSError(21, "Is a directory", "/x.tmp", None, "/x"), 64, "error: /x: Is a directory."),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            69,
            "error: Connection reset by peer. Check the network",
        ),
        (MemoryError(), 74, "error: out of memory."),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 78, "error: No module named 'torch'. Install"),
        (Refused("no"), 78, "error: no\n"),
    ],
)
def test_an_error_ends_with_the_code_that_fits(
    error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, text = ended(error, capsys)
    assert found == code
    assert text.startswith(message)
    assert text.count("\n") == 1


def test_memory_that_torch_cannot_get_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(1 << 50, dtype=torch.uint8)
    of_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of …")
    for error, size in ((of_cpu.value, f"{1 << 50} bytes"), (of_gpu, "20.50 GiB")):
        code, text = ended(error, capsys)
        assert code == 74
        assert text.startswith(f"error: out of memory, {size} more are needed. End other programs there, or lower ")


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("No module named 'vgg.y'", name="vgg.y")])
def test_a_bug_is_one_line_and_a_file(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(error, capsys)
    assert code == outcome.BUG == 70
    assert f"error: internal error, {type(error).__name__} in {__file__}:" in text
    assert "Traceback" not in text
    file = Path(text.split("the traceback in ")[1].strip())
    assert file.read_text().startswith("Traceback")
    file.unlink()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m components.environment | head -1", shell=True, cwd=ROOT, env=environment(),
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == b""


def test_a_python_without_the_packages_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "components.train"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")
    assert "make install" in done.stderr


def test_a_file_system_without_locks_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_file: object, _operation: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(filesystem.fcntl, "flock", refuse)
    with open(tmp_path / "x", "w") as file:
        assert filesystem.lock(file)
        assert filesystem.lock(file)
    assert [f"{tmp_path}: its file system has no locks" in r.getMessage() for r in caplog.records] == [True]
