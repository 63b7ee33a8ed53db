"""Files of more than 2 GB, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
# Each part in a process of its own, whose peak of resident memory is its own, too.
WRITE = """
import sys, resource
import numpy as np
from flax_tied_lora._peft.adapter.folder import write_adapter

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
np.zeros(1)
before = peak()
config = '{"peft_type": "LORA"}'
shape = (20, 2**20)  # 80 MiB

def array(i):
    x = np.zeros(shape, np.float32)
    x[:, i] = i
    return x

tensors = [(f"t{i}", shape, np.float32, lambda i=i: array(i)) for i in range(26)]
write_adapter(sys.argv[1], config, tensors)
print(peak() - before)
"""
READ = """
import sys, resource
import numpy as np
from flax_tied_lora._peft.adapter.folder import read_adapter

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
with read_adapter(sys.argv[1]) as files:
    assert len(files.tensors) == 26
    for name in files.tensors:
        i, x = int(name[1:]), files.tensors[name]
        assert x.shape == (20, 2**20)
        assert x.dtype == np.float32
        assert (x[:, i] == i).all()
        assert np.count_nonzero(x) == (20 if i else 0)
        del x
print(peak() - before)
"""
ONE = """
import sys, resource
import numpy as np
from flax_tied_lora._peft.adapter.folder import read_adapter, write_adapter

x = np.zeros((2**31 + 5,), np.int8)
x[-1] = 7
write_adapter(sys.argv[1], '{"peft_type": "LORA"}', [("x", x.shape, x.dtype, lambda: x)])
del x
with read_adapter(sys.argv[1]) as files:
    x = files.tensors["x"]
print(x.shape[0], x[-1], np.count_nonzero(x))
"""


def run(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_gigabytes_one_tensor_at_a_time(tmp_path):
    directory = tmp_path / "adapter"
    wrote = int(run(WRITE, directory))
    size = (directory / "adapter_model.safetensors").stat().st_size
    assert size > 26 * 80 * MIB > 2**31
    read = int(run(READ, directory))
    # In KiB: one tensor of 80 MiB, and what there is besides.
    assert wrote < 140 * 1024
    assert read < 140 * 1024
    (directory / "adapter_model.safetensors").unlink()


@pytest.mark.slow
def test_one_tensor_of_more_than_two_gigabytes(tmp_path):
    assert run(ONE, tmp_path / "adapter").split() == [str(2**31 + 5), "7", "1"]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
