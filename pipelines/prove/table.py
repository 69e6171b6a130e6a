"""The checks, in their order, and how they are run: each alone, with a time limit, whatever the others do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.preflight.cluster import NotAllowed
from pipelines.prove import around, first, losses, stages
from pipelines.prove.bench import Bench, Different, NotTried
from pipelines.prove.report import FAILED, NOT_TRIED, OK, Report, Row
from runtime.errors import Problem
from runtime.redaction import redacted

log = logging.getLogger("vgg.prove")


@dataclass(frozen=True)
class Check:
    """run: returns what it saw; raises Different, NotTried, or any error.  needs: checks that must be ok before."""

    name: str
    expected: str
    run: Callable[[Bench], str]
    limit_seconds: float
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("preflight", "nothing is missing", first.preflight, 120),
    Check("wrong parameter", "exit code 64, both named, nothing made", first.wrong_parameter, 60),
    Check("missing image", "exit code 78, the image named, nothing made", first.missing_image, 60),
    Check("missing secret", "the secret named, nothing made", first.missing_secret, 60),
    Check("digits", "all steps run, the run succeeds", stages.digits, 900, ("preflight",)),
    Check(
        "metrics", "of the committed shards; all images; top-1 error in the committed 95 % interval",
        stages.metrics, 180, ("digits",),
    ),
    Check("again", "finished work is found: nothing is computed again", stages.again, 420, ("digits",)),
    Check("one parameter", "-S of evaluate: neither shard nor train again", stages.changed, 480, ("digits",)),
    Check("served", "the registered version answers, 9 of 10 digits right", around.served, 420, ("digits",)),
    Check(
        "pod deleted", "the training pod is made anew and continues from its checkpoint",
        losses.pod_deleted, 600, ("preflight",),
    ),
    Check(
        "run canceled", "it ends; resumed, it continues from its checkpoint and succeeds",
        losses.canceled, 600, ("preflight",),
    ),
    Check("several nodes", f"{losses.NODES} pods of a TrainJob train together", losses.nodes, 480, ("preflight",)),
    Check(
        "node deleted", "all nodes are made anew and continue from the checkpoint",
        losses.node_deleted, 480, ("several nodes",),
    ),
    Check(
        "policies", "a step reaches Kubeflow, Kubernetes and the tracking server, and nothing else",
        around.policies, 240, ("preflight",),
    ),
)  # fmt: skip


def run_all(bench: Bench, report: Report, checks: Sequence[Check], time_factor: float = 1.0) -> None:
    """Add a row for every check to the report.  A KeyboardInterrupt is raised again, after the rows are complete."""
    for number, check in enumerate(checks):
        states = {row.check: row.state for row in report.rows}
        if missing := [name for name in check.needs if states.get(name) != OK]:
            why = f"because {missing[0]} {'failed' if states.get(missing[0]) == FAILED else 'was not tried'}"
            report.rows.append(Row(check.name, check.expected, NOT_TRIED, why, 0.0))
            continue
        log.info("%s: %s …", check.name, check.expected)
        began = time.monotonic()
        bench.deadline = began + check.limit_seconds * time_factor
        try:
            state, seen = outcome(check, bench)
        except KeyboardInterrupt:
            left = checks[number:]
            report.rows += [Row(one.name, one.expected, NOT_TRIED, "because of an interrupt", 0.0) for one in left]
            raise
        if state != OK:
            bench.stop_runs()  # the next check needs the nodes
        report.rows.append(Row(check.name, check.expected, state, redacted(seen), time.monotonic() - began))
        log.info("%s: %s: %s", check.name, state, redacted(seen))


def outcome(check: Check, bench: Bench) -> tuple[str, str]:
    """State, and what was seen."""
    try:
        return OK, check.run(bench)
    except (NotTried, NotAllowed) as why:
        return NOT_TRIED, str(why)
    except (Different, Problem) as seen:
        return FAILED, str(seen)
    except Exception as error:  # a fault of the check; the others go on
        log.exception("%s", check.name)
        return FAILED, f"the check itself failed: {error!r}"
