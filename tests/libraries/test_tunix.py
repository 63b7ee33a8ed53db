"""tunix's families, taken apart by `nnx.split`: adapted beside merged."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import flax_tied_lora as tied_lora
from tests.libraries import comparing
from tests.libraries.comparing import TABLE, TOKENS, compiled, far
from tests.libraries.tunix_models import FAMILIES, build

# tunix 0.1.7 reads `Variable.value`, which Flax 0.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@functools.cache
def adapted_of(name: str) -> tied_lora.Adapted:
    """The table and every projection."""
    case = build(name)
    return comparing.wrapped(case.logits, case.state, case.family.targets, TOKENS)


each_family = pytest.mark.parametrize("name", FAMILIES)
# What is compiled: `make test` has one family of each layout, `make test-libraries` all.
each_compiled = comparing.each_of(FAMILIES, quick=["qwen3", "gemma2 fused"])


@each_family
def test_the_table_is_tied_with_nothing_declared(name):
    case = build(name)
    sites = tied_lora.trace(case.logits, case.state, TOKENS)
    assert [(s.role, s.rows, s.cols) for s in sites.of(TABLE)] == [
        ("lookup", (0,), (1,)),
        ("projection", (1,), (0,)),
    ]
    (group,) = (g for g in tied_lora.find_ties(case.state, sites=sites) if TABLE in g.paths)
    assert (group.key, group.paths, group.found) == (TABLE, (TABLE,), ("data flow",))


@each_family
@pytest.mark.parametrize("remat", ["NONE", "BLOCK", "DECODER"])
def test_explain_shows_every_site_as_low_rank(name, remat):
    case = build(name, remat)
    explanation = tied_lora.explain(case.logits, adapted_of(name), TOKENS)
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} == {"low rank"}
    assert [r.site.role for r in explanation.of(TABLE)] == ["lookup", "projection"]
    layers = case.family.fields["num_layers"]
    others = [r for r in explanation.reads if r.site.leaf != TABLE]
    assert {r.site.role for r in others} == {"projection"}
    assert {r.site.leaf for r in others} == {
        f"layers/{i}/{leaf}" for i in range(layers) for leaf in case.family.leaves
    }
    assert len(others) == layers * (case.family.reads or len(case.family.leaves))


@each_compiled
def test_logits_and_gradients_are_those_of_the_merged_model(name):
    comparing.assert_merged(build(name).logits, adapted_of(name), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("llama3", "DECODER"), ("gemma3", "BLOCK")])
def test_rematerialised_logits_and_gradients_are_those_of_the_merged_model(name, remat):
    case, adapted = build(name, remat), adapted_of(name)
    program = jax.make_jaxpr(tied_lora.adapt(case.logits))(adapted, TOKENS)
    assert "remat" in str(program) or "checkpoint" in str(program)
    comparing.assert_merged(case.logits, adapted, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "gemma2 fused"])
def test_bfloat16_logits_and_gradients_are_those_of_the_merged_model(name):
    case = build(name)
    comparing.assert_merged_in_bfloat16_of(case, case.state, TOKENS)


@each_compiled
def test_decodes_what_the_merged_model_decodes(name):
    comparing.assert_decodes_merged(build(name), adapted_of(name), TOKENS, 4)


@comparing.each_of(["qwen3", "gemma3"], quick=["gemma3"])
def test_params_sharded_as_tunix_says_stay_so(name):
    case, adapted = build(name), adapted_of(name)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
    specs = nnx.get_partition_spec(case.state)
    state = jax.device_put(case.state, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    assert len({x.sharding.spec for x in jax.tree.leaves(state)}) > 3
    sharded = comparing.wrapped(case.logits, state, case.family.targets, TOKENS)
    for x, y in zip(*map(jax.tree.leaves, (sharded.params, state)), strict=True):
        assert x.sharding == y.sharding
    with jax.set_mesh(mesh):
        found = compiled(tied_lora.adapt(case.logits, on_dense="error"))(sharded, TOKENS)
    assert far(found, compiled(case.logits)(tied_lora.merge(adapted), TOKENS)) < 1e-5
