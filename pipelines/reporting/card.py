"""The model card: the report's figures in Markdown, and what a user should be warned of because of them.

After Mitchell et al. 2019, "Model Cards for Model Reporting".
"""

from __future__ import annotations

from pipelines.pages import as_text, render
from pipelines.reporting.facts import Row

LOW_IOU, FEW_IMAGES, FEW_IMAGES_OF_CLASS, HIGH_ECE, LOW_RETENTION = 0.5, 100, 10, 0.05, 0.9
"""Where a limitation begins. The sentences name the limit, so that a reader can draw another."""
NAMED = 8
CUT = "\n\nThe whole card is the artifact `{artifact}` of the run that trained this model.\n"


def model_card(facts: Row) -> str:
    """Markdown; sections of stages that did not run say so."""
    return render("model_card.md", **facts, limitations=limitations(facts)).strip() + "\n"


def description_of(card: str, artifact: str, limit: int) -> str:
    """The card where it fits, otherwise as many of its sections as do, and where the rest is."""
    if len(card) <= limit:
        return card
    end = CUT.format(artifact=artifact)
    head = card[: limit - len(end)]
    return head[: max(head.rfind("\n## "), head.find("\n"))].rstrip() + end


def limitations(facts: Row) -> list[str]:
    """What follows from the figures, as Markdown sentences; what was not measured is a limitation too."""
    scored, found = facts["evaluation"], []
    if scored is None:
        return ["It was not evaluated."]
    results, classes = scored["results"], scored["classes"]
    if results["images"] < FEW_IMAGES:
        found.append(f"The figures rest on {results['images']} images, fewer than {FEW_IMAGES}: they are uncertain.")
    if low := [row for row in classes if row["iou"] is not None and row["iou"] < LOW_IOU]:
        told = [f"{as_text(row['name'])} {row['iou']:.3f}" for row in reversed(low)]
        found.append(f"Classes with an IoU under {LOW_IOU}: {_first(told)}.")
    if unseen := [as_text(row["name"]) for row in classes if row["pixels"] == 0]:
        found.append(
            f"Classes without a labelled pixel in {results['split']}, of which nothing is known: {_first(unseen)}."
        )
    if rare := [row for row in classes if 0 < row["images"] < FEW_IMAGES_OF_CLASS]:
        told = [f"{as_text(row['name'])} ({row['images']})" for row in rare]
        found.append(f"Classes in fewer than {FEW_IMAGES_OF_CLASS} images, whose IoU is uncertain: {_first(told)}.")
    if results["ece"] is not None and results["ece"] > HIGH_ECE:
        how = "over-confident" if scored["confidence"] > scored["right"] else "under-confident"
        found.append(
            f"Its confidence is not a probability (ECE {results['ece']:.3f}): it is {how}, {scored['confidence']:.3f} "
            f"on average where {scored['right']:.3f} of the pixels are right."
        )
    if results["miou"] is not None and results["miou"] <= results["prior_miou"]:
        found.append("It is no better than the commonest class at each pixel position, which reads no image.")
    return found + _under_corruption(scored["robustness"])


def _under_corruption(robust: Row | None) -> list[str]:
    if robust is None:
        return ["How it does on noisy, blurred or badly lit images was not measured (`evaluate.corruptions`)."]
    rows = [row for row in robust["rows"] if row["retention"] is not None and row["retention"] < LOW_RETENTION]
    told = [f"{as_text(row['name'])} {row['retention']:.2f}" for row in rows]
    if not told:
        return []
    return [f"Corruptions under which less than {LOW_RETENTION:.0%} of its mIoU is left: {_first(told)}."]


def _first(told: list[str]) -> str:
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return ", ".join(told[:NAMED]) + more
