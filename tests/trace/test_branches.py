"""Residual branches: which side of which sum can go, what goes with it, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attrim
from nets import Residual, filled


@pytest.fixture(scope="module")
def channels() -> attrim.ChannelMap:
    return attrim.trace(filled(Residual((8, 12), blocks=2)), torch.randn(1, 3, 16, 16))


def test_basic_blocks_and_transitions(channels: attrim.ChannelMap) -> None:
    assert [b.id for b in channels.branches] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert [b.shortcut for b in channels.branches] == ["identity", "identity", "computed", "identity"]
    assert [b.gate for b in channels.branches] == [f"layers.{i}.bn2" for i in range(4)]
    assert all(b.exact for b in channels.branches)
    assert channels.sums == ()


def test_a_block_behind_a_relu_vanishes_whole(channels: attrim.ChannelMap) -> None:
    block = channels.branches[1]
    assert block.modules == ("layers.1",)
    assert {path: r.kind for path, r in block.replacements.items()} == {"layers.1": "identity"}
    assert block.groups == ("layers.1.conv1",)
    assert "layers.1.bn2.running_var" in block.tensors


def test_a_transition_keeps_its_shortcut(channels: attrim.ChannelMap) -> None:
    block = channels.branches[2]
    assert block.modules == ("layers.2.conv1", "layers.2.bn1", "layers.2.conv2", "layers.2.bn2")
    assert not any(name.startswith("layers.2.down") for name in block.tensors)
    first = block.replacements["layers.2.conv1"]
    assert (first.kind, first.width) == ("zeros", 12)
    assert [extent.at(16) for extent in first.shape[2:]] == [8, 8]
    assert [extent.at(7) for extent in first.shape[2:]] == [4, 4]


def test_costs_of_drops(channels: attrim.ChannelMap) -> None:
    cost = channels.cost
    block = 2 * 8 * 8 * 9
    assert cost.macs() - cost.macs(drops=["layers.1"]) == block * 16 * 16
    assert cost.params() - cost.params(drops=["layers.1"]) == block + 4 * 8
    assert cost.channels() - cost.channels(drops=["layers.1"]) == 8
    assert cost.macs({"layers.1.conv1": 2}, drops=["layers.1"]) == cost.macs(drops=["layers.1"])
    assert cost.macs({"layers.1.conv1": 2}) == cost.macs() - block * 16 * 16 * 6 // 8


def test_a_drop_that_is_no_branch_is_refused(channels: attrim.ChannelMap) -> None:
    with pytest.raises(attrim.errors.InputError, match=r"'layers' is not a residual branch.*layers\.0, layers\.1"):
        channels.cost.macs(drops=["layers"])


# -- what is no branch, and why -------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three convolutions and a linear head; subclasses say how they are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)


def reasons(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[str], list[str]]:
    channels = attrim.trace(filled(model), inputs or torch.randn(2, 3, 8, 8))
    return [b.id for b in channels.branches], [str(r) for r in channels.sums]


def test_both_sides_are_read_elsewhere() -> None:
    class Dense(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            y = self.b(x)
            return self.head(torch.cat([self.c(x + y), y], 1)[:, :6].mean((2, 3)))

    found, why = reasons(Dense())
    assert found == []
    assert "both sides of the sum are read elsewhere too (aten.add" in why[0]


def test_a_branch_that_is_also_an_output_stays() -> None:
    class Tapped(Layers):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.a(x)
            y = self.b(x)
            return self.head((x + y).mean((2, 3))), y

    assert reasons(Tapped())[0] == []


def test_sides_that_start_from_different_inputs() -> None:
    class TwoInputs(Layers):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head((self.a(x) + self.a(y) + self.b(self.a(y))).mean((2, 3)))

    found, why = reasons(TwoInputs(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    assert found == ["b"]
    assert any("its sides start from different tensors" in reason for reason in why)


def test_a_branch_without_parameters() -> None:
    class Blurred(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head((x + nn.functional.avg_pool2d(x, 3, 1, 1)).mean((2, 3)))

    found, why = reasons(Blurred())
    assert found == []
    assert "no parameter lies on one of its sides alone" in why[0]


def test_a_weight_that_is_used_elsewhere_stays() -> None:
    class Borrowed(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = x + self.b(x)
            return self.head((x * self.b.weight.sum()).mean((2, 3)))

    found, why = reasons(Borrowed())
    assert found == []
    assert "'b.weight' is also used outside of it" in why[0]


def test_a_tied_module_stays() -> None:
    class Tied(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Conv2d(6, 6, 1)
            self.d.weight = self.c.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.d(self.a(x))
            return self.head((x + self.c(x)).mean((2, 3)))

    found, why = reasons(Tied())
    assert found == []
    assert "'c.weight' is shared with a module outside of it" in why[0]


def test_code_that_reads_a_part_of_the_branch_keeps_it() -> None:
    class Nosy(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head((x + self.b(x) / self.b.out_channels).mean((2, 3)))

    found, why = reasons(Nosy())
    assert found == []
    assert "the network does not run without it: AttributeError" in why[0]


def test_a_branch_that_does_not_end_in_zero_of_zero() -> None:
    class Shifted(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head((x + self.b(x).sigmoid()).mean((2, 3)))

    found, why = reasons(Shifted())
    assert found == []
    assert "something else than zero of zero" in why[0]


def test_the_fused_encoder_layer_stays() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    found, why = reasons(model, torch.randn(2, 5, 4))
    assert found == []
    assert "fused kernels" in why[0]


# -- other shapes of branches ---------------------------------------------------------------------------------------


def test_of_two_computed_sides_the_heavier_is_the_branch() -> None:
    class Towers(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head((self.c(x) + self.b(x)).mean((2, 3)))

    found, why = reasons(Towers())
    assert (found, why) == (["b"], [])


def test_nested_branches_know_each_other_and_their_price() -> None:
    class Nested(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.ModuleDict({"norm": nn.BatchNorm2d(6), "last": nn.Conv2d(6, 6, 1)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            y = self.outer["norm"](x)
            y = y + self.b(y)
            return self.head((x + self.outer["last"](y)).mean((2, 3)))

    channels = attrim.trace(filled(Nested()), torch.randn(2, 3, 8, 8))
    inner, outer = channels.branches
    assert (inner.id, inner.inside, outer.id, outer.inside) == ("b", "outer.last", "outer.last", "")
    cost = channels.cost
    assert cost.macs() - cost.macs(drops=[inner.id]) == 2 * 64 * 9 * 36
    assert cost.macs() - cost.macs(drops=[outer.id]) == 2 * 64 * 10 * 36
    assert cost.macs(drops=[outer.id]) == cost.macs(drops=[inner.id, outer.id])
    assert cost.gone([outer.id]).tolist() == [True, True]


def test_a_block_of_two_branches_becomes_an_identity_without_both() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
            self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mix(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    model = filled(nn.Sequential(nn.Linear(4, 8), Two(), nn.Linear(8, 3)))
    channels = attrim.trace(model, torch.randn(2, 5, 4))
    assert [b.id for b in channels.branches] == ["1.mix", "1.mlp"]
    assert channels.passes == {"1": ("1.mix", "1.mlp")}
    one = attrim.plan_from_kept(channels, {}, drops=["1.mlp"])
    assert one.drops == ("1.norm2", "1.mlp")
    assert {path: r.kind for path, r in one.replacements.items()} == {"1.norm2": "like"}
    both = attrim.plan_from_kept(channels, {}, drops=["1.mlp", "1.mix"])
    assert (both.drops, both.replacements) == (("1",), {})


def test_dropout_on_the_shortcut_keeps_the_block() -> None:
    """In eval mode it is nothing, in training it is not: the block must not become an identity."""

    class Dropped(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Module()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x) + self.b(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 6, 1), Dropped(), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.stem(x)))

    (branch,) = attrim.trace(filled(Net()), torch.randn(2, 3, 8, 8)).branches
    assert branch.modules == ("block.b",)


def test_table_and_explain_tell_of_branches(channels: attrim.ChannelMap) -> None:
    text = channels.table()
    assert "branches that can be removed whole:\n  layers.0: 12 tensors, 294,912 MACs; the input stays" in text
    assert "layers.2: 12 tensors" in text
    assert "a computed shortcut stays" in text
    assert "goes with the branch 'layers.1' (the block returns its input)" in channels.explain("layers.1.conv1.weight")
    assert "4 branches" in repr(channels)
