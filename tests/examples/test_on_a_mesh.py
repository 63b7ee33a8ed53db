"""The training script on a mesh: one device, eight, two processes of four; resumed on others."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import decoder
import finetune_on_a_mesh
import jax
import numpy as np
import placing
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from tests.helpers import processes

PROGRAM = Path(finetune_on_a_mesh.__file__)
SMALL = ["--width", "16", "--layers", "1", "--length", "16", "--rank", "2", "--save-every", "2"]


def run_here(*arguments: Any) -> str:
    """Runs the program on the eight devices of this process; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert finetune_on_a_mesh.main([*SMALL, *map(str, arguments)]) == 0
    return printed.getvalue()


def run_in(count: int, devices: int, *arguments: Any) -> list[str]:
    return processes.run(PROGRAM, [*SMALL, *map(str, arguments)], processes=count, devices=devices)


def losses(printed: str) -> dict[int, float]:
    return {int(k): float(v) for k, v in re.findall(r"^step (\d+): loss ([\d.]+)", printed, re.M)}


def adapters_in(folder: Path, step: int) -> Any:
    model = decoder.Decoder(width=16, layers=1, length=16)
    tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    with checkpoint.Manager(folder) as manager:
        return manager.restore(params, step=step).adapted.adapters


def assert_same_adapters(folder: Path, other: Path, step: int) -> None:
    pair = adapters_in(folder, step), adapters_in(other, step)
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[int, float], str]:
    """The run on one device, all six steps: its folder, its losses, what it printed."""
    folder = tmp_path_factory.mktemp("alone")
    (printed,) = run_in(1, 1, "--steps", 6, "--output", folder)
    return folder, losses(printed), printed


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, list[str]]:
    """Two processes of four devices that share a mesh, for four steps."""
    folder = tmp_path_factory.mktemp("shared")
    printed = run_in(2, 4, "--mesh", "data=2,model=4", "--steps", 4, "--output", folder)
    return folder, printed


def test_one_device_learns(alone):
    folder, curve, printed = alone
    assert sorted(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[6] < curve[1]
    assert "1 processes, 1 devices (cpu), mesh {'data': 1, 'model': 1}" in printed
    with checkpoint.Manager(folder) as manager:
        assert manager.all_steps() == [4, 6]


def test_two_processes_of_four_devices(alone, shared):
    folder, (first, second) = shared
    assert losses(first) == pytest.approx({n: alone[1][n] for n in (1, 2, 3, 4)}, abs=1e-4)
    assert_same_adapters(folder, alone[0], 4)
    assert "2 processes, 8 devices (cpu), mesh {'data': 2, 'model': 4}" in first
    assert "step" not in second  # only process 0 prints
    assert "call sites; tied, none densified" in first


def test_what_is_where(shared):
    printed = shared[1][0]
    found = re.findall(r"^(\w+): ([\d,]+) bytes, ([\d,]+) on each device$", printed, re.M)
    sizes = {name: [int(n.replace(",", "")) for n in own] for name, *own in found}
    assert "\n  embed_tokens/embedding [256, 16]: model, None\n" in printed
    assert "\n  embed_tokens/embedding/lora_a [256, 2]: model, None\n" in printed
    # Table and kernels, and what of the factors has their axes, are in four parts.
    assert sizes["params"][1] < 0.3 * sizes["params"][0]
    assert sizes["lora"][1] < 0.6 * sizes["lora"][0]
    assert sizes["optimizer"] == [2 * n + 4 for n in sizes["lora"]]


@pytest.fixture(scope="module")
def eight(shared, tmp_path_factory) -> tuple[Path, str]:
    """The checkpoint of the two processes, gone on from on eight devices of one: FSDP."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    shutil.copytree(shared[0], folder)
    printed = run_here("--mesh", "data=8", "--shard", "fsdp", "--steps", 5, "--output", folder)
    return folder, printed


def test_the_run_of_two_processes_goes_on_in_one(alone, eight):
    assert "going on from step 4" in eight[1]
    assert losses(eight[1]) == pytest.approx({5: alone[1][5]}, abs=1e-4)


def test_the_run_of_one_process_goes_on_in_two(alone, eight):
    folder = eight[0]
    arguments = ["--mesh", "data=4,model=2", "--shard", "width", "--steps", 6, "--output", folder]
    first, _ = run_in(2, 4, *arguments)
    assert "going on from step 5" in first
    assert losses(first) == pytest.approx({6: alone[1][6]}, abs=1e-4)
    assert_same_adapters(folder, alone[0], 6)


@pytest.mark.slow
def test_eight_devices_from_saved_params(alone, tmp_path):
    """Params that another run saved are read straight into their shards."""
    model = decoder.Decoder(width=16, layers=1, length=16)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16), np.int32))["params"]
    checkpoint.save_params(tmp_path / "base", params)
    printed = run_here("--mesh", "data=4,model=2", "--shard", "width", "--steps", 2,
                       "--base", tmp_path / "base")  # fmt: skip
    assert losses(printed) == pytest.approx({n: alone[1][n] for n in (1, 2)}, abs=1e-4)


def test_merged_is_adapted_on_the_mesh(eight):
    mesh = placing.make_mesh({"data": 2, "model": 4})
    model = decoder.Decoder(width=16, layers=1, length=16)
    init = lambda key: model.init(key, np.zeros((1, 16), np.int32))["params"]  # noqa: E731
    where = placing.place(jax.eval_shape(init, jax.random.key(0)), mesh, "vocab")
    where = jax.tree.map(lambda x: x.sharding, where)
    params = jax.jit(init, out_shardings=where)(jax.random.key(0))
    with checkpoint.Manager(eight[0]) as manager:
        adapted = manager.restore(params).adapted
    rows = placing.global_batch(
        np.arange(8 * 17, dtype=np.int32).reshape(8, 17) % 256,
        placing.rows_sharding(mesh, "vocab", 8),
    )
    loss = decoder.loss_of(model, tied_lora.losses.linear_cross_entropy)
    found = jax.jit(tied_lora.adapt(loss, on_dense="error"))(adapted, rows)
    merged = tied_lora.merge(adapted)
    table = merged["embed_tokens"]["embedding"]
    assert table.sharding.is_equivalent_to(params["embed_tokens"]["embedding"].sharding, 2)
    np.testing.assert_allclose(found, jax.jit(loss)(merged, rows), rtol=1e-5)
    assert abs(float(found) - float(jax.jit(loss)(params, rows))) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=4"], r"data=4,model=1 is of 4 devices, and there are 8.*product.* 8"),
        (["--mesh", "data=16"], r"is of 16 devices, and there are 8, in 1 processes"),
        (["--mesh", "data=8", "--batch", "12"], r"--batch 12 does not split over 8.*multiple of 8"),
        (["--mesh", "model=8", "--vocabulary", "260"],
         r"embed_tokens/embedding \[260, 16\] does not split into 8 .*axis 0.*--shard width"),
        (["--mesh", "model=8", "--shard", "width", "--width", "12"],
         r"\[256, 12\] does not split into 8 parts along axis 1, of 12: take a --width"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_mesh(arguments, message, capsys):
    assert finetune_on_a_mesh.main([*SMALL, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["rows=2", "data=0", "data", "model=two"])
def test_a_mesh_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        run_here("--mesh", text)
    assert "expected data=N or model=N, N at least 1" in capsys.readouterr().err
