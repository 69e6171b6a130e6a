"""Every environment variable that the programs read: meaning, default, and validation.

python -m components.environment lists them.  No other module reads os.environ (tests/runtime/test_environment.py).
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.errors import WrongParameters

T = TypeVar("T")
SIMILARITY = 0.7  # of a mistyped variable, without VGG_: 0.71 for S3_TIMEOUT, 0.62 at most for the tests' own


def positive_integer(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError("a positive integer")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("an integer of 0 or more")
    return int(text)


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("a number of seconds above 0")
    return value


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    default: value of get() if the variable is not set or empty.  shown: the default in words, if it is computed.
    parse: raises ValueError with a description of valid values.  computed: the default, if it depends on where the
    program runs.
    """

    name: str
    meaning: str
    default: T
    parse: Callable[[str], T]
    shown: str = ""
    computed: Callable[[], T] | None = None

    def get(self) -> T:
        """The value, or the default.  Raises WrongParameters for an invalid value."""
        text = os.environ.get(self.name, "")
        if not text:
            return self.computed() if self.computed else self.default
        try:
            return self.parse(text)
        except ValueError as expected:
            raise WrongParameters(f"{self.name}: must be {expected}, not {text!r}") from None

    def is_set(self) -> bool:
        return bool(os.environ.get(self.name))

    def default_in_words(self) -> str:
        return self.shown or ("" if self.default in (None, "") else str(self.default))


VARIABLES: dict[str, list[Variable[Any]]] = {}


def _group(title: str, *variables: Variable[Any]) -> None:
    VARIABLES[title] = list(variables)


def _text(name: str, meaning: str, default: str = "", shown: str = "") -> Variable[str]:
    return Variable(name, meaning, default, str, shown)


def folder(text: str) -> Path:
    return Path(os.path.expanduser(text))  # no shell has replaced a ~ in docker -e, a file of variables, or quotes


PROJECT = _text("DVC_ROOT", "project for which DVC runs a stage; that of the user, also in a temporary copy of it")


def project() -> Path:
    """The user's project, absolute: home of the tracking database, of artifacts and of journals that wait for it.

    DVC runs queued experiments in copies of the project, below .dvc/tmp/exps, and deletes them.  DVC_ROOT names the
    project in every stage; without it, the path of the copy does.
    """
    if root := PROJECT.get():
        return Path(root).absolute()
    here = Path.cwd()
    copies = [folder for folder in here.parents if folder.parts[-3:] == (".dvc", "tmp", "exps")]
    return copies[-1].parents[2] if copies else here


def _database() -> str:
    path = str(_in_project("mlflow.db"))
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")  # SQLAlchemy would decode them


def _journals() -> Path:
    return _in_project(".tracking")


def _in_project(name: str) -> Path:
    """A path in the user's project; relative if the program runs there."""
    root = project()
    return Path(name) if root == Path.cwd() else root / name


def cache() -> Path:
    """This node's folder for caches, which may not exist; see store.storage.cache_folder."""
    return CACHE.get() or (CACHE_HOME.get() or Path.home() / ".cache") / "vgg"


def artifacts() -> Path | None:
    """Folder of MLflow's artifacts, absolute; None if they belong to another database or a server, which decides."""
    return project() / "mlruns" if TRACKING_URI.get() == _database() else None  # MLflow sets the variable itself


