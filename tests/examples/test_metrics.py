"""What a run measures: lines of JSON, and the writers of other tools."""

from __future__ import annotations

import json
import math
import sys
import types

import metrics
import pytest


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_at_a_time(tmp_path):
    with metrics.Metrics(tmp_path / "run", 0, [], {}) as measured:
        measured.write(1, loss=2.5, rate=1e-3)
        assert lines(tmp_path / "run") == [{"step": 1, "loss": 2.5, "rate": 1e-3}]
        measured.write(2, loss=math.nan, rate=math.inf)
    assert lines(tmp_path / "run")[1] == {"step": 2, "loss": None, "rate": None}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_going_on_drops_what_comes_again(tmp_path):
    with metrics.Metrics(tmp_path, 0, [], {}) as measured:
        for step in range(1, 6):
            measured.write(step, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed
    with metrics.Metrics(tmp_path, 3, [], {}) as measured:
        measured.write(4, loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0),
    ]  # fmt: skip


class Recorder:
    """Stands for a tool's package."""

    def __init__(self):
        self.calls: list = []

    def SummaryWriter(self, folder, purge_step):
        self.calls.append((folder, purge_step))
        return self

    def add_scalar(self, name, value, step):
        self.calls.append((step, name, value))

    def close(self):
        self.calls.append("closed")

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    finish = close


def installed(monkeypatch, name: str) -> list:
    recorder, module = Recorder(), types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    module.SummaryWriter, module.init = recorder.SummaryWriter, recorder.init
    monkeypatch.setitem(sys.modules, name, module)
    return recorder.calls


def test_tensorboard(tmp_path, monkeypatch):
    calls = installed(monkeypatch, "tensorboardX")
    metrics.check_installed(["tensorboard"])
    with metrics.Metrics(tmp_path, 4, ["tensorboard"], {}) as measured:
        measured.write(5, loss=1.5)
    assert calls == [(str(tmp_path / "tensorboard"), 5), (5, "loss", 1.5), "closed"]


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = installed(monkeypatch, "wandb")
    metrics.check_installed(["wandb"])
    for step in (0, 5):
        settings = {"rank": 8, "output": tmp_path}
        with metrics.Metrics(tmp_path, step, ["wandb"], settings) as measured:
            measured.write(step + 1, loss=1.5)
    (first, _, closed, second, *_) = calls
    assert first == second
    assert first["config"] == {"rank": 8, "output": str(tmp_path)}
    assert first["resume"] == "allow"
    assert len(first["id"]) == 32
    assert calls[1] == (1, {"loss": 1.5})
    assert calls[4] == (6, {"loss": 1.5})
    assert closed == "closed"


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tool_that_is_not_installed(monkeypatch, name, package):
    for other in metrics.PACKAGES[name]:
        monkeypatch.setitem(sys.modules, other, None)
    message = f"--log {name} needs a package: pip install {package}"
    with pytest.raises(ModuleNotFoundError, match=message):
        metrics.check_installed([name])
