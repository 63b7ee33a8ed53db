"""The public face: what importing the package loads, and which names have always been there."""

from __future__ import annotations

import importlib
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import flax_tied_lora as tied_lora

ROOT = Path(__file__).parents[2]
MODULES = (
    "arithmetic", "checkpoint", "losses", "names", "nnx", "peft", "serving", "train",
)  # fmt: skip
# Every name that was public before the files were moved into folders, by where it was found.
BEFORE = {
    "": """
        Adapted AdaptedModel AdapterPlan CallSite CallSites DensifyError DensifyWarning Explanation
        GroupPlan LoraConfig Member NotTiedError Plan QuantizedArray Read SiteFilter TieGroup
        TiedLeaf UnmatchedTargetWarning UnreadTargetWarning Vocabulary WeightTyingWarning adapt
        adapter_axes base dequantize explain find_ties grow_vocabulary losses merge per_example put
        quantize register_rule select stack stored_bytes trace train value_and_grad wrap
    """,
    "arithmetic": "Extraction LeftOutWarning combine extract padded scale switch",
    "checkpoint": "CheckpointError Manager Restored restore restore_params save save_params",
    "losses": "Reduction linear_cross_entropy",
    "names": """
        Entry FAMILIES Names TorchWeight UnmappedError from_state_dict from_torch_array
        from_torch_arrays names_of state_entries to_state_dict to_torch_array
    """,
    "nnx": """
        AdaptedModule LoRADropout Method Scaling Slot adapted base explain from_adapted merge params
        quantize trace wrap
    """,
    "peft": "AdapterFileError ServingWarning load_adapter names_of save_adapter save_merged",
    "train": "labels labels_by lora_plus value_and_grad",
}


def run(program: str) -> str:
    """Returns what a program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_library_that_only_some_need():
    loaded = run("import sys, flax_tied_lora; print(*sys.modules)").split()
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {"orbax", "optax", "qwix", "safetensors", "torch", "transformers"}
    assert "flax.nnx" not in loaded
    assert not [name for name in loaded if name.removeprefix("flax_tied_lora.") in MODULES]


def test_a_public_module_is_loaded_when_something_in_it_is_asked_for():
    program = """
        import sys
        import flax_tied_lora as tied_lora
        from flax_tied_lora import *
        from flax_tied_lora import peft as imported
        assert "flax.nnx" not in sys.modules
        assert tied_lora.nnx.wrap.__module__ == "flax_tied_lora._nnx.wrap"
        assert "flax.nnx" in sys.modules and "orbax" not in sys.modules
        import flax_tied_lora.peft
        from flax_tied_lora.checkpoint import save
        assert imported is flax_tied_lora.peft is sys.modules["flax_tied_lora.peft"]
        assert tied_lora.checkpoint.save is save
    """
    lines = program.splitlines()
    run("\n".join(line.removeprefix(" " * 8) for line in lines))


def test_each_public_name_is_listed_and_there():
    assert set(MODULES) <= set(tied_lora.__all__) <= set(dir(tied_lora))
    assert sorted(tied_lora.__all__) == list(tied_lora.__all__)
    for name in MODULES:
        module = importlib.import_module(f"flax_tied_lora.{name}")
        assert getattr(tied_lora, name) is module
        assert all(hasattr(module, public) for public in module.__all__)
    assert tied_lora.__version__ == importlib.metadata.version("flax-tied-lora")


def test_a_name_that_is_not_there_is_an_error_of_its_kind():
    with pytest.raises(AttributeError, match="'flax_tied_lora' has no attribute 'rap'"):
        tied_lora.rap  # noqa: B018  # pyright: ignore
    assert not hasattr(tied_lora, "py")


@pytest.mark.parametrize("module", BEFORE)
def test_names_of_the_release_before_are_where_they_were(module):
    found = importlib.import_module(f"flax_tied_lora.{module}".rstrip("."))
    names = BEFORE[module].split()
    assert not [name for name in names if not hasattr(found, name)]
    assert set(names) <= set(found.__all__)


def test_functions_and_classes_are_pickled_by_name():
    for name in tied_lora.__all__:
        value = getattr(tied_lora, name)
        if name not in MODULES:
            assert pickle.loads(pickle.dumps(value)) is value, name
