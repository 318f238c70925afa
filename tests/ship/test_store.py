"""Saving and loading: bit by bit, on the class alone, and with a clear word when the folder is not whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.core.plan import Cut, PruningPlan
from attrim.errors import InputError, PlanError


class Net(nn.Module):
    """A convolution, a norm with buffers, and a head; `extra` changes the class without changing what a plan cuts."""

    def __init__(self, width: int = 6, extra: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)
        if extra:
            self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Tied(nn.Module):
    """The embedding is the decoder; `view` shares memory with a parameter under another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mid = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 7, bias=False)
        self.decode.weight = self.embed.weight
        self.register_buffer("whole", torch.arange(8.0))
        self.register_buffer("view", self.whole[:4])
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mid(self.embed(x)).relu())


@pytest.fixture
def pruned() -> tuple[nn.Module, PruningPlan]:
    torch.manual_seed(0)
    model = Net()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    model.bn.num_batches_tracked.fill_(17)
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    plan = attrim.allocate(channels, attrim.score(model, channels, "l2"), attrim.Budget(channels=0.5))
    return attrim.apply(model, plan), plan


def test_round_trip_is_equal_bit_by_bit(pruned, tmp_path):
    small, plan = pruned
    small.eval()
    attrim.save(small, plan, tmp_path / "small")
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["model.safetensors", "plan.json"]
    fresh = Net().eval()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    again = attrim.load(tmp_path / "small", model=fresh)
    assert again.conv.out_channels == 3 == small.conv.out_channels
    assert list(again.state_dict()) == list(small.state_dict())
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.bn.num_batches_tracked == 17
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), small(x))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_the_plan_in_the_folder_is_the_plan(pruned, tmp_path):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    assert attrim.PruningPlan.load(tmp_path / "plan.json").to_json() == json.loads(json.dumps(plan.to_json()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_survives(pruned, tmp_path, dtype):
    small, plan = pruned
    small = small.to(dtype)
    attrim.save(small, plan, tmp_path)
    again = attrim.load(tmp_path, model=Net())
    assert again.conv.weight.dtype == dtype == again.bn.running_mean.dtype
    assert again.bn.num_batches_tracked.dtype == torch.int64
    assert torch.equal(again.conv.weight, small.conv.weight)


def test_ties_are_stored_once_and_still_hold_after_loading(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    keep = (0, 2, 5)
    cuts = {"mid.weight": Cut((6, 6), {}), "embed.weight": Cut((7, 6), {1: keep})}
    cuts["mid.weight"] = Cut((6, 6), {0: keep, 1: keep})
    cuts["mid.bias"] = Cut((6,), {0: keep})
    plan = PruningPlan("", cuts)
    small = attrim.apply(model, plan)
    with torch.no_grad():
        small.embed.weight.mul_(3)
        small.whole.add_(1)
    attrim.save(small, plan, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "decode.weight" not in file.keys()  # noqa: SIM118
        assert "scratch" not in file.keys()  # noqa: SIM118
        assert json.loads(file.metadata()["aliases"]) == {"decode.weight": "embed.weight"}
    again = attrim.load(tmp_path, model=Tied())
    assert again.decode.weight is again.embed.weight
    assert torch.equal(again.embed.weight, small.embed.weight)
    assert torch.equal(again.whole, torch.arange(8.0) + 1)
    assert torch.equal(again.view, small.view)


def test_saving_over_an_older_run_replaces_it(pruned, tmp_path):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    with torch.no_grad():
        small.head.weight.zero_()
    attrim.save(small, plan, tmp_path)
    assert attrim.load(tmp_path, model=Net()).head.weight.abs().sum() == 0


def test_half_written_folder_is_recognised(pruned, tmp_path):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    kept = plan.cuts["conv.weight"].keep[0]
    other = next(i for i in range(6) if i not in kept)
    swapped = tuple(sorted((*kept[1:], other)))
    moved = {
        name: Cut(cut.shape_before, {d: swapped if k == kept else k for d, k in cut.keep.items()})
        for name, cut in plan.cuts.items()
    }
    PruningPlan(plan.fingerprint, moved).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"half-written: model\.safetensors was saved with another plan"):
        attrim.load(tmp_path, model=Net())


@pytest.mark.parametrize("lost", ["plan.json", "model.safetensors"])
def test_missing_file_is_named(pruned, tmp_path, lost):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=rf"has no {lost}: the folder is incomplete\. Save again: attrim\.save"):
        attrim.load(tmp_path, model=Net())


def test_truncated_weights_are_recognised(pruned, tmp_path):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        attrim.load(tmp_path, model=Net())


def test_a_crash_while_writing_leaves_the_old_folder(pruned, tmp_path, monkeypatch):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with torch.no_grad():
        small.head.weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        attrim.save(small, plan, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


@pytest.mark.parametrize(
    ("fresh", "text"),
    [
        (Net(width=8), r"made for another model: 'conv.weight' had shape \(6, 3, 3, 3\), here it has \(8, 3, 3, 3\)"),
        (Net(extra=True), "made for another model: all tensors that it cuts fit, but the model's fingerprint"),
        (nn.Linear(2, 2), "made for another model: it cuts 'conv.weight'"),
    ],
)
def test_plan_for_another_model(pruned, tmp_path, fresh, text):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    with pytest.raises(PlanError, match=text):
        attrim.load(tmp_path, model=fresh)


def test_the_pruned_model_itself_is_not_a_fresh_instance(pruned, tmp_path):
    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    with pytest.raises(PlanError, match="Apply the plan to a fresh, uncut instance"):
        attrim.load(tmp_path, model=small)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("head.bias"), r"Tensors missing from the file: head\.bias\. Build the model"),
        (lambda t: t.update(more=torch.zeros(1)), r"Tensors not in the model: more\."),
        (
            lambda t: t.update({"head.bias": torch.zeros(9)}),
            r"head\.bias is \(9,\) in the file and \(4,\)",
        ),
    ],
)
def test_weights_that_do_not_fit(pruned, tmp_path, change, text):
    from safetensors.torch import load_file, save_file

    small, plan = pruned
    attrim.save(small, plan, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=text):
        attrim.load(tmp_path, model=Net())


def test_misuse_is_answered(pruned, tmp_path):
    small, plan = pruned
    with pytest.raises(InputError, match=r"expected the pruned nn\.Module to save, found OrderedDict"):
        attrim.save(small.state_dict(), plan, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected the PruningPlan of the model, found str"):
        attrim.save(small, "plan.json", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"leaves 'conv\.weight' with shape \(3, 3, 3, 3\), the model has"):
        attrim.save(Net(), plan, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; expected a folder to save into"):
        attrim.save(small, plan, tmp_path / "file")
    with pytest.raises(InputError, match="no folder at"):
        attrim.load(tmp_path / "nowhere", model=Net())
    with pytest.raises(InputError, match=r"found Net\. Call the class to make an instance"):
        attrim.load(tmp_path, model=Net)  # type: ignore[arg-type]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Stateful(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    with pytest.raises(InputError, match=r"'_extra_state' in the state dict is a dict, not a tensor"):
        attrim.save(Stateful(), PruningPlan("", {}), tmp_path)
