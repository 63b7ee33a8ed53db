"""What compiled programs exchange on eight devices: an adapter adds nothing of the table's size."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from tests.helpers import meshes
from tests.helpers.collectives import Collective, collectives, moved
from tests.helpers.meshes import RANK, SHAPE

V, D = SHAPE.vocabulary, SHAPE.width
# Bytes of both factors, and of a number for each token and rank.
FACTORS, HIDDEN = 4 * RANK * (V + D), 4 * RANK * SHAPE.batch * SHAPE.length
# The table is used twice, each use gives a gradient of the factors that is summed over devices, and
# a sum sends its array twice. Beside them go the products with the factor that is met first.
OF_FACTORS, OF_HIDDEN = 4, 10


def step(
    layout: str, loss: Any, targets: list[str], on_dense: Any = "error", batch: int = SHAPE.batch
) -> Any:
    """Returns a compiled value and gradients, sharded as what they belong to is.

    The position embeddings are trained in any case, so that gradients go back to the table's rows.
    """
    mesh = meshes.mesh(layout)
    config = tied_lora.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=["c_attn", *targets], modules_to_save=["wpe"]
    )
    adapted = tied_lora.wrap(meshes.params(layout, mesh), config)
    apply = tied_lora.adapt(loss, on_dense=on_dense)

    def of(adapters: Any, frozen: Any, tokens: Any) -> Any:
        return apply(frozen.replace(adapters=adapters), tokens)

    shardings = jax.tree.map(lambda x: x.sharding, adapted.adapters)
    run = jax.jit(jax.value_and_grad(of), out_shardings=(None, shardings))
    return run.lower(adapted.adapters, adapted, meshes.tokens(mesh, batch)).compile()


def forward(layout: str, loss: Any, adapted: bool) -> Any:
    mesh = meshes.mesh(layout)
    params = meshes.params(layout, mesh)
    if not adapted:
        return jax.jit(loss).lower(params, meshes.tokens(mesh)).compile()
    config = tied_lora.LoraConfig(r=RANK, lora_alpha=8, target_modules=["wte"])
    run = jax.jit(tied_lora.adapt(loss, on_dense="error"))
    return run.lower(tied_lora.wrap(params, config), meshes.tokens(mesh)).compile()


def added(ours: Any, theirs: Any) -> list[Collective]:
    """Returns the collectives of one program that another does not have."""
    more = collections.Counter(collectives(ours)) - collections.Counter(collectives(theirs))
    return list(more.elements())


def too_large(new: list[Collective]) -> list[Collective]:
    return [c for c in new if c.size >= V * D / 8]


@pytest.mark.parametrize("loss", meshes.LOSSES)
@pytest.mark.parametrize("layout", meshes.LAYOUTS)
def test_a_training_step_exchanges_factors_and_nothing_of_the_tables_size(layout, loss):
    run = meshes.LOSSES[loss]
    theirs, ours = step(layout, run, []), step(layout, run, ["wte"])
    new = added(ours, theirs)
    assert not too_large(new)
    assert moved(ours) - moved(theirs) <= OF_FACTORS * FACTORS + OF_HIDDEN * HIDDEN, new


@pytest.mark.parametrize("loss", meshes.LOSSES)
def test_where_the_table_is_gathered_so_is_its_factor(loss):
    """FSDP, more tokens than rows of the table: nothing of the size of hidden states or logits."""
    batch, run = 240, meshes.LOSSES[loss]
    theirs, ours = (step("FSDP", run, targets, batch=batch) for targets in ([], ["wte"]))
    gathers = [
        [c for c in collectives(x) if c.kind == "all-gather" and {*c.shape} == {V, D}]
        for x in (theirs, ours)
    ]
    # A frozen table's transpose is gathered beside it; an adapted one is read as it is stored.
    assert gathers[1] != []
    assert not collections.Counter(gathers[1]) - collections.Counter(gathers[0])
    new, hidden = added(ours, theirs), 4 * RANK * batch * SHAPE.length
    assert not [c for c in new if c.size > RANK * V]
    assert moved(ours) - moved(theirs) <= 5 * FACTORS + 4 * hidden, new


@pytest.mark.parametrize("layout", meshes.LAYOUTS)
def test_a_forward_pass_exchanges_less_than_the_factors(layout):
    theirs, ours = (forward(layout, meshes.plain_logits, adapted) for adapted in (False, True))
    new = added(ours, theirs)
    assert not too_large(new)
    assert moved(ours) - moved(theirs) <= OF_HIDDEN * HIDDEN < FACTORS / 2, new


def test_a_table_that_is_added_up_would_show():
    def added_up(p: Any, tokens: Any) -> Any:
        table = jax.lax.optimization_barrier(jnp.sin(p["wte"]["embedding"]))
        return meshes.plain_logits({**p, "wte": {"embedding": table}}, tokens)

    args = "data parallel", added_up
    new = added(step(*args, ["wte"], on_dense="allow"), step(*args, []))
    assert too_large(new)


def test_what_the_parser_reads():
    text = """
