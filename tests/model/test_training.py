"""The training step: the same gradient however the batch is split, the same bits however often it is run.

Shapes: B batch, S side of a crop.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from repsep_model import ConfusionMatrix, LossWeights, segment_image, segmentation_loss
from repsep_model.images import UInt8
from repsep_model.labels import IGNORE_INDEX
from repsep_model.losses import term_names
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import Batch, NonFiniteLossError, StepSettings, TrainState, train_step, validate
from tests.model.tiny import K, random_images, random_labels, tiny_segmentor

S = 40
SETTINGS = StepSettings(
    weights=LossWeights(ohem=0.5, dice=0.5, lovasz=0.5),
    total_steps=100,
    warmup_steps=0,
    clip=1e9,
    bf16=False,
    seed=7,
)


def fresh_state(
    *, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, lr: float = 0.05, **changes: Any
) -> TrainState:
    model = tiny_segmentor(**({"drop_path": 0.0} | changes)).train()
    groups = parameter_groups(model, lr=lr, weight_decay=0.0, layer_decay=0.9, head_lr_scale=1.0)
    return TrainState(raw=model, model=model, optimizer=optimizer(groups, lr=lr), ema=Ema(model, 0.9))


def uneven_batch() -> Batch:
    """Five images with very different shares of labelled pixels, one of them without any."""
    images, labels = random_images(5, S, S), random_labels(5, S, S)
    labels[1, 4:] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    labels[4][labels[4] != IGNORE_INDEX] = 3
    return images, labels


def pieces(batch: Batch, *sizes: int) -> list[Batch]:
    images, labels = (t.split(list(sizes)) for t in batch)
    return list(zip(images, labels, strict=True))


def gradients(state: TrainState) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in state.raw.named_parameters() if p.grad is not None}


def weights_of(state: TrainState) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.raw.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(1, 4), (3, 2), (1, 1, 1, 1, 1)])
def test_accumulated_gradient_equals_that_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    whole, split = fresh_state(), fresh_state()
    expected = train_step(whole, [uneven_batch()], SETTINGS)
    found = train_step(split, pieces(uneven_batch(), *sizes), SETTINGS)
    torch.testing.assert_close(gradients(split), gradients(whole), rtol=1e-3, atol=1e-5)
    assert found == pytest.approx(expected, rel=1e-4)


TERMS = {name: LossWeights(**(dict.fromkeys(term_names(), 0.0) | {name: 1.0})) for name in term_names()}
TERMS["ce with class weights"] = replace(TERMS["ce"], classes=(0.5, 1.0, 2.0, 0.0, 3.5))
SPLITS = {"1 micro-batch": (3,), "3 micro-batches": (1, 1, 1)}


def unequal() -> Batch:
    """Six images, of which the last three have far fewer labelled pixels, and other classes, than the first three."""
    images, labels = random_images(6, S, S), random_labels(6, S, S)
    labels[1][labels[1] != IGNORE_INDEX] = 3
    labels[3, 8:] = IGNORE_INDEX
    labels[4, :, 8:] = IGNORE_INDEX
    labels[5, 20:] = IGNORE_INDEX
    return images, labels


def one_rank_without_labels() -> Batch:
    images, labels = unequal()
    labels[3:] = IGNORE_INDEX
    return images, labels


def one_class() -> Batch:
    images, labels = unequal()
    labels[labels != IGNORE_INDEX] = 2
    return images, labels


BATCHES = {"unequal": unequal, "one rank without labels": one_rank_without_labels, "one class": one_class}


def gradient_of(state: TrainState, batches: list[Batch], term: str, **how: Any) -> tuple[Tensor, float]:
    """All parameters' gradients after a step, in one vector, and the step's loss; the rate is 0, so nothing moves."""
    report = train_step(state, batches, replace(SETTINGS, weights=TERMS[term]), **how)
    return torch.cat([p.grad.flatten() for p in state.raw.parameters() if p.grad is not None]), report["loss"]


def rank_main(rank: int, folder: str) -> None:
    """What one of two processes does: its own share of each step, gradients averaged by DDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    how: dict[str, Any] = {"rank": rank, "world_size": 2, "all_reduce": dist.all_reduce}
    state = fresh_state()
    state.model = DistributedDataParallel(state.raw)
    batches = pieces(uneven_batch(), 1, 1, 2, 1)
    report = [train_step(state, batches[2 * rank : 2 * rank + 2], SETTINGS, **how) for _ in range(2)][-1]
    still = fresh_state(lr=0.0)
    still.model = DistributedDataParallel(still.raw)
    found = {
        (term, batch, split): gradient_of(
            still, pieces(whole(), *sizes, *sizes)[rank * len(sizes) :][: len(sizes)], term, **how
        )
        for term, (batch, whole), (split, sizes) in itertools.product(TERMS, BATCHES.items(), SPLITS.items())
    }
    torch.save({"weights": weights_of(state), "report": report, "gradients": found}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes over gloo found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def still() -> TrainState:
    return fresh_state(lr=0.0)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("term", TERMS)
def test_each_terms_gradient_over_micro_batches_and_ranks_is_that_of_the_whole_batch(
    ranks: list[dict[str, Any]], still: TrainState, term: str, batch: str
) -> None:
    whole = BATCHES[batch]()
    expected, loss = gradient_of(still, [whole], term)
    found = {"3 micro-batches": gradient_of(still, pieces(whole, 1, 2, 3), term)}
    found |= {f"rank {r}, {split}": ranks[r]["gradients"][term, batch, split] for r in range(2) for split in SPLITS}
    assert batch != "unequal" or expected.norm() > 1e-3
    for how, (gradient, mean) in found.items():
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), how
        assert mean == pytest.approx(loss, rel=1e-5), how


