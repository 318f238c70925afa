"""What each option of fine-tuning does, against the same thing written out by hand."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attrim
from attrim.errors import AttrimWarning, DataError, InputError, MissingDependencyError
from attrim.modules.batches import read_batch
from attrim.recover import finetune
from attrim.recover.ema import moving_average
from attrim.recover.mixing import Mixer
from attrim.recover.transfer import AttentionTransfer, choose_places
from nets import Mobile, Plain, Residual

CPU = torch.device("cpu")


def vectors(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > x[:, 1]).long()


def batches(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = vectors()
    return list(zip(x.split(size), y.split(size), strict=True))


def pictures(count: int = 8, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(4), torch.arange(count).remainder(5).split(4), strict=True))


def linear() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 2)


def assert_same(one: nn.Module, other: nn.Module, **close: float) -> None:
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_accumulated_batches_make_the_same_steps_as_large_ones():
    whole = finetune(linear(), batches(16), epochs=2, lr=0.5)
    parts = finetune(linear(), batches(4), epochs=2, lr=0.5, accumulate=4)
    assert_same(whole, parts, rtol=1e-5, atol=1e-7)
    uneven = batches(12)  # 4 batches: a step of three, and a last one of one
    by_hand = finetune(linear(), [join(uneven[:3]), uneven[3]], epochs=1, lr=0.5, warmup=0.0)
    assert_same(by_hand, finetune(linear(), uneven, epochs=1, lr=0.5, warmup=0.0, accumulate=3), rtol=1e-5, atol=1e-7)


def join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_gradients_are_clipped_to_a_norm():
    model, (x, y) = linear(), vectors()
    tuned = finetune(model, [(100 * x, y)], epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.5)
    moved = torch.cat([(a - b).flatten() for a, b in zip(tuned.parameters(), model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_constant_schedule_and_warmup():
    reports: list[dict] = []
    finetune(linear(), batches(16), epochs=3, lr=0.4, schedule="constant", warmup=0.3, on_epoch=reports.append)
    assert [r["lr"] for r in reports] == pytest.approx([0.3, 0.4, 0.4])  # three of nine steps rise


def test_the_average_follows_the_weights():
    model = nn.BatchNorm1d(1)
    average = moving_average(model, 0.5)
    for value in (1.0, 3.0, 7.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
            model.num_batches_tracked.fill_(int(value))
        average.update_parameters(model)
    # decays: copy, then min(0.5, 2/11), then min(0.5, 3/12)
    expected = (1 * 2 / 11 + 3 * 9 / 11) * 0.25 + 7 * 0.75
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.running_mean.item() == pytest.approx(expected)
    assert average.module.num_batches_tracked.item() == 7


def test_the_average_is_the_result():
    seen: list[torch.Tensor] = []

    def spy(model: nn.Module, progress: float) -> torch.Tensor:
        seen.append(model.weight.detach().clone())
        return torch.zeros(())

    tuned = finetune(linear(), batches(16), epochs=1, lr=0.5, ema=0.9, regularizer=spy)
    plain = finetune(linear(), batches(16), epochs=1, lr=0.5)
    # three steps: the first is copied, then 2/11 and 3/12 of the average stay
    expected = (seen[1] * 2 / 11 + seen[2] * 9 / 11) * 0.25 + plain.weight * 0.75
    torch.testing.assert_close(tuned.weight, expected)


def test_the_regularizer_pulls_and_hears_the_progress():
    heard: list[float] = []

    def pull(model: nn.Module, progress: float) -> torch.Tensor:
        heard.append(progress)
        return model.weight.square().sum()

    reports: list[dict] = []
    model, (x, y) = linear(), vectors()
    options = {"epochs": 2, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
    tuned = finetune(model, [(x, y)], regularizer=pull, on_epoch=reports.append, **options)
    expected = model.weight.detach().clone()
    bias = model.bias.detach().clone()
    for _ in range(2):
        w, b = expected.clone().requires_grad_(), bias.clone().requires_grad_()
        gw, gb = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), y) + w.square().sum(), [w, b])
        expected, bias = expected - 0.1 * gw, bias - 0.1 * gb
    torch.testing.assert_close(tuned.weight, expected)
    assert heard == [0.0, 1.0]
    assert reports[0]["loss"] == pytest.approx(reports[0]["loss_labels"] + reports[0]["loss_regularizer"])


def test_an_own_loss_replaces_cross_entropy():
    model, (x, _) = linear(), vectors()
    wanted = torch.randn(48, 2, generator=torch.Generator().manual_seed(4))
    options = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}
    tuned = finetune(model, [(x, wanted)], loss=lambda out, batch: F.mse_loss(out, batch[1]), **options)
    (gradient,) = torch.autograd.grad(F.mse_loss(model(x), wanted), [model.weight])
    torch.testing.assert_close(tuned.weight, model.weight - 0.1 * gradient)


def test_bf16_computes_coarsely_and_keeps_weights_in_float32():
    pytest.importorskip("accelerate")
    kinds: list[torch.dtype] = []
    model = nn.Sequential(linear(), nn.Identity())
    model[1].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    coarse = finetune(model, batches(16), epochs=1, lr=0.5, precision="bf16")
    assert kinds == [torch.bfloat16] * 3
    assert coarse[0].weight.dtype == torch.float32
    fine = finetune(linear(), batches(16), epochs=1, lr=0.5)
    assert not torch.equal(coarse[0].weight, fine.weight)
    torch.testing.assert_close(coarse[0].weight, fine.weight, rtol=0.05, atol=0.01)
    finetune(model, batches(16), epochs=1)  # accelerate's settings are gone again
    assert kinds[3:] == [torch.float32] * 3


def test_mixing_by_hand_and_odd_batches():
    pytest.importorskip("timm")
    import numpy as np

    x, y = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4])
    np.random.seed(0)  # noqa: NPY002
    mixed = Mixer(1.0, 0.0, 0.0, classes=5)(read_batch((x, y), CPU))
    share = mixed.labels[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed.args[0][:4], share * x[:4] + (1 - share) * x[:4].flip(0))
    torch.testing.assert_close(mixed.labels[0], torch.tensor([share, 0, 0, 1 - share, 0]))
    assert torch.equal(mixed.args[0][4], x[4])
    assert mixed.labels[4].tolist() == [0, 0, 0, 0, 1]
    smooth = Mixer(0.0, 1.0, 0.1, classes=5)(read_batch({"image": x, "label": y}, CPU))
    torch.testing.assert_close(smooth.labels.sum(1), torch.ones(5))
    torch.testing.assert_close(smooth.labels[4], torch.tensor([0.02, 0.02, 0.02, 0.02, 0.92]))
    pasted = (smooth.kwargs["image"][0] == x[0]) | (smooth.kwargs["image"][0] == x[3])
    assert pasted.all()
    with pytest.raises(DataError, match=r"mixup and cutmix need one tensor of images .* the first \(5, 4\)"):
        Mixer(1.0, 0.0, 0.0, classes=5)(read_batch((torch.rand(5, 4), y), CPU))


def test_the_teacher_sees_the_mixed_images_and_no_accuracy_is_claimed():
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}

    class Watched(Plain):
        name = "student"

        def forward(self, x):
            if self.training or self.name == "teacher":
                seen[self.name].append(x.clone())
            return super().forward(x)

    student, teacher = Watched(), Watched()
    teacher.name = "teacher"
    reports: list[dict] = []
    data = pictures()
    finetune(student, data, teacher=teacher, epochs=1, mixup=0.5, on_epoch=reports.append)
    assert len(seen["student"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"][-2:], strict=True))
    assert not torch.equal(seen["student"][0], data[0][0])
    assert torch.equal(data[0][0], pictures()[0][0])  # the source's own tensors are not mixed in place
    assert "accuracy" not in reports[0]
    assert {"loss", "loss_labels", "loss_distillation"} <= set(reports[0])


def places_of(model: nn.Module, size: int = 16) -> list[str]:
    model.eval()
    x = torch.randn(2, 3, size, size)
    return [place.module for place in choose_places(attrim.trace(model, x), model, lambda m: m(x))]


def test_attention_is_compared_at_the_ends_of_residual_streams():
    assert places_of(Residual()) == ["layers.1", "layers.3", "layers"]
    assert places_of(Mobile(), 32) == ["body.0", "body.2", "body"]
    assert places_of(Plain()) == ["bn1", "bn2"]


class Shared(nn.Module):
    """One ReLU object in three places, and a linear layer whose channels have no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.hidden, self.head, self.relu = nn.Linear(6, 8), nn.Linear(8, 5), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.head(self.relu(self.hidden(x.mean((2, 3)))))


