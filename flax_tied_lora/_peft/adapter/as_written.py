"""What the user wrote, beside a config that names more: kept where PEFT and servers do not look.

Servers go by the names of ``target_modules``, so a saved config names a tied head that the user's
names leave to PEFT's tying. The file's metadata has the user's own for who loads it here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.files.strict_json import parse_object

KEY = "flax_tied_lora.config"
FIELDS = ("target_modules", "modules_to_save")


def note_of(written: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """Returns metadata that say what was written for fields whose lists were made longer."""
    note = {
        field: {"written": written[field], "saved": saved[field]}
        for field in FIELDS
        if isinstance(written[field], list)
        and len(saved[field]) > len(written[field])
        and saved[field][: len(written[field])] == written[field]
    }
    return {KEY: json.dumps(note, sort_keys=True)} if note else {}


def with_written(config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns a config with what was written in place of what was saved, where that still stands.

    A note that another program damaged, or that is of another config, says nothing.
    """
    try:
        note = parse_object(metadata.get(KEY, "{}").encode("utf-8", "replace"), Path(KEY))
    except AdapterFileError:
        return dict(config)
    result = dict(config)
    for field in FIELDS:
        said = note.get(field)
        if not isinstance(said, dict) or not isinstance(said.get("written"), list):
            continue
        written, saved = said["written"], said.get("saved")
        if (
            isinstance(saved, list)
            and saved == config.get(field)
            and written == saved[: len(written)]
        ):
            result[field] = written
    return result