def test_two_ranks_with_unequal_labels_do_what_one_process_does_with_the_global_batch(
    ranks: list[dict[str, Any]],
) -> None:
    one = fresh_state()
    report = [train_step(one, [uneven_batch()], SETTINGS) for _ in range(2)][-1]
    assert_same_bits(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], weights_of(one), rtol=1e-3, atol=1e-5)
    for found in ranks:
        assert found["report"] == pytest.approx(report, rel=1e-3)


def test_totals_are_summed_over_ranks_before_anything_is_divided() -> None:
    """A second rank with the same labels halves this one's share; the world size makes up for the mean of gradients."""
    alone, of_two = fresh_state(), fresh_state()
    expected = train_step(alone, [uneven_batch()], SETTINGS)
    found = train_step(of_two, [uneven_batch()], SETTINGS, world_size=2, all_reduce=lambda t: t.mul_(2))
    assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradients(of_two), gradients(alone), rtol=1e-4, atol=1e-6)
    other = fresh_state()
    train_step(other, [uneven_batch()], SETTINGS, world_size=1, all_reduce=lambda t: t.mul_(2))
    halves = {name: gradient / 2 for name, gradient in gradients(alone).items()}
    torch.testing.assert_close(gradients(other), halves, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("separation", ["region", "local"])
@pytest.mark.parametrize("term", ["local", "coarse", "attention", "identity", "region", "patch"])
def test_term_of_weight_zero_leaves_no_parameter_without_a_gradient(term: str, separation: str) -> None:
    """Data-parallel training stops at its second step where a parameter has none."""
    state = fresh_state(separation=separation)
    train_step(state, pieces(uneven_batch(), 2, 3)[:1], replace(SETTINGS, weights=LossWeights(**{term: 0.0})))
    assert [name for name, p in state.raw.named_parameters() if p.grad is None] == []


def test_reported_losses_are_the_terms_means_and_their_weighted_sum() -> None:
    state = fresh_state()
    images, labels = uneven_batch()
    terms = segmentation_loss(state.model(images), labels, SETTINGS.weights)
    means = {name: float(total.detach() / weight) for name, (total, weight) in terms.items()}
    report = train_step(state, [(images, labels)], SETTINGS)
    assert {name: report[f"loss/{name}"] for name in means} == pytest.approx(means, rel=1e-5)
    assert report["loss"] == pytest.approx(sum(w * means[n] for n, w in SETTINGS.weights.active().items()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"local_pathway": False, "separation": "none", "cross_attention": 0}, {"ce"}),
        ({"attention_supervision": False}, {"ce", "local", "coarse", "patch"}),
    ],
    ids=["baseline", "no attention supervision"],
)
def test_terms_that_the_model_cannot_give_are_not_reported(changes: dict[str, Any], given: set[str]) -> None:
    weights = LossWeights()
    report = train_step(fresh_state(**changes), pieces(uneven_batch(), 2, 3), replace(SETTINGS, weights=weights))
    losses = {name.removeprefix("loss/"): value for name, value in report.items() if name.startswith("loss/")}
    assert losses.keys() == given
    assert report["loss"] == pytest.approx(sum(weights.active()[name] * value for name, value in losses.items()))


