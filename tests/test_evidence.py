"""What the evidence rests on: who is held out, what a pair of runs shares, how a difference gets its interval."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.evidence import data, runs
from benchmarks.evidence.arms import ALL, HEADS, STUDIES
from benchmarks.evidence.runs import Arm, Run, Training
from benchmarks.evidence.tables import differences, of_training, told
from repsep_model import losses, segment_image
from repsep_model.transforms import Augmentation

SHORT = Training(
    "camvid", "final", 4, backbone_args={"depth": 4}, crop=64, batch=2, warmup=1, warm_steps=0, drop_path=0.0
)
OURS = [arm for arm in ALL.values() if arm not in HEADS]


def samples(n: int = 5) -> data.Samples:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (80, 96, 3), np.uint8) for _ in range(n)]
    masks = [rng.integers(0, 3, (80, 96), np.uint8) for _ in range(n)]
    return data.Samples([f"image{i}" for i in range(n)], images, masks, ["a", "b", "c"])


@pytest.mark.parametrize("name", sorted(data.HELD_OUT))
def test_the_search_is_judged_on_a_group_that_it_does_not_train_on_and_never_on_val(name: str) -> None:
    if not (data.DATA / name).is_dir():
        pytest.skip(f"{data.DATA / name} is absent")
    trained, judged = data.read(name, "search")
    whole, val = data.read(name, "final")
    assert len(trained) > len(judged) > 0
    assert {*trained.names, *judged.names} == {*whole.names}
    assert not {*trained.names} & {*judged.names}
    assert not {*whole.names} & {*val.names}


def test_camvids_held_out_group_is_a_whole_sequence() -> None:
    if not (data.DATA / "camvid").is_dir():
        pytest.skip(f"{data.DATA / 'camvid'} is absent")
    trained, judged = data.read("camvid", "search")
    assert not {n.split("_")[0] for n in trained.names} & {n.split("_")[0] for n in judged.names}


def test_arms_of_one_seed_see_the_same_crops_and_other_seeds_others() -> None:
    how = Augmentation(crop=64)
    once, again, other = (data.batch(samples(), 3, 2, seed, how)[0] for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_an_epoch_shows_every_image_once() -> None:
    seen: list[int] = []
    few = samples()
    marked = replace(few, masks=[np.full((80, 96), i, np.uint8) for i in range(len(few))])
    for step in range(5):
        _, labels = data.batch(marked, step, 2, 0, Augmentation(crop=64, scale=(1.0, 1.0), max_class_share=1.0))
        seen += [int(label[label < 255].unique().item()) for label in labels]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_the_interval_of_a_difference_is_students_paired_one() -> None:
    first, second = {1: 0.40, 2: 0.43, 3: 0.41}, {1: 0.38, 2: 0.39, 3: 0.40, 4: 0.1}
    shown = ("miou", "whole_miou", "boundary_miou", "retention", "corrupted_miou")
    arms = {
        name: {seed: dict.fromkeys(shown, value) for seed, value in values.items()}
        for name, values in {"x": first, "y": second}.items()
    }
    expected = stats.ttest_rel([first[s] for s in (1, 2, 3)], [second[s] for s in (1, 2, 3)]).confidence_interval(0.95)
    row = differences(arms, [("x", "y")]).splitlines()[-1]
    assert f"({expected.low:+.4f} to {expected.high:+.4f})" in row
    assert "| 3 |" in row, "a seed that one arm lacks is left out"


def test_only_an_interval_without_0_is_bold() -> None:
    assert told([0.02, 0.021, 0.019]).startswith("**+0.0200")
    assert not told([0.02, -0.021, 0.019]).startswith("**")
    assert told([0.02]) == "+0.0200 (one pair)"


def test_studies_never_mix() -> None:
    assert len({training.digest for training in STUDIES.values()}) == len(STUDIES)
    records = {(training.digest, "full", 0): {"study": name} for name, training in STUDIES.items()}
    for name, training in STUDIES.items():
        assert of_training(records, training.digest) == {"full": {0: {"study": name}}}


@pytest.mark.parametrize("arm", OURS, ids=lambda arm: arm.name)
def test_an_arm_is_what_it_says_and_leaves_the_library_as_it_was(arm: Arm) -> None:
    before = losses._patch_separation
    with arm.change(), torch.device("meta"):
        model = runs.build(Run(arm, 0, STUDIES["final"]), 11)
    assert losses._patch_separation is before
    assert all(getattr(model.config, name) == value for name, value in arm.config.items())


@pytest.mark.parametrize("arm", HEADS, ids=lambda arm: arm.name)
def test_a_peers_head_stands_on_the_same_backbone_and_answers_as_a_segmentor_does(arm: Arm) -> None:
    peer, ours = (runs.build(Run(a, 0, SHORT), 3).eval() for a in (arm, ALL["baseline"]))
    mine = ours.backbone.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in peer.backbone.state_dict().items())
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    for budget in (10**9, 0):
        found = segment_image(peer, image, pixel_budget=budget)
        assert found.labels.shape == (70, 90)
        assert (found.confidence >= 1 / 3 - 1e-6).all()


def test_a_run_that_was_killed_ends_as_the_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, ends = Run(ALL["full"], 0, SHORT), []
    monkeypatch.setattr(runs, "CHECKPOINT_EVERY", 2)
    for killed in (False, True):
        monkeypatch.setattr(runs, "WORK", tmp_path_factory.mktemp("work"))
        if killed:
            with monkeypatch.context() as staged:
                staged.setattr(runs, "train_step", stops_at(3))
                with pytest.raises(KeyboardInterrupt):
                    runs._train(run, samples())
        state, _ = runs._train(run, samples())
        ends.append(state.ema.state_dict())
        assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] == 4
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def stops_at(call: int):  # type: ignore[no-untyped-def]
    real, calls = runs.train_step, iter(range(1, call + 1))

    def step(*given):  # type: ignore[no-untyped-def]
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*given)

    return step