%body (p: (f32[4])) -> (f32[4]) {
  %a = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
}
%wrapped (p: f32[16]) -> f32[4] {
  ROOT %d = bf16[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum
}
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %e = f32[] add(%a, %b)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (f32[4]) while(%t), condition=%sum, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = ((f32[16]), f32[4]) async-start(%p), calls=%wrapped
  %r = (f32[5]{0}, s32[2,2]{1,0}) all-reduce(%p, %q), replica_groups={{0,1}}, to_apply=%sum
  %n = f32[7]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%sum
  %x = f32[6]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""
    found = collectives(text)
    assert found == [
        Collective("all-reduce", "f32", (4, 8), 3), Collective("all-gather", "f32", (8,), 3),
        Collective("reduce-scatter", "bf16", (4, 4)), Collective("all-reduce", "f32", (5,)),
        Collective("all-reduce", "s32", (2, 2)), Collective("collective-permute", "f32", (6,)),
    ]  # fmt: skip
    assert moved(text) == 3 * (2 * 128 + 32) + 32 + 2 * 20 + 2 * 16 + 24
    with pytest.raises(ValueError, match="loop of unknown length"):
        collectives(text.replace("known_trip_count", "trips"))


def test_what_the_parser_reads_of_a_tpus_programs():
    """Loops of the partitioner's own, collectives in pieces, groups by the axes of a mesh."""
    text = """
%round (p: (f32[4], u32[], u32[])) -> (f32[4], u32[], u32[]) {
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two), metadata={}
  %g = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[4], u32[], u32[]) tuple(%g, %next, /*index=2*/%two)
}
%less (p: (f32[4], u32[], u32[])) -> pred[] {
  %last = u32[] constant(7), metadata={}
  %j = u32[]{:T(128)} get-tuple-element(%p), index=1, metadata={}
  ROOT %c = pred[] compare(%j, %last), direction=LT, metadata={}
}
%first (p: f32[4]) -> (f32[4], f32[32]) {
  %a = f32[32]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="0"}
  ROOT %s = (f32[4], f32[32]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}
%last_piece (p: f32[4]) -> f32[32] {
  %b = f32[32]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="0"}
  ROOT %d = f32[32]{0} custom-call(%b), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %one = u32[] constant(1)
  %start = u32[]{:T(128)} copy(%one)
  %t.1 = (f32[4], u32[], u32[]) tuple(%p, %start, /*index=2*/%one)
  %w = (f32[4], u32[], u32[]) while(%t.1), condition=%less, body=%round, metadata={}
  %f = (f32[4], f32[32]) fusion(%p), kind=kCustom, calls=%first
  %h = f32[32]{0} fusion(%p), kind=kCustom, calls=%last_piece
  %r = f32[3]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%sum
  %n = f32[7]{0} all-reduce(%p), replica_groups=mesh['a'=1,'b'=8] {'a'}, to_apply=%sum
}
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %e = f32[] add(%a, %b)
}
"""  # noqa: E501
    assert collectives(text) == [
        Collective("collective-permute", "f32", (8,), 3), Collective("all-gather", "f32", (32,)),
        Collective("reduce-scatter", "f32", (8, 3)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="loop of unknown length"):
        collectives(text.replace("direction=LT", "direction=NE"))