STORE = Variable(
    "VGG_STORE", "folder or s3://bucket/prefix of 'store:' paths: shards, checkpoints, predictions", "",
    os.path.expanduser,
)  # fmt: skip
CACHE = Variable[Path | None](
    "VGG_CACHE",
    "folder for shards of an object store, compiled networks, and the copy of images in parquet",
    None,
    folder,
    "~/.cache/vgg",
)
CACHE_BYTES = Variable[int | None](
    "VGG_CACHE_BYTES", "bytes of shards that VGG_CACHE may hold", None, positive_integer, "4/5 of its disk"
)
JOURNAL = Variable(
    "VGG_JOURNAL", "folder of events that wait for MLflow", Path(), folder, ".tracking in the project", _journals
)
WORKERS = Variable[int | None](
    "VGG_WORKERS", "decoding processes of a rank", None, count, "0 on a CPU, else its share of the cores, at most 14"
)
HANG_SECONDS = Variable(
    "VGG_HANG_SECONDS", "time without a heartbeat after which a rank is killed", 1200, positive_integer
)
S3_PATIENCE_SECONDS = Variable(
    "VGG_S3_PATIENCE_SECONDS", "how long an operation on an object store may make no progress", 120.0, positive_seconds
)
S3_TIMEOUT_SECONDS = Variable(
    "VGG_S3_TIMEOUT_SECONDS", "how long one request to it may be silent; the patience at most", 20.0, positive_seconds
)
KUBERNETES_PATIENCE_SECONDS = Variable(
    "VGG_KUBERNETES_PATIENCE_SECONDS", "how long the Kubernetes API may not answer", 600.0, positive_seconds
)
REGISTRY = _text("VGG_REGISTRY", "container registry of the images", "localhost")
_group(
    "yours to set", STORE, CACHE, CACHE_BYTES, JOURNAL, WORKERS, HANG_SECONDS, S3_PATIENCE_SECONDS, S3_TIMEOUT_SECONDS,
    KUBERNETES_PATIENCE_SECONDS, REGISTRY,
)  # fmt: skip

TRACKING_URI = Variable(
    "MLFLOW_TRACKING_URI", "MLflow server or database", "", str, "sqlite:///mlflow.db in the project", _database
)
TRACKING_USERNAME = _text("MLFLOW_TRACKING_USERNAME", "user of the MLflow server, with MLFLOW_TRACKING_PASSWORD")
TRACKING_RUN_ID = _text("MLFLOW_RUN_ID", "existing MLflow run that a stage uses as its own")
KUBECONFIG = _text("KUBECONFIG", "kubeconfig file, outside of the cluster")
PIPELINES_ENDPOINT = _text("KF_PIPELINES_ENDPOINT", "address of the Kubeflow Pipelines API")
PIPELINES_UI_ENDPOINT = _text("KF_PIPELINES_UI_ENDPOINT", "address of the Kubeflow Pipelines pages, for links")
PIPELINES_TOKEN = _text("KF_PIPELINES_TOKEN", "bearer token for Kubeflow Pipelines")
PIPELINES_TOKEN_FILE = _text(
    "KF_PIPELINES_SA_TOKEN_PATH", "file with a service account token for it", shown="where Kubernetes mounts it"
)
PIPELINES_COOKIES = _text("KF_PIPELINES_COOKIES", "cookies for Kubeflow Pipelines")
REGISTRY_AUTH_FILE = _text("REGISTRY_AUTH_FILE", "file with podman's registry credentials")
CA_FILE = _text("SSL_CERT_FILE", "trusted certificates")
CACHE_HOME = Variable[Path | None]("XDG_CACHE_HOME", "folder for caches", None, folder, "~/.cache")
_group(
    "defined by other software", TRACKING_URI, TRACKING_USERNAME, TRACKING_RUN_ID, KUBECONFIG, PIPELINES_ENDPOINT,
    PIPELINES_UI_ENDPOINT, PIPELINES_TOKEN, PIPELINES_TOKEN_FILE, PIPELINES_COOKIES, REGISTRY_AUTH_FILE, CA_FILE,
    CACHE_HOME, PROJECT,
)  # fmt: skip

