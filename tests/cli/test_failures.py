"""Every failure is one paragraph on the standard error output, with a status; never a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attrim


def one_paragraph(text: str) -> bool:
    return text.startswith("attrim: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pruen"], "No such command 'pruen'. Did you mean 'prune'?"),
        (["trace"], "Missing argument 'MODEL'"),
        (["trace", "x", "--bogus"], "No such option: --bogus"),
        (["prune", "x", "--keep-macs", "half", "--out", "o"], "Invalid value for '--keep-macs'"),
        (["prune", "--out", "o"], "missing a MODEL, such as timm:resnet18."),
        (["prune", "m.py:f"], "missing --out DIR, where the run is written."),
        (["prune", "m.py:f", "--out", "o"], "how small? Give at least one of --keep-macs, --keep-params"),
        (["prune", "m.py:f", "--out", "o", "--keep-macs", "50"], "50.0 looks like a percentage; write macs=0.5."),
        (
            ["prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--scope", "all"],
            "'scope': input should be 'global'",
        ),
        (["prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--min-keep", "x"], "--min-keep: expected numbers"),
        (["prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--option", "x"], "--option: expected NAME=VALUE"),
        (
            ["prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--finetune-epochs", "2"],
            "--finetune-epochs needs images to train on. Add --data PATH.",
        ),
        (
            ["prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--method", "taylor"],
            "--method taylor reads images. Add --data PATH, or choose one of: random, l1, l2",
        ),
        (["evaluate", "m.py:f", "--data", "d", "--pruned", "p", "--pretrained"], "--pruned brings its own weights."),
        (["demo", "--epochs", "0"], "--epochs and --finetune-epochs: expected at least 1, found 0 and 3."),
    ],
)
def test_wrong_usage_is_status_2(call, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    said = call(*arguments)
    assert said.status == 2
    assert text in said.err
    assert one_paragraph(said.err)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_input_shape(call, net):
    said = call("trace", net)
    assert said.status == 2
    assert "does not say what its input is. Give the shape, batch first: --input 1x3x32x32." in said.err


def test_wrong_input_shape_is_readable(call, net):
    said = call("trace", net, "--input", "1x5x8x8")
    assert said.status in (1, 2)
    assert one_paragraph(said.err)


def test_debug_shows_the_traceback(call, net):
    said = call("trace", net.replace(":Net", ":broken"), "--input", "1x4", "--debug")
    assert said.status == 2
    assert "Traceback" in said.err
    assert 'raise RuntimeError("no such file: weights.bin")' in said.err
    assert said.err.rstrip().splitlines()[-1].startswith("attrim: building")


def test_surprises_are_status_1(call, monkeypatch):
    def burst(*_: object) -> None:
        raise KeyError("layer\nseven")

    monkeypatch.setattr("attrim.cli.methods.show", burst)
    said = call("methods")
    assert said.status == 1
    assert one_paragraph(said.err)
    assert "unexpected KeyError: 'layer\\nseven' Run the command again with --debug for the traceback." in said.err


def test_interrupt_is_status_130(call, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attrim.cli.methods.show", stop)
    said = call("methods")
    assert (said.status, said.err) == (130, "attrim: interrupted\n")


def test_warnings_of_attrim_are_notes(call, monkeypatch):
    import warnings

    from attrim.errors import AttrimWarning

    def warn(*_: object) -> None:
        warnings.warn("nothing to recalibrate", AttrimWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)

    monkeypatch.setattr("attrim.cli.methods.show", warn)
    said = call("methods")
    assert said.status == 0
    assert said.err == "nothing to recalibrate\n"


@pytest.mark.parametrize("package", ["typer", "rich", "yaml", "pydantic"])
def test_without_the_extra_one_sentence_says_what_to_install(package):
    code = f"import sys; sys.modules['{package}'] = None; from attrim.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == (
        f"attrim: the command line needs the package '{package}', which is not installed. "
        "Install it with: pip install 'attrim[cli]'\n"
    )


def test_the_program_itself():
    done = subprocess.run(
        [sys.executable, "-m", "attrim.cli.main", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"attrim {attrim.__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "attrim.cli.main", "trace", "resnet18"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert one_paragraph(done.stderr)
