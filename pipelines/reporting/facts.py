"""What the receipts and files of a workflow say of its data, sweep, training, gate and of how it was made.

Each function takes receipts and gives plain values for the templates, the page's and the card's alike; no figure is
computed in a template. What the evaluation measured is in scores.py, the bulk run in bulk_run.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from pipelines.config import TrackingConfig
from pipelines.dataset import Dataset
from pipelines.errors import RepsepError
from pipelines.progress import say
from pipelines.stage import Receipt, read_receipt
from pipelines.tracking import metric_histories

Row = dict[str, Any]
Curves = dict[str, list[tuple[int, float]]]

REJECTS_SHOWN, TRIALS_SHOWN = 12, 6
TERM = "loss/"


def data_facts(receipt: Receipt, dataset: Dataset) -> Row:
    """The data set card. `shares` are a class's part of the labelled pixels of each split, in the order of `splits`."""
    manifest = dataset.manifest
    splits = [
        {
            "name": name,
            "images": split["images"],
            "ignored": _share(split["ignored"], split["ignored"] + sum(split["pixels"])),
        }
        | {"pixels": sum(split["pixels"]), "digest": split["digest"]}
        for name, split in manifest["splits"].items()
    ]
    classes = [
        {
            "name": each["name"],
            "rgb": rgb(each["color"]),
            "shares": [_share(s["pixels"][each["id"]], sum(s["pixels"])) for s in manifest["splits"].values()],
        }
        for each in manifest["classes"]
    ]
    with receipt.folder.open("rejects.parquet") as handle:
        rejects = pq.read_table(handle).slice(0, REJECTS_SHOWN).to_pylist()
    return {
        "name": manifest["name"],
        "source": manifest["source"],
        "layout": manifest["layout"],
        "licence": manifest.get("licence"),
        "generated": _whole(receipt)["config"]["source"] is None,
        "splits": splits,
        "classes": classes,
        "largest": max((share for each in classes for share in each["shares"]), default=1.0) or 1.0,
        "digest": dataset.digest,
        "uri": dataset.folder.uri,
        "rejected": receipt.results["rejected"],
        "reasons": receipt.results["reject_reasons"],
        "rejects": rejects,
        "warnings": receipt.results["warnings"],
    }


def sweep_facts(receipt: Receipt) -> Row:
    """The leaderboard's first rows, what mattered and whether the best is better than the default."""
    found = list(csv.DictReader(io.StringIO(receipt.folder.read(_file_of(receipt, "table")).decode())))
    found.sort(key=lambda row: (row["mIoU"] != "", int(row["steps"]), float(row["mIoU"] or 0)), reverse=True)
    rows = [{name: shortened(value) for name, value in row.items()} for row in found[:TRIALS_SHOWN]]
    return dict(receipt.results) | {"rows": rows, "columns": list(found[0]), "more": len(found) - len(rows)}


def train_facts(receipt: Receipt) -> Row:
    """How the model was trained, and how fast."""
    config = _whole(receipt)["config"]
    return dict(receipt.results) | {"config": config, "backbone": config["model"]["backbone"]}


def curves_of(tracking: TrackingConfig, run_id: str) -> Curves:
    """Every series that the report draws, by name; none, and a warning, where MLflow does not answer."""
    wanted = ("loss", TERM, "lr", "val/miou", "images_per_s", "data_wait_share")
    try:
        return metric_histories(tracking, run_id, wanted)
    except RepsepError as error:
        say(f"report: warning: it has no curves of the training: {error}")
        return {}


def gate_facts(receipt: Receipt) -> Row:
    """The decision, what was asked and each class against the champion's."""
    losses = [row for row in receipt.results["classes"] if row["difference"] is not None]
    return dict(receipt.results) | {"classes": sorted(losses, key=lambda row: row["difference"])}


def provenance(receipts: Sequence[Receipt]) -> Row:
    """Where each stage wrote, from what, how long it took; with which code and packages."""
    whole = [_whole(receipt) for receipt in receipts]
    longest = max((receipt.seconds for receipt in receipts), default=1.0) or 1.0
    return {
        "stages": [
            {
                "name": receipt.stage,
                "seconds": receipt.seconds,
                "bar": receipt.seconds / longest,
                "uri": receipt.uri,
                "fingerprint": receipt.fingerprint,
                "digest": receipt.digest,
            }
            for receipt in receipts
        ],
        "seconds": sum(receipt.seconds for receipt in receipts),
        "revisions": list(dict.fromkeys(each["revision"] for each in whole if each["revision"] is not None)),
        "code": list(dict.fromkeys(each["code"] for each in whole)),
        "versions": {
            name: list(dict.fromkeys(each["versions"][name] for each in whole))
            for name in (whole[0]["versions"] if whole else ())
        },
    }


def rgb(colour: Sequence[int]) -> str:
    """For CSS: numbers only, whatever a file held."""
    return ",".join(str(int(channel)) for channel in colour)


def shortened(value: str) -> str:
    """A number of a table with the digits that a reader needs; anything else as it is."""
    try:
        return value if value.isdigit() else f"{float(value):.4g}"
    except ValueError:
        return value


def _whole(receipt: Receipt) -> Mapping[str, Any]:
    """All that `_SUCCESS.json` says: besides what the object holds the section, the code and the versions."""
    found = read_receipt(receipt.folder)
    assert found is not None
    return found


def _file_of(receipt: Receipt, name: str) -> str:
    uri: str = receipt.results[name]
    return uri.removeprefix(f"{receipt.uri}/")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