def test_modules_that_run_again_and_groups_without_positions():
    model = Shared().eval()
    x = torch.randn(2, 3, 8, 8)
    channels = attrim.trace(model, x)
    with pytest.warns(AttrimWarning, match=r"leaves out 1 of 3 groups: 'hidden' \('.*' puts out \(2, .*no positions"):
        places = choose_places(channels, model, lambda m: m(x))
    assert [place.module for place in places] == ["conv1", "conv2"]
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    flat = attrim.trace(head, torch.randn(2, 4))
    with (
        pytest.warns(AttrimWarning, match="leaves out 1 of 1"),
        pytest.raises(InputError, match="found no activations with positions"),
    ):
        choose_places(flat, head, lambda m: m(torch.randn(2, 4)))


def test_attention_transfer_over_several_calls_is_their_mean():
    from attrim.recover.losses import attention_transfer
    from attrim.recover.transfer import Place

    torch.manual_seed(0)
    student, teacher = Shared(), Shared()
    x = torch.randn(2, 3, 8, 8)
    transfer = AttentionTransfer([Place("g", "conv1", 1), Place("h", "conv2", 1)])
    with transfer.watching(student, teacher):
        student(x), teacher(x)
        loss = transfer.loss()
        with pytest.raises(InputError, match="'conv1': it ran 0 times in the student and 0 times in the teacher"):
            transfer.loss()
    ours, theirs = student.conv1(x), teacher.conv1(x)
    by_hand = attention_transfer(ours, theirs)
    by_hand = by_hand + attention_transfer(student.conv2(ours.relu()), teacher.conv2(theirs.relu()))
    torch.testing.assert_close(loss, by_hand)
    assert not student.conv1._forward_hooks