@pytest.mark.parametrize("label", [IGNORE_INDEX, 2])
def test_step_on_labels_that_teach_little_stays_finite(label: int) -> None:
    state = fresh_state(optimizer=torch.optim.AdamW)
    images, labels = random_images(2, S, S), torch.full((2, S, S), label, dtype=torch.uint8)
    report = train_step(state, [(images, labels)], SETTINGS)
    assert all(np.isfinite(v) for v in report.values())
    assert all(t.isfinite().all() for t in weights_of(state).values())
    if label == IGNORE_INDEX:
        assert report["loss"] == report["grad_norm"] == 0


def test_step_repeats_to_the_bit_whatever_the_global_generators_state() -> None:
    runs = []
    for noise in (1, 2):
        state = fresh_state(drop_path=0.5, optimizer=torch.optim.AdamW)
        torch.manual_seed(noise)
        train_step(state, [uneven_batch()], SETTINGS)
        runs.append(weights_of(state))
    assert_same_bits(*runs)


@pytest.mark.parametrize("what", ["seed", "step", "rank"])
def test_drop_path_follows_from_seed_step_and_rank(what: str) -> None:
    def loss(seed: int = 7, step: int = 0, rank: int = 0) -> float:
        state = fresh_state(drop_path=0.9)
        state.step = step
        settings = replace(SETTINGS, seed=seed, weights=LossWeights())
        return train_step(state, pieces(uneven_batch(), 2, 3)[:1], settings, rank=rank)["loss"]

    assert len({loss(**{what: value}) for value in range(4)}) > 1


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one() -> None:
    batches = [[uneven_batch()], pieces(uneven_batch(), 2, 3), [uneven_batch()]]
    whole = fresh_state(drop_path=0.5, optimizer=torch.optim.AdamW)
    for step in batches:
        train_step(whole, step, SETTINGS)

    first = fresh_state(drop_path=0.5, optimizer=torch.optim.AdamW)
    train_step(first, batches[0], SETTINGS)
    saved = copy.deepcopy((first.raw.state_dict(), first.ema.state_dict(), first.optimizer.state_dict(), first.step))
    resumed = fresh_state(drop_path=0.5, optimizer=torch.optim.AdamW, seed=99)
    resumed.raw.load_state_dict(saved[0])
    resumed.ema.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[2])
    resumed.step = saved[3]
    for step in batches[1:]:
        train_step(resumed, step, SETTINGS)

    assert_same_bits(weights_of(resumed), weights_of(whole))
    assert_same_bits(resumed.ema.state_dict(), whole.ema.state_dict())
    assert resumed.step == whole.step == 3


def test_non_finite_loss_stops_before_anything_is_updated() -> None:
    state = fresh_state()
    before, average = weights_of(state), copy.deepcopy(state.ema.state_dict())
    images, labels = uneven_batch()
    poisoned = images.float()
    poisoned[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"at step 0: lower the learning rate") as caught:
        train_step(state, [(poisoned, labels)], SETTINGS)
    assert caught.value.step == 0
    assert_same_bits(weights_of(state), before)
    assert_same_bits(state.ema.state_dict(), average)
    assert state.step == 0


def test_gradient_is_clipped_and_reported_unclipped() -> None:
    free, clipped = fresh_state(), fresh_state()
    norm = train_step(free, [uneven_batch()], SETTINGS)["grad_norm"]
    assert train_step(clipped, [uneven_batch()], replace(SETTINGS, clip=norm / 10))["grad_norm"] == pytest.approx(norm)
    tenth = {name: gradient / 10 for name, gradient in gradients(free).items()}
    torch.testing.assert_close(gradients(clipped), tenth, rtol=1e-3, atol=1e-7)


