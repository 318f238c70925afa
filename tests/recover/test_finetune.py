"""Fine-tuning: it learns, it repeats, it leaves its arguments alone, and it says why it stops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attrim.errors import DataError, InputError
from attrim.recover import evaluate, finetune


def problem(count: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=random)
    return list(zip(x.split(16), (x[:, 0] > x[:, 1]).long().split(16), strict=True))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 0.02)])
def test_it_learns_and_leaves_the_argument_alone(optimizer, lr):
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    reports: list[dict[str, float]] = []
    tuned = finetune(model, problem(), epochs=8, lr=lr, optimizer=optimizer, on_epoch=reports.append)
    assert evaluate(tuned, problem()) > 0.95 > evaluate(model, problem())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not tuned.training
    assert [r["epoch"] for r in reports] == list(range(1, 9))
    assert reports[-1]["loss"] < 0.5 * reports[0]["loss"]
    assert reports[-1]["accuracy"] > 0.9
    assert 0 < reports[-1]["lr"] < 0.1 * lr


def test_same_seed_same_network_and_the_global_state_is_kept():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second = (finetune(network(), problem(), epochs=2, seed=5) for _ in range(2))
    torch.set_rng_state(state)
    other = finetune(network(), problem(), epochs=2, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


def test_random_state_is_as_before():
    model = network()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    finetune(model, problem())
    assert torch.equal(torch.rand(3), expected)


def test_one_step_is_one_step_of_sgd_with_decay_on_matrices_only():
    model = nn.Linear(4, 2)
    x, y = problem()[0]
    tuned = finetune(model, [(x, y)], epochs=1, lr=0.5, momentum=0.0, weight_decay=0.1, warmup=0.0)
    loss = F.cross_entropy(model(x), y)
    weight, bias = torch.autograd.grad(loss, [model.weight, model.bias])
    torch.testing.assert_close(tuned.weight, model.weight - 0.5 * (weight + 0.1 * model.weight))
    torch.testing.assert_close(tuned.bias, model.bias - 0.5 * bias)


def test_a_teacher_alone_is_imitated_and_stays_as_it_was():
    teacher = finetune(network(), problem(), epochs=8, lr=0.1).train()
    before = copy.deepcopy(teacher.state_dict())
    unlabelled = [x for x, _ in problem()]
    student = finetune(network(), unlabelled, teacher=teacher, epochs=15, lr=0.1)
    x = torch.cat(unlabelled)
    agree = (student.eval()(x).argmax(1) == copy.deepcopy(teacher).eval()(x).argmax(1)).float().mean()
    assert agree > 0.95
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_loss_that_explodes_names_step_and_rate():
    data = problem()
    data[2] = (data[2][0] * float("nan"), data[2][1])
    with pytest.raises(InputError, match=r"the loss is nan at epoch 1, step 3 of 4, with a learning rate of 0\.0"):
        finetune(network(), data)


def test_data_is_told_the_epoch():
    class Data(list):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = Data(problem())
    finetune(network(), data, epochs=3)
    assert data.epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs: expected an int >= 1, found 0"),
        ({"lr": -1.0}, r"lr: expected a number > 0, found -1\.0"),
        ({"optimizer": "lion"}, "optimizer: expected 'sgd' or 'adamw', found 'lion'"),
        ({"warmup": 1.0}, r"warmup: expected a share of the run in \[0, 1\), found 1\.0"),
        ({"distill": 2.0}, r"distill: expected a weight in \[0, 1\], found 2\.0"),
        ({"temperature": 0.0}, r"temperature: expected a number > 0, found 0\.0"),
        ({"schedule": "step"}, "schedule: expected 'cosine' or 'constant', found 'step'"),
        ({"ema": 1.0}, r"ema: expected a decay in \(0, 1\), such as 0\.999, or None, found 1\.0"),
        ({"mixup": -0.1}, r"mixup: expected a number >= 0, found -0\.1"),
        ({"clip": 0.0}, r"clip: expected a norm > 0, or None, found 0\.0"),
        ({"accumulate": 0}, "accumulate: expected an int >= 1, found 0"),
        ({"precision": "int8"}, "precision: expected 'no', 'bf16' or 'fp16', found 'int8'"),
        ({"precision": "fp16"}, "'fp16' needs a GPU, and the model is on the CPU"),
        ({"attention": 1.0}, "attention compares the model with a teacher, and there is none"),
        ({"loss": F.cross_entropy, "label_smoothing": 0.1}, "label_smoothing belongs to cross entropy"),
        ({"loss": F.cross_entropy, "cutmix": 1.0}, "mixup and cutmix mix the labels of cross entropy"),
        ({"resume": True}, "resume=True goes on from a folder"),
        ({"tensorboard": True}, "tensorboard=True writes into a folder"),
        ({"every_minutes": 5.0}, "every_minutes is the time between checkpoints, which need a folder"),
        ({"every_minutes": 0.0, "folder": "x"}, r"every_minutes: expected minutes > 0, or None, found 0\.0"),
        ({"seed": -1}, "seed: expected an int >= 0, found -1"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(InputError, match=text):
        finetune(network(), problem(), **options)


def test_bad_data():
    with pytest.raises(DataError, match="needs its length, found generator without one"):
        finetune(network(), (b for b in problem()))
    with pytest.raises(DataError, match="expected at least one batch, found none"):
        finetune(network(), [])
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        finetune(network().requires_grad_(False), problem())

    class Short(list):
        def __len__(self) -> int:
            return 5

    with pytest.raises(DataError, match="promises 5 batches, epoch 1 gave 4"):
        finetune(network(), Short(problem()))
