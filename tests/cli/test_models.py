"""MODEL on the command line: every form, and what is said when nothing answers to it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from attrim.cli.models import build
from attrim.errors import InputError, MissingDependencyError
from attrim.ship import save_weights


def test_file_and_function(net):
    built = build(net)
    assert type(built.model).__name__ == "Net"
    assert built.model.head.out_features == 2
    assert built.input is None
    assert built.mean == (0.485, 0.456, 0.406)
    assert not built.trained
    assert not built.model.training
    assert build(net, num_classes=5).model.head.out_features == 5


def test_a_ready_module_in_a_file(net):
    assert isinstance(build(net.replace(":Net", ":ready")).model, nn.Sequential)


def test_weights_are_loaded(net, tmp_path):
    torch.manual_seed(5)
    source = build(net).model
    save_weights(source, tmp_path / "w.safetensors")
    built = build(net, weights=str(tmp_path / "w.safetensors"))
    assert built.trained
    assert torch.equal(built.model.conv1.weight, source.conv1.weight)


def test_libraries_say_what_their_input_is():
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    built = build("timm:resnet10t", num_classes=3)
    assert built.input == (1, 3, 176, 176)
    assert built.model.num_classes == 3
    assert build("torchvision:mobilenet_v2", num_classes=4).input == (1, 3, 224, 224)
    vit = build("timm:test_vit")
    assert vit.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet18",
            r"cannot tell what model 'resnet18' is\. Expected timm:NAME \(timm:resnet18\), torchvision:NAME, or",
        ),
        ("net.py", r"'net\.py' names no function: write net\.py:factory"),
        ("nowhere.py:f", r"no file at 'nowhere\.py'"),
        ("timm:resnet81", r"timm has no model 'resnet81'\. Did you mean resnet18"),
        ("torchvision:resnet81", r"torchvision has no model 'resnet81'\. Did you mean resnet18"),
    ],
)
def test_unknown_names(name, text):
    with pytest.raises(InputError, match=text):
        build(name)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("Nett", r"has no 'Nett'\. It has: Net, plain, nothing, broken, ready$"),
        ("nothing", r"nothing\(\) returned int; expected an nn\.Module"),
        ("number", r"is a int; expected a function or class that makes an nn\.Module"),
        ("broken", r"building .*:broken' failed: RuntimeError: no such file: weights\.bin"),
    ],
)
def test_functions_that_make_no_network(net, function, text):
    with pytest.raises(InputError, match=text.replace("$", r"\.$")):
        build(net.replace(":Net", f":{function}"))


def test_options_that_do_not_fit(net, tmp_path):
    with pytest.raises(InputError, match="--pretrained is for timm: and torchvision: models"):
        build(net, pretrained=True)
    with pytest.raises(InputError, match=r"--num-classes: plain\(\) takes no num_classes"):
        build(net.replace(":Net", ":plain"), num_classes=3)
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(InputError, match="failed: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        build(f"{tmp_path / 'bad.py'}:f")


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_model.py").write_text("width = 3")
    (tmp_path / "m.py").write_text(
        "from neighbour_of_model import width\nfrom torch import nn\ndef f(): return nn.Linear(width, width)"
    )
    before = list(sys.path)
    assert build(f"{tmp_path / 'm.py'}:f").model.in_features == 3
    assert sys.path == before


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"timm:resnet18 needs the package 'timm'.*attrim\[models\]"):
        build("timm:resnet18")
