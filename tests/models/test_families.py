"""Real models: their ties, their call sites, and what a config's targets name in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flax import traverse_util

import flax_tied_lora as tied_lora
from flax_tied_lora import TiedLeaf
from tests.models.checks import adapted_of, each_family, explanation_of, far, model_tests, sites_of
from tests.models.families import FAMILIES, WIDTH, build
from tests.models.families import clip_of_old_jax as clip_of_old_jax

pytestmark = model_tests
UNTIED = [name for name, f in FAMILIES.items() if f.untied_head]


def test_every_class_that_ties_is_here():
    """Read off transformers' own code: classes whose module asks for ``tie_word_embeddings``."""
    tying = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_flax_*.py"):
        for part in re.split(r"^(?=class )", file.read_text(), flags=re.MULTILINE):
            kind = re.match(r"class (Flax\w+)Module\(", part)
            if kind and "if self.config.tie_word_embeddings" in part:
                tying.add(kind[1])
    ours = {f.model for f in FAMILIES.values()}
    ours |= {kind.removesuffix("Model") for kind in ours}
    assert len(tying) == 35
    assert tying <= ours
    # These tie by inheritance, by a part of theirs, or by what is declared here.
    assert {f.model for f in FAMILIES.values() if f.model.removesuffix("Model") not in tying} == {
        "FlaxLlamaForCausalLM", "FlaxMistralForCausalLM", "FlaxMT5ForConditionalGeneration",
        "FlaxEncoderDecoderModel", "FlaxVisionEncoderDecoderModel", "FlaxSpeechEncoderDecoderModel",
    }  # fmt: skip


@each_family
def test_trace_gives_the_sites_of_the_table(name):
    family = FAMILIES[name]
    sites = sites_of(name).of(family.table, *filter(None, [family.untied_head]))
    assert [s.role for s in sites] == ["lookup"] * family.lookups + ["projection"]
    assert [s.operation for s in sites] == ["gather"] * family.lookups + ["dot_general"]
    assert all((s.rows, s.cols) == ((0,), (1,)) for s in sites[:-1])
    # A projection by the table sums over its width; the separate kernel is the table, transposed.
    rows, cols = ((0,), (1,)) if family.untied_head else ((1,), (0,))
    assert (sites[-1].rows, sites[-1].cols) == (rows, cols)
    assert sites[-1].scope.partition("/")[2] == family.head
    if family.lookups == 2:
        assert [s.scope.split("/")[-2] for s in sites[:2]] == ["encoder", "decoder"]


@each_family
def test_trace_meets_every_leaf(name):
    unread = FAMILIES[name].unread
    leaves = set(traverse_util.flatten_dict(build(name).params, sep="/"))
    assert set(sites_of(name).leaves()) == {p for p in leaves if not unread or unread not in p}


@each_family
def test_find_ties_needs_the_models_config_alone(name):
    case = build(name)
    found = tied_lora.find_ties(case.params, case.ties, sites=sites_of(name))
    group = next(g for g in found if g.key == case.family.table)
    assert "data flow" in group.found
    if case.family.untied_head:
        assert group.paths == (case.family.table, case.family.untied_head)
        assert [m.transposed for m in group.members] == [False, True]
        assert ("declared" if case.family.declared_untied else "model config") in group.found
    else:
        assert group.paths == (case.family.table,)
        assert group.found == ("data flow",)


@each_family
def test_the_models_config_says_what_a_declaration_does(name):
    case = build(name)
    family, config = case.family, case.model.config
    assert config.tie_word_embeddings is not family.declared_untied
    declared = tied_lora.find_ties(case.params, family.ties, sites=sites_of(name))
    by_config = tied_lora.find_ties(case.params, config, sites=sites_of(name))
    if family.declared_untied and family.untied_head:  # GPT-J: the class cannot run tied.
        assert family.table not in [g.key for g in by_config]
    else:
        assert [g.members for g in by_config] == [g.members for g in declared]
    as_dict = tied_lora.find_ties(case.params, config.to_dict(), sites=sites_of(name))
    assert as_dict == by_config


