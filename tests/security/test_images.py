"""The images, built and run for real: make test-images.

Each target's self-test with nothing but its rights on a cluster, and the whole pipeline on the digits in containers:
shards and checkpoints in an S3 server, tracking in the MLflow server of deploy/ as its ordinary user, metrics those of
dvc repro, bit for bit.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, environment, make_repository
from containers import CERTIFICATES, HARDENED, base, configure_podman, image_registry, podman, socket
from mlflowpod import STEPS_PASSWORD, Pod, running
from s3servers import BUCKET, SECRET, Server, rclone_server  # noqa: F401  # a fixture

from components.images import TARGETS, lock, reference
from pipelines.build import push
from pipelines.preflight.registry import Registries
from runtime.errors import Refused
from security.canary import find
from security.sbom import main as write_sbom
from vgg.params import STAGES

pytestmark = [pytest.mark.images, pytest.mark.timeout(2400)]
CANARY = "canary-7f3a9c51e2d84b60"  # in the environment of the build; the key of the store is one in that of the run
OUT = ROOT / "build/images"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References of the built images, by target."""
    configure_podman(tmp_path_factory.mktemp("engine"))
    command = [sys.executable, "-m", "pipelines.build", "--engine", "podman", "--base", base()]
    if CERTIFICATES.exists():
        command += ["--ca", str(CERTIFICATES)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "AWS_SECRET_ACCESS_KEY": CANARY}, stdout=subprocess.PIPE, text=True,
        timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, "see the output above"
    print(done.stdout)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "sizes.txt").write_text(done.stdout)
    return {target: reference(stage) for stage, target in TARGETS.items()}


@pytest.fixture
def mounted(images: dict[str, str], target: str) -> Iterator[Path]:
    """The root file system of an image."""
    yield Path(podman("image", "mount", images[target]).strip())
    podman("image", "unmount", images[target])


@pytest.mark.parametrize("target", ["data", "train", "serve"])
def test_the_programs_run_with_no_rights_and_no_network(target: str, images: dict[str, str]) -> None:
    said = podman("run", "--rm", *HARDENED, images[target], "python", "-m", "components.selftest", target)
    assert "user 65532:65532, root file system read-only" in said
    assert said.rstrip().endswith("good")


@pytest.mark.parametrize("target", ["data", "train", "serve"])
def test_an_image_is_what_its_lock_says_and_says_so(target: str, mounted: Path, images: dict[str, str]) -> None:
    """SBOM equals the lock; numeric user; no entry point; no package manager; no canary."""
    name, tag = images[target].rsplit(":", 1)
    out = OUT / f"vgg-{target}.cdx.json"
    write_sbom(["--name", name, "--version", tag, "--lock", str(ROOT / lock(target)), str(mounted), str(out)])
    bill = json.loads(out.read_text())
    assert len([part for part in bill["components"] if part["purl"].startswith("pkg:deb/")]) > 50

    about = json.loads(podman("image", "inspect", images[target]))[0]
    assert about["Config"]["User"] == "65532:65532"
    assert not about["Config"].get("Entrypoint")
    for place in ("tmp/uv", "opt/uv", "uv", "cache/uv", "root/.cache", "opt/vgg/bin/pip"):
        assert not (mounted / place).exists(), place
    assert (mounted / "usr/bin/gcc").exists() == (target != "data")  # Triton needs it
    writable = [p for p in (mounted / "srv").rglob("*") if p.stat().st_uid == 65532 or p.stat().st_mode & 0o002]
    assert not writable
    assert not find(CANARY, mounted / "srv", mounted / "etc", mounted / "root", mounted / "var", mounted / "tmp")
    assert CANARY not in json.dumps(about) + podman("history", "--no-trunc", images[target])


