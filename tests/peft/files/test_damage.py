"""Damaged adapters: each is read, or ends in the one documented error."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from flax_tied_lora._peft.adapter.folder import AdapterFileError, read_adapter
from tests.helpers import damage_shards
from tests.helpers import sample_adapter as sample
from tests.helpers.damage import INDEX, WEIGHTS, equal, put, random_damage, reshard, snapshot
from tests.helpers.damage_cases import CASES

assert damage_shards.CASES is CASES  # importing it has added its own


@pytest.fixture
def adapter(tmp_path):
    sample.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_cases_are_many_and_distinct():
    assert len({case.name for case in CASES}) == len(CASES) >= 90


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged(adapter, case):
    case.do(adapter)
    before = snapshot(adapter) if adapter.is_dir() else None
    with pytest.raises(AdapterFileError, match=case.message) as caught:
        sample.values(read_adapter(adapter))
    message = str(caught.value)
    assert str(adapter) in message
    assert "; expected " in message
    assert len(message) < 1000
    message.encode("utf-8")
    assert (snapshot(adapter) if adapter.is_dir() else None) == before


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_random_damage(adapter, sharded):
    """Two thousand damaged adapters: each is read or ends in the one error."""
    if sharded:
        reshard(adapter)
    files = snapshot(adapter)
    outcomes = {"read": 0, "error": 0}
    for seed in range(1000):
        what, damaged = random_damage(files, seed + 1000 * sharded)
        put(damaged, adapter)
        try:
            found = sample.values(read_adapter(adapter))
            json.dumps(found_config := read_adapter(adapter).config).encode()
            assert found_config["peft_type"] == "LORA", what
            # What we take, the library takes, and reads the same.
            if (adapter / WEIGHTS).exists():
                assert equal(found, load_file(adapter / WEIGHTS)), what
            outcomes["read"] += 1
        except AdapterFileError:
            outcomes["error"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert outcomes["read"] > 100
    assert outcomes["error"] > 500


def test_random_damage_is_the_same_each_time(adapter):
    files = snapshot(adapter)
    assert [random_damage(files, s) for s in range(50)] == [
        random_damage(files, s) for s in range(50)
    ]
    assert files == snapshot(adapter)
    assert any(INDEX in random_damage(files, s)[1] for s in range(200))
