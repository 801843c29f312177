"""Bulk segmentation with Ray Data: every image under a prefix becomes a mask and a row, whatever happens on the way.

list -> leave out what is committed -> read and decode -> segment -> encode and commit -> compact -> report

The stage always lists; it says "cached" only when the listing adds nothing. Killed at any moment and started again,
every image ends with exactly one row and one mask.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from pipelines.bulk.commits import CLASSES, PAGE, REPORT, RESULTS, RUN, Committed, Output
from pipelines.bulk.job import SegmentJob
from pipelines.bulk.page import write_page
from pipelines.bulk.plan import Plan, check_source, make_plan, open_source
from pipelines.bulk.summary import Part, Report, run_report, sums
from pipelines.bulk.tally import Tally
from pipelines.config import Recipe, SegmentConfig
from pipelines.errors import RepsepError, StorageError, UsageError
from pipelines.models import FetchedModel, fetch_model
from pipelines.progress import say
from pipelines.stage import Receipt, StageRun, is_planning, run_stage
from pipelines.storage import Folder, absolute_uri

PACKAGES = ("pipelines", "repsep_model")
# These do not decide what the output is in the end.
THIS_RUN_ONLY = {
    "model": None,
    "limit": None,
    "retry_failed": False,
    "overwrite": False,
    "max_failure_rate": 1.0,
    "price_per_hour": None,
}
# What decides a mask.
MASK_SETTINGS = ("bf16", "compile", "pixel_budget", "confidence", "model_batch", "image_column", "key_column")


def segment(workspace: str, recipe: Recipe, *, dry_run: bool = False) -> Receipt | dict[str, int]:
    """Run the stage; with `dry_run` only list and compare, write nothing, and return the counts.

    Raises UsageError for an empty prefix or an output of another model, RepsepError when too many images fail.
    """
    config = recipe.segment or SegmentConfig()
    source, only, target = _folders(config)
    if config.overwrite and config.shard is not None:
        raise UsageError(
            "--overwrite with --shard: each of the jobs would remove the others' masks; give them all a new target "
            "prefix instead"
        )
    model_uri = config.model or f"models:/{recipe.register_.name}@champion"
    with fetch_model(model_uri, recipe.tracking) as model:
        output = Output(target)
        identity = _identity(config, model.digest, source)
        ours = output.check(identity, overwrite=config.overwrite) == "ours"
        known = output.committed() if ours else Committed()
        with make_plan(source, target, config, known, only=only) as plan:
            counts = {
                plan.kind: plan.listed,
                "to_do": plan.todo,
                "done": plan.done,
                "failed_before": plan.failed_before,
                "skipped": plan.skipped,
            }
            if dry_run:
                return counts
            if not is_planning():
                output.claim(identity, model.classes, overwrite=config.overwrite)
            return run_stage(
                "segment",
                workspace=workspace,
                config=config.model_copy(update=THIS_RUN_ONLY),
                inputs={"model": model.digest, "listing": plan.listing},
                packages=PACKAGES,
                again=f"{plan.todo} {plan.kind} to do" if plan.todo else "to compact" if output.has_commits() else "",
                body=lambda run: _segment(run, config, source, output, model, plan),
            )


def check_ends(config: SegmentConfig) -> None:
    """Raises as `segment` does where source or target are wrong whatever the model; writes nothing."""
    source, only, target = _folders(config)
    Output(target).check(_identity(config, owner(config) or "", source), overwrite=config.overwrite)
    check_source(source, target, config, only=only)


def owner(config: SegmentConfig) -> str | None:
    """The digest of the model whose masks the target holds, None where it holds none."""
    run = Folder(str(config.target)).read_if_present(RUN)
    return None if run is None else str(json.loads(run).get("model"))


def _folders(config: SegmentConfig) -> tuple[Folder, str | None, Folder]:
    """Source, the one object to take of it where the URI is that of an object, and target."""
    if config.source is None or config.target is None:
        raise UsageError("segment needs an input and an output: segment.source and segment.target (URIs)")
    if absolute_uri(config.source).rstrip("/") == absolute_uri(config.target).rstrip("/"):
        raise UsageError(
            f"segment.source and segment.target are both {config.source}; masks need a prefix of their own"
        )
    return *open_source(config.source), Folder(config.target)


def _identity(config: SegmentConfig, model_digest: str, source: Folder) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    fixed = {"format": 1, "model": model_digest, "source": source.uri}  # keys are relative to the source
    return fixed | {name: settings[name] for name in MASK_SETTINGS}


def _segment(
    run: StageRun, config: SegmentConfig, source: Folder, output: Output, model: FetchedModel, plan: Plan
) -> None:
    part = Part.of_text(config.shard)
    if part is None:
        output.compact()
    elif plan.todo:
        part.begin(output.folder)
    say(
        f"segment: {plan.listed} {plan.kind} in {source.uri}, {plan.done} done before, {plan.skipped} other objects; "
        f"{plan.todo} to do"
    )
    classes = model.classes
    tally, began = Tally(), time.monotonic()
    if plan.todo:
        colours = tuple(tuple(c["color"]) for c in sorted(classes["classes"], key=lambda c: c["id"]))
        job = SegmentJob(
            config, source, output, plan, files=model.files(), model_version=model.version, colours=colours
        )
        try:
            tally = job.run()
        except RepsepError:
            with contextlib.suppress(StorageError):
                output.compact()  # people read results/, not _commits/
            raise
    if part is None:
        output.compact()
    seconds = time.monotonic() - began
    report = run_report(config, source, output, plan, tally, model=model.version, seconds=seconds)
    whole: Report | None = dict(report)
    if part is not None and (whole := part.finish(output.folder, report)) is not None:
        output.compact()
    where = {"results": output.folder.uri_of(RESULTS), "run": output.folder.uri_of(RUN)}
    run.results = report | where | {"rows": output.totals().rows}
    if whole is not None:
        whole |= sums(output.totals(), classes)
        output.folder.write(REPORT, json.dumps(whole, indent=1).encode())
        write_page(output, source, whole, classes, config)
        made = {"page": PAGE, "classes": CLASSES}
        run.results |= {name: output.folder.uri_of(key) for name, key in made.items()}