IMAGE = _text("VGG_IMAGE", "image of a step, recorded as provenance")
PIPELINE_RUN = _text("VGG_PIPELINE_RUN", "name of the pipeline run")
GIT_COMMIT = _text("VGG_GIT_COMMIT", "commit that an image was built from; '-dirty' if files were modified")
LAST_WORDS = _text("VGG_LAST_WORDS", "file for the exit code and message of a program, read by components.step")
RANKS_FOLDER = _text("VGG_RANKS", "folder for the heartbeats of the ranks, read by components.launch")
LAUNCHER = Variable[int | None]("VGG_LAUNCHER", "process ID of the launcher that started the ranks", None, count)
ELASTIC_RUN = _text("TORCHELASTIC_RUN_ID", "set by torchrun in every rank")
RANK = Variable("RANK", "rank of this process, set by torchrun", 0, count)
WORLD_SIZE = Variable("WORLD_SIZE", "number of ranks, set by torchrun", 1, positive_integer)
LOCAL_RANK = Variable("LOCAL_RANK", "rank of this process on its machine, set by torchrun", 0, count)
LOCAL_WORLD_SIZE = Variable[int | None](
    "LOCAL_WORLD_SIZE", "ranks on this machine, set by torchrun", None, positive_integer, "WORLD_SIZE"
)
NUM_NODES = Variable("PET_NNODES", "number of machines of a TrainJob", 0, count)
NODE_RANK = Variable[int | None]("PET_NODE_RANK", "number of this machine, from 0", None, count)
NODE_ADDRESS = _text("PET_MASTER_ADDR", "host name of machine 0")
NODE_PORT = Variable("PET_MASTER_PORT", "free port of machine 0", 0, count)
POD_NAME = _text("KFP_POD_NAME", "name of the pod of a step, set by Kubeflow")
HOST_NAME = _text("HOSTNAME", "name of the pod of a step, if KFP_POD_NAME is not set")
IN_CLUSTER = _text("KUBERNETES_SERVICE_HOST", "set by Kubernetes in every pod")
_group(
    "set by the pipeline and its launchers", IMAGE, PIPELINE_RUN, GIT_COMMIT, LAST_WORDS, RANKS_FOLDER, LAUNCHER,
    ELASTIC_RUN, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, NUM_NODES, NODE_RANK, NODE_ADDRESS, NODE_PORT,
    POD_NAME, HOST_NAME, IN_CLUSTER,
)  # fmt: skip


def expect_valid() -> None:
    """Raises WrongParameters with a line for every variable whose value is invalid."""
    mistakes = []
    for variable in (variable for group in VARIABLES.values() for variable in group):
        try:
            variable.get()
        except WrongParameters as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise WrongParameters("\n".join(mistakes))


def mistyped() -> list[str]:
    """A message for every VGG_… that is set and not known, but nearly: it has no effect, which nobody would see."""
    known = {variable.name for group in VARIABLES.values() for variable in group}
    yours = {variable.name.removeprefix("VGG_"): variable.name for variable in VARIABLES["yours to set"]}
    found = []
    for name in sorted(os.environ.keys() - known):
        word = name.removeprefix("VGG_")
        if word != name and (close := difflib.get_close_matches(word, yours, 1, SIMILARITY)):
            found.append(f"{name} is set and has no effect; did you mean {yours[close[0]]}?")
    return found


def ensure_home() -> str:
    """Set HOME to a temporary folder if this user has none or cannot write to it, for this program and its children.

    MLflow and torch fail without a home: a container may run as a user that no file knows (OpenShift, docker --user).
    Returns a message about it, '' if HOME is good.
    """
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return ""
    os.environ["HOME"] = _private_folder(f"vgg-home-{os.getuid()}")
    os.environ.setdefault("USER", str(os.getuid()))  # getpass knows no name for this user either
    missing = f"{home} is not writable" if home.is_absolute() else f"user {os.getuid()} has none"
    return f"HOME: {missing}; using {os.environ['HOME']} (set HOME, or VGG_CACHE for what must outlive this machine)"


def _private_folder(name: str) -> str:
    """A folder of this user among the temporary files, the same at every start unless someone else made it."""
    folder = Path(tempfile.gettempdir()) / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
        return str(folder)
    return tempfile.mkdtemp(prefix=f"{name}-")


def passed_on(names: tuple[str, ...]) -> dict[str, str]:
    """Values of those variables that are set, for another process or pod."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


# names of variables with a secret, ours and those of other software; what ends in _FILE or _PATH is not one
_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|(^|_)(PASS|SECRET|TOKEN|COOKIES?|KEY|ACCESS_KEY_ID|CONNECTION_STRING))$",
    re.IGNORECASE,
)


def secret_values() -> list[str]:
    """Values of the variables that hold secrets; of cookies also the value of each."""
    found = [value for name, value in os.environ.items() if value and _SECRET_NAME.search(name)]
    return found + [part for value in found for part in re.findall(r"=([^;\s]+)", value)]


def addresses() -> list[str]:
    """Values of all variables that hold an address with a user or a password."""
    return [value for value in os.environ.values() if "://" in value and "@" in value]
