"""Files of a training: checkpoints on every node, and its curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.distributed import Group
    from runtime.targets import Output
    from vgg.network.trained import Trained


def download_checkpoints(output: Output, group: Group) -> None:
    """Download the same checkpoints to every node: first to the one that writes them, then to the others."""
    if group.is_first:
        output.download_checkpoints()
        output.upload_checkpoints(only_add=True)  # those not uploaded while the store could not be reached
    group.barrier()
    if group.local_rank == 0 and not group.is_first:
        output.download_checkpoints()
    group.barrier()


def write_curves(path: str, trained: Trained) -> None:
    """Loss and error of every epoch, CSV."""
    from runtime import manifest
    from vgg.training.reporting import curves

    table = "\n".join(",".join(row) for row in curves(trained.step.state)) + "\n"
    manifest.write_atomically(Path(path), lambda file: file.write(table.encode()))
