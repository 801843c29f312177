"""A model version in the MLflow registry, and the gate before the alias `champion`.

The first model becomes champion with the reason "first". A later one must pass the gate (`gate.py`); otherwise it is
registered as `challenger`, with the reason and the figures as tags and the decision as a page. A model is its files:
the same ones, however often they are evaluated, are one version.

A decision holds against the champion that was compared. Registers of one name in a workspace exclude each other;
against those of other workspaces and against people the champion is looked up once more before an alias is set.
NOTE MLflow has no compare-and-set: what stays open is the time of one request.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.config import EvaluateConfig, Recipe
from pipelines.dataset import open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import PER_IMAGE, evaluate, read_counts
from pipelines.evaluation.measures import SEGMENTING
from pipelines.gate import Decision, absolute_checks, compare, first, gate_page
from pipelines.models import FetchedModel, fetch_model
from pipelines.served_package import save_pyfunc
from pipelines.stage import SUCCESS, Lease, Receipt, StageRun, latest_receipt, run_stage
from pipelines.storage import Folder
from repsep_model.checkpoint import load_classes

PACKAGES = ("pipelines", "repsep_model")
CHAMPION, CHALLENGER = "champion", "challenger"
GATE_PAGE = "gate.html"
EVALUATION_FILES = (SUCCESS, PER_IMAGE)
"""Of an evaluation, what a comparison needs."""
ROUNDS = 3


class _ChampionMovedError(Exception):
    """Another version became champion while this model was compared."""


def register(workspace: str, recipe: Recipe) -> Receipt:
    """Run the stage on the latest evaluation. What it says of the aliases is as they are now, also where it is cached.

    Raises RepsepError where the champion is another one after each of three comparisons.
    """
    name = recipe.register_.name
    evaluation = latest_receipt(workspace, "evaluate")
    if evaluation.results.get("predictions") is not None:
        raise UsageError(
            f"the latest evaluation judged the masks {evaluation.results['predictions']} and no model; run "
            "`repsep evaluate` without evaluate.predictions, then register"
        )
    uri = tracking.tracking_uri(recipe.tracking)
    with tracking.answering(uri), fetch_model(evaluation.results["model"], recipe.tracking) as model:
        if model.digest != evaluation.results["model_digest"]:
            raise RepsepError(f"{model.uri} has changed since it was evaluated; run `repsep evaluate` again")
        for _ in range(ROUNDS):
            with contextlib.suppress(_ChampionMovedError):
                return _round(workspace, recipe, evaluation, model)
    raise RepsepError(
        f"the champion of {name!r} was replaced {ROUNDS} times while this model was compared with it; no alias was "
        "moved. Run `repsep register` again"
    )


def _round(workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel) -> Receipt:
    config = recipe.register_
    champion = tracking.aliased_version(recipe.tracking, config.name, CHAMPION)
    receipt = run_stage(
        "register",
        workspace=workspace,
        config=config,
        inputs={
            "evaluation": evaluation.digest,
            "model": model.digest,
            "champion": _compared_with(champion, model),
        },
        packages=PACKAGES,
        again="" if _version_of(recipe, model) else "the registry has no version of this model",
        lease=True,
        body=lambda run: _register(run, workspace, recipe, evaluation, model, champion),
    )
    return _as_it_is(receipt, champion)


def _as_it_is(receipt: Receipt, champion: Any) -> Receipt:
    """A receipt says what was decided; somebody may have moved the alias since."""
    r = receipt.results
    leads = champion is not None and str(champion.version) == r["version"]
    if not receipt.cached or leads == (r["alias"] == CHAMPION):
        return receipt
    if leads:
        now = {"alias": CHAMPION, "reason": champion.tags["repsep.reason"], "model": f"models:/{r['name']}@{CHAMPION}"}
    else:
        other = "there is no champion now" if champion is None else f"the champion is now version {champion.version}"
        now = {"alias": "registered", "reason": other, "model": f"models:/{r['name']}/{r['version']}"}
    return replace(receipt, results=r | now)


def _is_this(champion: Any, model: FetchedModel) -> bool:
    return champion is not None and champion.tags.get(tracking.DIGEST_TAG) == model.digest


def _compared_with(champion: Any, model: FetchedModel) -> str:
    """The version to compare with. Of the champion itself the one that it replaced: it cannot beat itself."""
    if _is_this(champion, model):
        return str(champion.tags.get("repsep.replaced", ""))
    return str(champion.version) if champion is not None else ""


def _register(
    run: StageRun, workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel, champion: Any
) -> None:
    config = recipe.register_
    with Lease(Folder(workspace) / "register" / f"name-{config.name}", f"register of {config.name}"):
        if _is_this(champion, model):
            known = champion
            decision = Decision(True, known.tags["repsep.reason"], {"miou": evaluation.results["miou"]})
        else:
            decision = _decide(workspace, recipe, evaluation, model, champion)
            known = _version_of(recipe, model)  # evaluated anew, or of an attempt that ended before its receipt
        version, run_id = (str(known.version), known.run_id) if known else _new_version(recipe, model, evaluation)
        compared = _compared_with(champion, model)
        page = gate_page(
            decision,
            model=f"{config.name} version {version}",
            champion=f"{config.name} version {compared}" if decision.classes else None,
            evaluation=evaluation.results,
        )
        run.folder.write(GATE_PAGE, page.encode())
        run.outputs = [GATE_PAGE]
        _describe(recipe, version, run_id, evaluation, model, decision, compared, page)
        now = tracking.aliased_version(recipe.tracking, config.name, CHAMPION)
        if (now and now.version) != (champion and champion.version):
            raise _ChampionMovedError
        alias = CHAMPION if decision.promoted else CHALLENGER
        loses = CHALLENGER if decision.promoted else None
        tracking.point_alias(recipe.tracking, config.name, alias, version, instead_of=loses)
    run.results = {
        "model": f"models:/{config.name}@{alias}",
        "name": config.name,
        "version": version,
        "alias": alias,
        "reason": decision.reason,
        "figures": {name: round(value, 6) for name, value in decision.figures.items()},
        "checks": [asdict(check) for check in decision.checks],
        "classes": decision.classes,
        "champion": compared if decision.classes else None,
        "page": run.folder.uri_of(GATE_PAGE),
        "mlflow_run": run_id,
    }


def _describe(
    recipe: Recipe,
    version: str,
    run_id: str,
    evaluation: Receipt,
    model: FetchedModel,
    decision: Decision,
    compared: str,
    page: str,
) -> None:
    """The decision with its figures as tags of the version; its page and the evaluation as artifacts of the run."""
    name = recipe.register_.name
    tags = {
        "repsep.reason": decision.reason,
        tracking.DIGEST_TAG: model.digest,
        "repsep.evaluation_uri": evaluation.uri,
        "repsep.dataset_split": evaluation.results["evaluation"],
        "repsep.replaced": compared,
        "repsep.miou": str(evaluation.results["miou"]),
    } | {f"repsep.gate.{name}": f"{value:.6f}" for name, value in decision.figures.items()}
    uri = tracking.tracking_uri(recipe.tracking)
    client = tracking.client_for(uri)
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)
    logger = tracking.RunLogger(uri, run_id)
    logger.text(page, f"gate/{name}-{version}.html")
    for file in EVALUATION_FILES:  # the workspace may be cleared: versions can still be compared
        logger.content(evaluation.folder.read(file), f"evaluation/{name}-{version}/{file}")


def _new_version(recipe: Recipe, model: FetchedModel, evaluation: Receipt) -> tuple[str, str]:
    """(version, run id) of the model logged under the run that trained it, or under one of its own."""
    run_id = evaluation.results["mlflow_run"]
    if run_id is None or not tracking.run_exists(recipe.tracking, run_id):
        run_id = tracking.start_run(recipe.tracking, "register", tags={"repsep.stage": "register"})
    uri = tracking.tracking_uri(recipe.tracking)
    client = tracking.client_for(uri)
    with tempfile.TemporaryDirectory() as temporary:
        save_pyfunc(Path(temporary) / "model", model.directory)
        client.log_artifacts(run_id, str(Path(temporary) / "model"), "model")
    name = recipe.register_.name
    try:
        with tracking.answering(uri):
            client.get_registered_model(name)
    except tracking.RefusedError:
        client.create_registered_model(
            name, description="RepSep segmentor; the artifact `segmentor` is read by load_segmentor"
        )
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    tags = {tracking.DIGEST_TAG: model.digest}
    return str(client.create_model_version(name, source, run_id, tags=tags).version), run_id


def _version_of(recipe: Recipe, model: FetchedModel) -> Any:
    """The newest version that has this model's files, None if there is none."""
    found = tracking.model_versions(recipe.tracking, recipe.register_.name)
    return next((v for v in found if v.tags.get(tracking.DIGEST_TAG) == model.digest), None)