def test_a_pushed_image_is_found_by_digest_and_a_tag_never_moves(
    images: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a real registry: each is pushed once; a submission passes on digests."""
    caplog.set_level("INFO", "vgg.build")
    with image_registry(tmp_path) as host:
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
        name = f"{host}/{images['data'].partition('/')[2]}"
        podman("tag", images["data"], name)
        try:
            with pytest.raises(Refused, match="not in its registry"):
                Registries().pinned(name)
            pinned = push("podman", name)
            assert re.fullmatch(rf"{host}/vgg-data@sha256:[0-9a-f]{{64}}", pinned)
            assert push("podman", name) == Registries().pinned(name) == pinned
            assert f"exists: {pinned}" in caplog.text
            podman("tag", base(), name)  # somebody else's build under our tag
            assert push("podman", name) == pinned
        finally:
            podman("untag", name, name)


def kill_when_it_has_saved(store: Path, running: subprocess.Popen[bytes]) -> None:
    """Kill the training container once a checkpoint is in the store."""
    until = time.monotonic() + 600
    while not list(store.glob("vgg/checkpoints/*/step-*/manifest.json")):
        assert time.monotonic() < until and running.poll() is None, "no checkpoint"
        time.sleep(0.2)
    training = podman("ps", "--quiet", "--filter", f"ancestor={reference('train')}").split()
    assert len(training) == 1
    podman("kill", *training)


def test_the_pipeline_in_containers_gives_the_metrics_of_dvc_repro(
    images: dict[str, str], rclone_server: Server, tmp_path: Path, empty_database: Path
) -> None:
    """Training is killed once; a second run continues from the store; a third finds everything finished."""
    mlflow = Pod(tmp_path / "mlflow", empty_database)
    mlflow.allow_local_address()
    with running(mlflow), socket(tmp_path) as docker_host:
        mlflow.create_user()
        env = {
            **os.environ,
            **rclone_server.env(VGG_STORE=f"s3://{BUCKET}/vgg"),
            "MLFLOW_TRACKING_URI": mlflow.address,
            "MLFLOW_TRACKING_USERNAME": "vgg",
            "MLFLOW_TRACKING_PASSWORD": STEPS_PASSWORD,
            "DOCKER_HOST": docker_host,
            "PYTHONPATH": str(ROOT),
        }

        def start(name: str) -> subprocess.Popen[bytes]:
            (tmp_path / name).mkdir()
            command = [sys.executable, "-m", "pipelines.submit", "--local", "--params", str(ROOT / "params.yaml")]
            with open(OUT / f"{name}.log", "wb") as log:
                return subprocess.Popen(
                    ["timeout", "900", *command], cwd=tmp_path / name, env=env, stdout=log, stderr=subprocess.STDOUT
                )

        def outputs(name: str) -> Path:
            return next((tmp_path / name).glob("build/kubeflow/vgg-imagenet-*"))

        lost = start("lost")
        kill_when_it_has_saved(rclone_server.root / BUCKET, lost)
        assert lost.wait(300) == 1, (OUT / "lost.log").read_text()[-6000:]
        assert "failed" in (outputs("lost") / "report/summary").read_text().splitlines()[0]
        for name in ("first", "again"):
            assert start(name).wait(900) == 0, (OUT / f"{name}.log").read_text()[-6000:]
        assert "continuing" in (OUT / "first.log").read_text()
        first, again = outputs("first"), outputs("again")

    repo = tmp_path / "dvc"
    (repo / "images").mkdir(parents=True)
    make_repository(repo)
    shutil.copy(ROOT / "params.yaml", repo)
    alone = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", GIT_CONFIG_GLOBAL="/dev/null")
    del alone["OMP_NUM_THREADS"]  # sums are added up by as many threads as in the containers
    for command in (["git", "init", "-q"], ["dvc", "repro"]):
        done = subprocess.run(command, cwd=repo, env=alone, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        expected = (repo / f"metrics/{stage}.json").read_bytes()
        assert (first / stage / "metrics").read_bytes() == expected, stage
        assert (again / stage / "metrics").read_bytes() == expected, stage  # found finished; the same version
    pages = [path.read_text(encoding="utf-8") for path in (first / "evaluate/report", repo / "metrics/evaluation.html")]
    assert "trained by" not in pages[0]  # a step has no file of another
    theirs, ours = (re.sub("<tr><td>(trained|evaluated) by</td>.*?</tr>", "", page) for page in pages)
    assert theirs == ours
    said = json.loads((first / "evaluate/executor_output.json").read_text())["artifacts"]
    assert len(said["confusion"]["artifacts"][0]["metadata"]["confusionMatrix"]["rows"]) == 10
    assert "Gate: passed" in (first / "report/summary").read_text()

    store = rclone_server.root / BUCKET
    assert list(store.glob("vgg/checkpoints/*/manifest.json"))
    runs = [tmp_path / name for name in ("lost", "first", "again")]
    for secret in (SECRET, STEPS_PASSWORD):
        assert not find(secret, *runs, store, tmp_path / "mlflow", OUT)
    shutil.copy(first / "evaluate/report", OUT / "evaluation.html")
