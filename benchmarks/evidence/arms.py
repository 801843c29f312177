"""Every arm that is trained: ours, the controls, the formulations that were tried, and the peers' heads."""

from __future__ import annotations

from functools import partial

from benchmarks.evidence import formulations as tried
from benchmarks.evidence.runs import BASELINE, Arm, Training
from repsep_model import SegmentorConfig

LOCAL = {"separation": "none", "cross_attention": 0}
LIGHT = {"coarse": 0.1, "attention": 0.1, "identity": 0.025, "region": 0.025, "patch": 0.025}

PARTS = [
    BASELINE,
    Arm("local", "backbone + local pathway", LOCAL),
    Arm("sas-local", "local pathway + local separation", {"separation": "local", "cross_attention": 0}),
    Arm("sas-region", "local pathway + region separation", {"separation": "region", "cross_attention": 0}),
    Arm("dca", "local pathway + cross-attention", {"separation": "none"}),
    Arm("full", "local pathway + region separation + cross-attention"),
]
CONTROLS = [
    Arm("no-discrepancy", "local pathway without the discrepancy", LOCAL | {"local_discrepancy": False}),
    Arm("uniform", "local pathway with a uniform kernel", LOCAL | {"uniform_smoothing": True}),
    Arm("unsupervised", "full, attention without supervision", {"attention_supervision": False}),
    Arm("local-dice", "local pathway, Dice on its logits", LOCAL, {"dice": 0.5}),
    Arm("full-dice", "full, Dice on its logits", weights={"dice": 0.5}),
]
TRIED = [
    Arm("first", "full as first formulated", change=tried.first),
    Arm("first-patch", "full, patch separation as first formulated", change=tried.first_patch),
    Arm("first-attention", "full, attention as mask by cross-entropy alone", change=tried.first_attention),
    Arm("first-region", "full, region separation as first formulated", change=tried.first_region),
    Arm("first-cross", "full, regions compared as they are, no presence", change=tried.first_cross),
    Arm("balanced", "full, first patch separation with classes alike", change=tried.balanced_patch),
    Arm("light", "full, the new auxiliary weights at a quarter", weights=LIGHT),
]


def _peer(config: SegmentorConfig, *, decoder: str) -> object:
    from benchmarks.evidence.peers import Peer  # only these arms need segmentation_models_pytorch

    return Peer(config, decoder)  # type: ignore[arg-type]


HEADS = [Arm(name, f"{name} decoder", build=partial(_peer, decoder=name)) for name in ("upernet", "dpt", "segformer")]
ALL = {arm.name: arm for arm in (*PARTS, *CONTROLS, *TRIED, *HEADS)}

STUDIES = {
    "search": Training("camvid", "search", 600),
    "final": Training("camvid", "final", 600),
    "longer": Training("camvid", "final", 1200),
    "nuclei": Training("nuclei", "final", 400),
}