@each_family
def test_explain_shows_every_site_as_low_rank(name):
    family, adapted, explanation = FAMILIES[name], adapted_of(name), explanation_of(name)
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} == {"low rank"}
    roles = [r.site.role for r in explanation.of(family.table)]
    assert roles == ["lookup"] * family.lookups + ["projection"]
    assert {r.groups for r in explanation.of(family.table)} == {(family.table,)}
    others = [g.key for g in adapted.plan.adapted if g.key != family.table]
    assert len(others) == family.kernels
    for key in others:
        reads = explanation.of(key)
        assert len(reads) == len(sites_of(name).of(key)) > 0, key
        assert {(r.site.role, r.groups) for r in reads} == {("projection", (key,))}
    assert f"{len(explanation.reads)} call sites, 0 densified" in str(explanation)


@each_family
def test_all_linear_is_every_kernel_but_the_output_projection(name):
    case = build(name)
    config = tied_lora.LoraConfig(r=1, target_modules="all-linear")
    shapes = case.model.params_shape_tree
    adapted = tied_lora.wrap(shapes, config, sites=sites_of(name), ties=case.ties)
    leaves = traverse_util.flatten_dict(case.params, sep="/")
    unread = case.family.unread
    kernels = {  # Not those of convolutions, as in PEFT.
        path for path, x in leaves.items()
        if path.endswith("/kernel") and x.ndim == 2 and path != case.family.untied_head
        and not (unread and unread in path)
    }  # fmt: skip
    assert {g.key for g in adapted.plan.adapted} == kernels


@each_family
def test_head_resolves_to_the_table(name):
    """A head has no leaf of its own where it is tied: it is known by its scope, or by its role."""
    case = build(name)
    for target in {case.family.head, "lm_head", "embed_tokens"}:
        config = tied_lora.LoraConfig(r=2, target_modules=[target])
        shapes = case.model.params_shape_tree
        adapted = tied_lora.wrap(shapes, config, sites=sites_of(name), ties=case.ties)
        ((group, adapter),) = adapted.plan.adapters()
        assert (group.key, group.is_table, adapter.targets) == (case.family.table, True, (target,))
        assert group.shapes(adapter)["lora_a"] == (*group.shape[:1], 2)


@pytest.mark.parametrize("name", UNTIED)
def test_lost_tie_is_repaired_without_a_second_copy(name):
    case, adapted = build(name), adapted_of(name)
    table, head = leaves_of(case.params, case.family)
    assert far(head, table.T) > 1  # what the loader left: random
    stored, marker = leaves_of(adapted.params, case.family)
    assert marker == TiedLeaf(case.family.table, transposed=True)
    assert stored is table
    shapes = [
        x.shape for x in traverse_util.flatten_dict(adapted.params).values() if x is not marker
    ]
    assert sum(shape in (table.shape, table.shape[::-1]) for shape in shapes) == 1

    merged, _ = leaves_of(tied_lora.merge(adapted), case.family)
    for params in (tied_lora.base(adapted), tied_lora.merge(adapted)):
        embedding, head = leaves_of(params, case.family)
        np.testing.assert_array_equal(head, embedding.T)
    factors = adapted.adapters["lora"][case.family.table]
    delta = 2.0 * np.asarray(factors["lora_a"], np.float64) @ np.asarray(factors["lora_b"])
    assert far(np.asarray(merged, np.float64) - np.asarray(table, np.float64), delta) < 1e-5


def leaves_of(params: Any, family: Any) -> tuple[Any, Any]:
    leaves = traverse_util.flatten_dict(params, sep="/")
    return leaves[family.table], leaves[family.untied_head]


@pytest.mark.parametrize("name", UNTIED)
def test_config_that_denies_the_tie_leaves_two_leaves(name):
    case = build(name)
    untied = {"tie_word_embeddings": False, "vocab_size": case.model.config.vocab_size}
    assert tied_lora.find_ties(case.params, untied, sites=sites_of(name)) == []
    names = [case.family.table.split("/")[-2], "lm_head"]
    config = tied_lora.LoraConfig(r=2, target_modules=names)
    adapted = tied_lora.wrap(case.params, config, sites=sites_of(name), ties=untied)
    assert {g.key: g.shapes(a)["lora_a"][0] for g, a in adapted.plan.adapters()} == {
        case.family.table: 96,
        "lm_head/kernel": WIDTH,
    }