def test_step_follows_the_schedule_and_moves_the_average() -> None:
    state = fresh_state(lr=0.3)
    by_hand = Ema(state.raw, 0.9)
    settings = replace(SETTINGS, warmup_steps=2, total_steps=4)
    reports = []
    for step in range(3):
        reports.append(train_step(state, [uneven_batch()], settings))
        by_hand.update(state.raw, step)
    assert [r["lr"] for r in reports] == pytest.approx([0.1, 0.2, 0.3])
    assert state.step == 3
    assert_same_bits(state.ema.state_dict(), by_hand.state_dict())
    assert not torch.equal(by_hand.state_dict()["classifier.weight"], state.raw.classifier.weight)


def test_bf16_step_keeps_fp32_weights_and_gives_nearly_the_same_loss() -> None:
    exact, half = fresh_state(), fresh_state()
    expected = train_step(exact, [uneven_batch()], SETTINGS)["loss"]
    found = train_step(half, [uneven_batch()], replace(SETTINGS, bf16=True))["loss"]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert {p.dtype for p in half.raw.parameters()} == {torch.float32}


def test_colours_are_learned_in_a_few_steps() -> None:
    labels = random_labels(2, 64, 64, ignored=0.0)
    images = (labels.long() * 50)[:, None].expand(2, 3, 64, 64).to(torch.uint8)
    samples = [(i.permute(1, 2, 0).numpy(), m.numpy()) for i, m in zip(images, labels, strict=True)]
    state = fresh_state(optimizer=torch.optim.AdamW, lr=3e-3)
    before = validate(state.raw, samples, bf16=False).scores().miou
    for _ in range(40):
        train_step(state, [(images, labels)], replace(SETTINGS, weights=LossWeights(), clip=1.0))
    after = validate(state.raw, samples, bf16=False).scores().miou
    assert before < 0.3
    assert after > 0.7


def samples_of_odd_sizes() -> list[tuple[UInt8, UInt8]]:
    sizes = [(64, 96), (40, 41), (97, 33)]
    images = [random_images(1, *size)[0].permute(1, 2, 0).numpy() for size in sizes]
    return list(zip(images, [random_labels(1, *size)[0].numpy() for size in sizes], strict=True))


@torch.no_grad()
def test_validation_counts_every_labelled_pixel_of_whole_images() -> None:
    model = tiny_segmentor().eval()
    samples = samples_of_odd_sizes()
    found = validate(model, samples, bf16=False)
    assert found.counts.sum(dim=1).tolist() == [sum(int((m == k).sum()) for _, m in samples) for k in range(K)]
    image, mask = samples[0]
    expected = ConfusionMatrix(K)
    expected.update(
        torch.from_numpy(mask), model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits[0].argmax(dim=0)
    )
    assert torch.equal(validate(model, samples[:1], bf16=False).counts, expected.counts)


def test_validation_of_shares_adds_up_to_that_of_all() -> None:
    model = tiny_segmentor().eval()
    samples = samples_of_odd_sizes()
    whole = validate(model, samples, bf16=False).counts
    others = validate(model, samples[2:], bf16=False).counts
    assert torch.equal(validate(model, samples[:2], bf16=False, all_reduce=lambda t: t.add_(others)).counts, whole)


@pytest.mark.parametrize(("keep", "expected"), [(0, 0), (2, 2), (9, 3)])
def test_validation_keeps_the_first_images_with_what_the_model_makes_of_them(keep: int, expected: int) -> None:
    model, samples = tiny_segmentor().eval(), samples_of_odd_sizes()
    kept: list[tuple[UInt8, UInt8, UInt8]] = []
    counts = validate(model, samples, bf16=False, keep=keep, kept=kept).counts
    assert torch.equal(counts, validate(model, samples, bf16=False).counts)
    assert len(kept) == expected
    for (image, mask, labels), sample in zip(kept, samples, strict=False):
        assert image is sample[0]
        assert mask is sample[1]
        np.testing.assert_array_equal(labels, segment_image(model, image).labels)


@pytest.mark.parametrize("training", [True, False])
def test_validation_draws_nothing_and_gives_the_model_back_in_its_mode(training: bool) -> None:
    model = tiny_segmentor(drop_path=0.9).train(training)
    runs = [validate(model, samples_of_odd_sizes(), bf16=True).counts for _ in range(2)]
    assert torch.equal(*runs)
    assert model.training == training
