"""What PEFT's LoraConfig has and takes: `tests/config/test_config.py` is about ours."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from flax_tied_lora import LoraConfig
from tests.config.test_config import VALUES
from tests.helpers.peft_fields import DEFAULTS, PEFT_FIELDS


def test_the_table_of_fields_is_that_of_peft():
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == PEFT_FIELDS
    assert peft.LoraConfig().to_dict() == DEFAULTS


@pytest.mark.parametrize(("field", "values"), VALUES)
def test_peft_takes_each_value_that_is_taken_here(field, values):
    for value in values:
        if value is not None:
            assert peft.LoraConfig(**{field: value}).to_dict()[field] == (
                set(value) if field == "target_modules" and isinstance(value, list) else value
            )


def test_pefts_own_object_for_its_runtime_is_refused():
    with pytest.raises(NotImplementedError, match=r"LoraConfig: runtime_config=.*the default"):
        LoraConfig.from_dict({"runtime_config": peft.LoraRuntimeConfig()})