def test_a_pruned_student_comes_to_look_where_its_teacher_looks():
    torch.manual_seed(0)
    teacher = Residual(widths=(8, 16), blocks=1).eval()
    x = torch.randn(2, 3, 8, 8)
    result = attrim.prune(teacher, x, budget=attrim.Budget(macs=0.5))
    reports: list[dict] = []
    options = {"teacher": teacher, "epochs": 6, "lr": 0.05, "attention": 100.0, "channels": result.channels}
    tuned = finetune(result.model, pictures(), on_epoch=reports.append, **options)
    assert reports[-1]["loss_attention"] < 0.7 * reports[0]["loss_attention"]
    parts = 0.5 * reports[0]["loss_labels"] + 0.5 * reports[0]["loss_distillation"] + 100 * reports[0]["loss_attention"]
    assert reports[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert all(not module._forward_hooks for net in (tuned, teacher) for module in net.modules())
    with pytest.raises(InputError, match="channels tells where attention is compared, but its weight is 0"):
        finetune(result.model, pictures(), teacher=teacher, channels=result.channels)
    with pytest.raises(InputError, match="attention needs the places where it is compared"):
        finetune(result.model, pictures(), teacher=teacher, attention=1.0)
    with pytest.raises(InputError, match="the channel map belongs to another model: there is no module 'bn1'"):
        finetune(linear(), pictures(), teacher=linear(), attention=1.0, channels=result.channels)


def test_metrics_and_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports: list[dict] = []
    options = {"teacher": linear(), "holdout": batches(48), "folder": tmp_path, "tensorboard": True}
    finetune(linear(), batches(16), epochs=2, lr=0.5, on_epoch=reports.append, **options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == reports
    names = ["epoch", "loss", "loss_distillation", "loss_labels", "accuracy", "lr", "holdout_accuracy"]
    assert list(lines[0]) == [*names, "seconds", "images_per_second"]
    assert lines[1]["images_per_second"] > 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(set(lines[0]) - {"epoch"})
    assert [e.value for e in events.Scalars("accuracy")] == pytest.approx([r["accuracy"] for r in reports])
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


@pytest.mark.parametrize(
    ("package", "options", "text"),
    [
        ("accelerate", {"precision": "bf16"}, r"precision='bf16' needs the package 'accelerate'.*attrim\[train\]"),
        ("timm", {"mixup": 0.2}, r"mixup and cutmix needs the package 'timm'.*attrim\[train\]"),
        ("tensorboard", {"tensorboard": True}, r"needs the package 'tensorboard'.*attrim\[tensorboard\]"),
    ],
)
def test_without_a_package_only_what_needs_it_is_refused(monkeypatch, tmp_path, package, options, text):
    for name in [m for m in sys.modules if m.split(".")[0] == package] + ["torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    folder = {"folder": tmp_path} if "tensorboard" in options else {}
    with pytest.raises(MissingDependencyError, match=text):
        finetune(Plain(), pictures(), epochs=1, **options, **folder)
    finetune(Plain(), pictures(), epochs=1, ema=0.9, clip=1.0, accumulate=2)
