"""The benchmarks run and count right; docs/performance.md is what they stored."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _figures  # noqa: E402
import _harness  # noqa: E402
import _plots  # noqa: E402
import _report  # noqa: E402
import jax  # noqa: E402
import matplotlib.image  # noqa: E402
from PIL import Image  # noqa: E402

PROGRAMS = sorted(f.stem for f in BENCHMARKS.glob("[a-z]*.py"))
# What the slow ones run is in step.py, in the other model of against_peft, in
# tests/losses/test_chunked.py.
SMALL = [
    "elsewhere --tiny", "importing --rounds 2", "step --rounds 2", "decoding --rounds 2",
    "deep --rounds 2",
    "against_peft --rounds 2 --models gpt2 --batch 3",
    *(pytest.param(f"{p} --rounds 2", marks=pytest.mark.slow)
      for p in ("against_peft", "gemma_table", "linear_cross_entropy")),
]  # fmt: skip
RESULTS = BENCHMARKS / "results"


def spread(low: float, middle: float, high: float) -> dict[str, float]:
    return {"median": middle, "quartile 1": low, "quartile 3": high}


def record(rounds: int = 11, **figures: object) -> dict[str, object]:
    return {
        "figures": {"what": "fakes", "rounds": rounds, **figures},
        "date": "2026-01-02", "command": "python benchmarks/step.py", "device": "cpu x 1, x86_64",
        "processor": "A CPU", "cores": 2, "python": "3.11", "versions": {"jax": "0.10"},
    }  # fmt: skip


def test_peers_take_turns():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = _harness.interleaved(cases, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(values) for values in seconds.values()) > 0


def test_a_ratio_is_of_the_rounds():
    # A round that is slow for both changes nothing.
    seconds = {"a": [1.0, 2.0, 3.0, 40.0, 5.0], "b": [1.0, 1.0, 1.0, 10.0, 1.0]}
    assert _harness.ratio(seconds, "a", "b") == spread(2, 3, 4)
    assert _harness.medians(seconds) == {"a": 3, "b": 1}


def test_peers_that_compute_different_things_are_refused():
    _harness.check_equal({"a": 1.0, "b": 1.00005})
    with pytest.raises(SystemExit, match=r"differ by more than 0\.0001: .*'b': 1\.001"):
        _harness.check_equal({"a": 1.0, "b": 1.001})


@pytest.mark.parametrize(
    ("value", "least", "verdict"),
    [(1.2, False, "no"), (1.05, False, "yes"), (1.0, False, "yes, the aim too"),
     (1.0, True, "no"), (1.05, True, "yes, the aim too")],
)  # fmt: skip
def test_verdicts(value, least, verdict):
    target = _figures.Target("step", "a / b", 1.1, 1.02, least=least)
    if least:
        target = _figures.Target("step", "a / b", 1.02, 1.05, least=True)
    assert target.verdict(value) == verdict


def test_a_page_says_what_is_met_and_what_was_a_trial():
    ratios = {"tied / attention only": spread(1.01, 1.04, 1.07)}
    times = {"tied": 0.5, "attention only": 0.4}
    results = {
        "step": record(ratios=ratios, **{"median seconds": times, "temporary MiB": {"tied": 1234}}),
        "decoding": record(2, ratios={"unmerged / merged": spread(1, 2, 3)}),
        "against_peft": record(**{"GPT-2 small": {"ratios": {"PEFT / ours": spread(1, 1.1, 2)}}}),
        "linear_cross_entropy": record(
            **{"memory / frozen, plain": {"tied, fused": 0.0625}, "temporary MiB": {"a": 1.5}}
        ),
    }
    before, after = "# Page\n" + _report.BEGIN, _report.END + "the end\n"
    page = _report.page(before + "old\n" + after, results)
    assert page.startswith(before)
    assert page.endswith(after)
    assert "old" not in page
    for line in (
        "| tied / attention only | at most 1.05 (aim: 1.03) | 1.040 | 1.010 to 1.070 | yes |"
        " [step](#step) |",
        "| GPT-2 small: PEFT / ours | at least 1.15 (aim: 1.5) | 1.100 | 1.000 to 2.000 | no |"
        " [against_peft](#against_peft) |",
        "| memory / frozen, plain: tied, fused | at most 0.1 | 0.062 | - | yes |"
        " [linear_cross_entropy](#linear_cross_entropy) |",
        "| a | - | 1.5 |",
        "| unmerged / merged | at most 1.05 | 2.000 | 1.000 to 3.000 | a trial run |"
        " [decoding](#decoding) |",
        "| tied | 0.5 | 1,234 |",
        "| attention only | 0.4 | - |",
        "`python benchmarks/step.py`, 2026-01-02, cpu x 1, x86_64, A CPU, 2 cores; Python 3.11, "
        "jax 0.10.",
        "**GPT-2 small**",
    ):
        assert line in page.splitlines()
    assert page.count("**A trial run") == 1
    assert _report.page(page, results) == page
    with pytest.raises(SystemExit, match="no marker"):
        _report.page("# Page\n", results)


def test_the_stored_results_are_the_page():
    """Stale after a new result: run benchmarks/_report.py."""
    page = (ROOT / "docs/performance.md").read_text()
    records = _figures.stored(RESULTS)
    assert _report.page(page, records, _figures.stored_elsewhere(RESULTS)) == page
    for file, (_, panels_of) in _plots.PLOTS.items():
        with Image.open(ROOT / "docs/images" / file) as image:
            assert image.info["Source"] == _plots.digest(panels_of(records)), file


def test_what_was_measured_elsewhere_has_a_table_of_its_own(tmp_path):
    here, there = (
        {"tracing": record(ratios={"forward, adapted / plain": spread(1, x, 3)})} for x in (1.4, 2)
    )
    (tmp_path / "another-processor").mkdir()
    for path, results in ((tmp_path, here), (tmp_path / "another-processor", there)):
        (path / "tracing.json").write_text(json.dumps(results["tracing"]))
    elsewhere = _figures.stored_elsewhere(tmp_path)
    assert (_figures.stored(tmp_path), elsewhere) == (here, {"another-processor": there})
    lines = _report.page(_report.BEGIN + _report.END, here, elsewhere).splitlines()
    table = lines[lines.index("### Against the targets: another-processor") :]
    row = "| forward, adapted / plain | at most 1.5 | 2.000 | 1.000 to 3.000 | no |"
    assert f"{row} `another-processor/tracing.json` |" in table
    assert lines.count("### tracing") == 1


def test_the_processor_has_a_name():
    assert _harness.processor().strip()


def test_every_program_has_a_stored_result():
    names = {name: [r for r in _figures.stored(RESULTS) if r.startswith(name)] for name in PROGRAMS}
    assert all(names.values()), names


def test_every_target_has_a_figure_on_the_cpu():
    met = {target for target, *_ in _figures.against_targets(_figures.stored(RESULTS))}
    missing = {t.label for t in _figures.TARGETS if _figures.GPU not in t.file and t not in met}
    assert missing <= {_figures.COMPILING}


@pytest.mark.parametrize(
    ("set_to", "name", "before"),
    [({}, "new.json", ""),
     ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, "new.json",
      "GLIBC_TUNABLES=glibc.malloc.check=3 "),
     ({"LD_PRELOAD": "", "GLIBC_TUNABLES": _harness.KEPT_MEMORY}, "new-kept-memory.json",
      f"GLIBC_TUNABLES={_harness.KEPT_MEMORY} "),
     ({"LD_PRELOAD": "./own.so"}, "new.json", "LD_PRELOAD=./own.so ")],
)  # fmt: skip
def test_a_command_has_the_settings_it_ran_in(set_to, name, before, tmp_path, monkeypatch):
    for variable in _harness.SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in set_to.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["step.py", "--output", str(tmp_path)])
    _harness.store("new", {"what": "nothing"})
    (file,) = tmp_path.iterdir()
    assert file.name == name
    command = json.loads(file.read_text())["command"]
    assert command == f"{before}python benchmarks/step.py --output {tmp_path}"


def test_targets_on_the_cpu_leave_a_gpu_its_own():
    ratios = {"ratios": {"PEFT / ours": spread(1, 1.3, 2)}}
    files = ("against_peft", "against_peft-batch4-length256-kept-memory", "against_peft-nvidia-x")
    results = {f: record(**{"SmolLM2-135M, 4 x 256 tokens": ratios}) for f in files}
    limits = [(name, target.limit) for target, name, *_ in _figures.against_targets(results)]
    assert limits == list(zip(files, (1.15, 1.15, 1.5), strict=True))


@pytest.fixture
def compiled_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("standard_promotion", "compiled_fast")
@pytest.mark.parametrize("call", SMALL)
def test_a_program_runs(call, tmp_path, monkeypatch, capsys):
    stored = {f: f.read_bytes() for f in RESULTS.rglob("*.json")}
    program, options = call.split(maxsplit=1)
    line = f"{program}.py {options} --tiny --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", line.split())
    importlib.import_module(program).main()
    (file,) = tmp_path.iterdir()
    suffix = "-batch3" if "--batch 3" in options else ""
    assert file.name == f"{program}{suffix}.json"
    found = json.loads(file.read_text())
    assert found["command"] == f"python benchmarks/{line}"
    assert found["figures"]["what"]
    assert file.read_text() in capsys.readouterr().out
    assert {f: f.read_bytes() for f in RESULTS.rglob("*.json")} == stored
    # What a program stores is what the page and the plots can show.
    assert f"### {program}" in _report.page(_report.BEGIN + _report.END, {program: found})
    _plots.draw({program: found}, tmp_path / "plots")


def test_plots_are_drawn(tmp_path):
    ratios = {"tied / attention only": spread(1.01, 1.04, 1.07)}
    results = {"step": record(ratios=ratios, **{"temporary MiB": {"tied": 1.0, "by hand": 2.0}})}
    _plots.draw(results, tmp_path)
    pixels = matplotlib.image.imread(tmp_path / "step-time.png")
    assert pixels[..., :3].std() > 0.05