def _decide(workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel, champion: Any) -> Decision:
    config = recipe.register_
    if champion is None:
        return first(evaluation.results, config)
    others = absolute_checks(evaluation.results, config)
    uri = f"models:/{config.name}/{champion.version}"
    with fetch_model(uri, recipe.tracking) as current:
        ours, theirs = (load_classes(m.directory)["classes"] for m in (model, current))
        if [c["name"] for c in ours] != [c["name"] for c in theirs]:
            raise UsageError(
                f"the champion {uri} has other classes ({', '.join(c['name'] for c in theirs)}) than this model "
                f"({', '.join(c['name'] for c in ours)}); register it under another name: --set register.name=..."
            )
    dataset, split = evaluation.results["dataset"], evaluation.results["split"]
    if open_dataset(dataset).split_digest(split) != evaluation.results["evaluation"]:
        raise UsageError(
            f"the split {split} of {dataset} has changed since this model was evaluated on it: the champion cannot be "
            "judged on the same images. Run `repsep evaluate` again"
        )
    # Cached when the champion has been evaluated on these images and in this way before, otherwise done now.
    section = EvaluateConfig(
        model=uri,
        dataset=dataset,
        split=split,
        overlays=recipe.evaluate.overlays,
        **{name: evaluation.results[name] for name in (*SEGMENTING, "corruptions")},
    )
    theirs_keys, theirs_counts = read_counts(evaluate(workspace, recipe, section))
    ours_keys, ours_counts = read_counts(evaluation)
    if ours_keys != theirs_keys:
        raise UsageError("the champion and this model were evaluated on different images; run `repsep evaluate` again")
    return compare(ours_counts, theirs_counts, [c["name"] for c in ours], config, others)
