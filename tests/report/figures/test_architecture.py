"""Architecture: every bar has the plan's width, dropped blocks are hatched, stages are found in all kinds of networks."""

from __future__ import annotations

from itertools import pairwise

import matplotlib
import pytest
import torch
from drawn import heights, sound, texts
from torch import nn

import attrim
from attrim.core.plan import PruningPlan
from attrim.errors import InputError, MissingDependencyError
from attrim.report import architecture
from attrim.report.figures.stages import short_names, stages_of


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


@pytest.fixture(scope="module")
def residual() -> attrim.ChannelMap:
    def stage(width: int) -> nn.Sequential:
        return nn.Sequential(*(Block(width) for _ in range(3)))

    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 8, 1), "layer1": stage(8), "down": nn.Conv2d(8, 16, 1), "layer2": stage(16)}
    )
    net = nn.Sequential()
    for name, module in model.items():
        net.add_module(name, module)
    return attrim.trace(net, torch.zeros(1, 3, 8, 8))


def plan_of(channels: attrim.ChannelMap, **options) -> PruningPlan:
    return attrim.plan_from_kept(channels, {g.id: range(g.size // 2 + 1) for g in channels}, **options)


def test_bars_are_the_plans_widths(residual):
    plan = plan_of(residual)
    axes = sound(lambda: architecture(residual, plan)).figure.axes[0]
    assert heights(axes, "kept") == [g.size // 2 + 1 for g in residual]
    assert heights(axes, "full") == [g.size for g in residual]
    assert heights(axes, "dropped") == []


def test_a_plan_alone_gives_the_same_bars(residual):
    plan = PruningPlan.from_json(plan_of(residual).to_json())
    axes = architecture(None, plan).figure.axes[0]
    assert heights(axes, "kept") == [g.size // 2 + 1 for g in residual]


def test_dropped_blocks_are_hatched(residual):
    drop = residual.branches[1]
    picture = sound(lambda: architecture(residual, plan_of(residual, drops=[drop.id])))
    axes = picture.figure.axes[0]
    kept = dict(zip(residual.groups, heights(axes, "kept"), strict=True))
    assert [name for name, height in kept.items() if not height] == list(drop.groups)
    (bars,) = (c for c in axes.containers if c.get_label() == "dropped")
    assert [bar.get_hatch() for bar in bars] == ["////"] * len(drop.groups)
    assert heights(axes, "dropped") == [residual[name].size for name in drop.groups]
    assert "dropped whole" in texts(picture)
    assert "1 branch dropped" in picture.description
    assert drop.groups[0] in picture.description


def test_kept_counts_of_zero_are_priced_as_dropped_branches(residual):
    drop = residual.branches[1]
    plan = attrim.plan_from_kept(residual, {}, drops=[drop.id])
    counts = {group: entry["kept"] for group, entry in plan.groups.items()}
    assert [row.description for row in (architecture(residual, plan), architecture(residual, counts))] == [
        architecture(residual, plan).description
    ] * 2


def test_stages_are_named_and_apart(residual):
    picture = architecture(residual, plan_of(residual))
    assert {"layer1", "layer2", "1.conv1"} <= set(texts(picture))
    bars = next(c for c in picture.figure.axes[0].containers if c.get_label() == "full")
    lefts = [bar.get_x() for bar in bars]
    gaps = [round(b - a, 6) for a, b in pairwise(lefts)]
    names = list(residual.groups)
    inner = [g for g, (a, b) in zip(gaps, pairwise(names), strict=True) if a[:6] == b[:6] == "layer1"]
    assert set(inner) == {1.0}
    assert max(gaps) == 1.9


def test_several_plans_are_compared(residual):
    kept = {g.id: 3 for g in residual}
    picture = sound(lambda: architecture(residual, {"half": plan_of(residual), "three each": kept}))
    first, second = picture.figure.axes
    assert heights(first, "kept") == [g.size // 2 + 1 for g in residual]
    assert heights(second, "kept") == [3] * len(residual)
    (note,) = (text for text in texts(picture) if text.startswith("three each: "))
    share = residual.cost.macs(kept) / residual.cost.macs()
    assert f"{share:.1%} of the MACs" in note
    assert first.get_ylim() == second.get_ylim()


def test_shares_where_widths_differ_much():
    picture = sound(lambda: architecture(None, {"heads": (4, 3), "mlp": (256, 64)}))
    axes = picture.figure.axes[0]
    assert heights(axes, "kept") == [0.75, 0.25]
    assert {"3/4", "64/256"} <= set(texts(picture))
    as_channels = architecture(None, {"heads": (4, 3), "mlp": (256, 64)}, scale="channels")
    assert heights(as_channels.figure.axes[0], "kept") == [3, 64]


def test_one_group_and_a_hundred():
    sound(lambda: architecture(None, {"only": (8, 5)}))
    many = {f"features.denseblock{i // 25}.denselayer{i % 25}.conv1": (128, 1 + i) for i in range(100)}
    picture = sound(lambda: architecture(None, {"one": many, "two": many}))
    assert heights(picture.figure.axes[1], "kept") == list(range(1, 101))


def test_a_group_that_is_not_named_stays_whole(residual):
    first = next(iter(residual))
    axes = architecture(residual, {first.id: 1}).figure.axes[0]
    assert heights(axes, "kept") == [1, *(g.size for g in residual)][:1] + [g.size for g in residual][1:]


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({}, "no group of channels"),
        (PruningPlan("", {}), "no group of channels"),
        ({"a": (4, 5)}, "keeps 5 of its 4"),
        ({"a": 4}, "size of group 'a' is not known"),
        ({"x": {"a": (4, 2)}, "y": {"a": (8, 2)}}, "'y': group 'a' has 8 channels"),
        ({"x": {"a": (4, 2)}, "y": {"b": (4, 2)}}, "no such group"),
        ([1, 2], "expected a PruningPlan"),
    ],
)
def test_what_cannot_be_drawn(plans, message):
    with pytest.raises(InputError, match=message):
        architecture(None, plans)


def test_unknown_scale():
    with pytest.raises(InputError, match="scale: expected"):
        architecture(None, {"a": (4, 2)}, scale="log")


def test_stages_by_name_map_and_width():
    resnet = [f"layer{s}.{b}.conv1" for s in (1, 2) for b in range(3)]
    assert stages_of(dict.fromkeys(resnet, 8)) == ["layer1"] * 3 + ["layer2"] * 3
    convnext = [f"stages.{s}.blocks.{b}.mlp.fc1" for s in (0, 1) for b in range(3)]
    assert stages_of(dict.fromkeys(convnext, 8)) == ["stages.0"] * 3 + ["stages.1"] * 3
    chain = {f"features.{i}": 8 * (1 + i // 3) for i in range(6)}
    assert stages_of(chain) == ["8 wide"] * 3 + ["16 wide"] * 3
    assert stages_of({f"blocks.{i}.fc1": 64 for i in range(6)}) == [""] * 6
    one = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)), nn.MaxPool2d(2))
    two = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)), nn.Conv2d(8, 4, 1))
    channels = attrim.trace(nn.Sequential(*one, *two), torch.zeros(1, 8, 16, 16))
    assert stages_of({g.id: g.size for g in channels}, channels) == ["16²"] * 4 + ["8²"] * 4


def test_short_names():
    assert short_names(["features.0", "features.3"], ["", ""]) == (["0", "3"], "features")
    assert short_names(["only.one"], [""]) == (["only.one"], "")
    names, _ = short_names(["a" * 30, "b"], ["", ""])
    assert names[0] == "a" * 10 + "…" + "a" * 10


def test_saving(tmp_path):
    picture = architecture(None, {"a": (4, 2)})
    picture.save(tmp_path / "deep" / "a.svg")
    assert (tmp_path / "deep" / "a.svg").read_text(encoding="utf-8") == picture.svg
    picture.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match=r"ends with \.svg or \.png"):
        picture.save(tmp_path / "a.pdf")


def test_own_settings_neither_matter_nor_change():
    plain = architecture(None, {"a": (4, 2)}).svg
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert architecture(None, {"a": (4, 2)}).svg == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'attrim\[report\]'"):
        architecture(None, {"a": (4, 2)})
