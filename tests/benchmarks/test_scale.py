"""The model of benchmarks.scale: its limits are known, and DDP groups gradients as it says."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from benchmarks import scale
from benchmarks.gradients import LIMITS, buckets, exposed, grouped, layers, num_parameters
from benchmarks.scale import INPUTS, NETWORK
from benchmarks.scaling import Plan, epoch, fitted, from_json, largest_load, passes, step, traffic_seconds

D = layers(NETWORK)


def test_network_d_has_the_published_sizes() -> None:
    assert num_parameters(D) == 138_357_544
    assert sum(layer.flops for layer in D) == 30_940_528_640  # benchmarks.flops, of torch's own counter
    assert 4 * sum(sum(layer.parameters) for layer in D if layer.linear) == 494_571_424


def test_one_gpu_exchanges_nothing_and_an_infinite_network_hides_everything() -> None:
    assert step(D, INPUTS, Plan(ranks=1, batch=256)).exchange == 0
    instant = dataclasses.replace(INPUTS, network=math.inf, nvlink=math.inf, hop=0.0)
    found = step(D, instant, Plan(ranks=64, batch=16_384))
    assert found.exchange == 0
    assert found.device == pytest.approx(found.images + found.weights)


@pytest.mark.parametrize("regions", [True, False])
def test_a_slower_network_never_shortens_a_step(regions: bool) -> None:
    plan = Plan(ranks=64, batch=2048, regions=regions)
    times = [step(D, dataclasses.replace(INPUTS, network=1e9 * gb), plan).seconds for gb in (400, 100, 40, 10, 1)]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_compression_halves_what_is_sent_and_regions_delay_convolutions_only() -> None:
    done = passes(D, INPUTS, 32, exchanged=True)
    whole, half = (grouped(done.ready(True), compressed) for compressed in (False, True))
    assert sum(size for _, size in whole) == 4 * num_parameters(D) == 2 * sum(size for _, size in half)
    by_layer = done.ready(False)
    assert max(at for _, at in by_layer) == pytest.approx(done.computed)
    early = sum(size for size, at in done.ready(True) if at < done.computed)
    assert early == sum(4 * sum(layer.parameters) for layer in D if layer.linear)  # only the classifier's overlap


def test_gradients_are_grouped_as_torch_groups_them() -> None:
    sizes = [size for size, _ in passes(D, INPUTS, 1, exchanged=True).ready(False)]
    tensors = [torch.empty(size // 4, device="meta") for size in sizes]
    found, _ = distributed._compute_bucket_assignment_by_size(tensors, list(LIMITS))  # type: ignore[attr-defined]
    assert buckets(sizes) == found


def test_transfers_wait_for_gradients_and_for_each_other() -> None:
    assert exposed([(1.0, 2.0), (4.0, 1.0)], 4.0) == 1.0  # the first is hidden, the second begins at the end
    assert exposed([(1.0, 5.0), (4.0, 1.0)], 4.0) == 3.0


def test_measured_rates_come_out_again() -> None:
    given = from_json(INPUTS, fitted({256: 3900.0, 32: 3000.0}, traffic_seconds(D, INPUTS)))
    for batch, rate in ((256, 3900.0), (32, 3000.0)):
        assert batch / step(D, given, Plan(ranks=1, batch=batch)).device == pytest.approx(rate)
    with pytest.raises(ValueError, match="no inputs: networks"):
        from_json(INPUTS, {"networks": 1})


def test_validation_is_dealt_in_batches() -> None:
    assert largest_load(782, 16_384, 14) == 782  # one batch, so one process decodes all of it
    assert largest_load(1000, 100, 5) == 200


def test_checkpoints_stall_epochs_that_are_shorter_than_writing_one() -> None:
    plan = Plan(ranks=128, batch=32_768)
    quick = dataclasses.replace(INPUTS, write_rate=math.inf)
    assert epoch(D, quick, plan).stalled < 0.1 < epoch(D, INPUTS, plan).stalled


def test_program_prints_rows_with_the_origin_of_every_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured = tmp_path / "train.json"  # as benchmarks.train prints it, a line for every figure
    measured.write_text('{"batch": 256}\n{"ours": 5000.0}\n', encoding="utf-8")
    command = ["scale", "--json", "--gpus", "1", "8", "--share", "256", "--train", str(measured)]
    monkeypatch.setattr(sys, "argv", command)
    scale.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["origin"].keys() == figures["inputs"].keys()
    assert {name for name, origin in figures["origin"].items() if origin == "given"} == {
        "image_seconds",
        "step_seconds",
    }
    assert [(row["gpus"], row["batch"]) for row in figures["rows"]] == [(1, 256), (8, 256), (1, 256), (8, 2048)]
    assert figures["rows"][0]["images_per_second"] == pytest.approx(5000)
