"""Plan: interned, hashable, JSON, pickling; axes and shapes of the factors."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import json
import pickle
import sys
import threading

import jax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import AdapterPlan, GroupPlan, LoraConfig, Member, Plan, SiteFilter, TieGroup
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, wrapped

CONFIG = LoraConfig(r=2, target_modules=["embed"], rank_pattern={"a": 3})
LORA = AdapterPlan("lora", "embed/embedding", rank=2, module="embed", targets=("embed",))
ROWS = AdapterPlan("trainable_tokens", "embed/embedding", tokens=(3, 1, 7))
TABLE = GroupPlan(
    (Member("embed/embedding"), Member("lm_head/kernel", True)), ("declared",), (12, 8), "float32",
    rows=(0,), cols=(1,), is_table=True, adapters=(LORA, ROWS),
)  # fmt: skip
DORA = AdapterPlan("lora", "layers/q/kernel", rank=3, dora=True, residual=True)
STACKED = GroupPlan(
    (Member("layers/q/kernel"),), (), (3, 8, 2, 4), "bfloat16", rows=(1,), cols=(2, 3), batch=(0,),
    adapters=(DORA,),
)  # fmt: skip
COPY = AdapterPlan("modules_to_save", "head/kernel")
OWN = AdapterPlan(
    "modules_to_save", "head/kernel:lm_head", "lm_head", ("other/kernel",),
    SiteFilter("projection", "decoder", (SiteFilter(scope="encoder/shared"),)),
)  # fmt: skip
OUTPUT_ROWS = AdapterPlan("trainable_tokens", "head/kernel", tokens=(5,))
HEAD = GroupPlan(
    (Member("head/kernel"), Member("other/kernel")), ("declared",), (8, 12), "float32", rows=(0,),
    cols=(1,), adapters=(COPY, OWN, OUTPUT_ROWS),
)  # fmt: skip
TIED_ONLY = GroupPlan((Member("a"), Member("b")), ("same array",), (8, 8), "float32")
GROUPS = (TABLE, STACKED, TIED_ONLY, HEAD)


def test_equal_plans_are_one_object():
    plan = Plan.of(GROUPS, CONFIG)
    same = Plan.of(tuple(GROUPS), LoraConfig.from_dict(CONFIG.to_dict()))
    assert same is plan
    assert hash(same) == hash(plan)
    assert Plan.of(GROUPS[:1], CONFIG) is not plan
    assert Plan.of(GROUPS, LoraConfig(r=2, target_modules=["embed"])) != plan


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda plan: pickle.loads(pickle.dumps(plan)),
        lambda plan: Plan.from_json(plan.to_json()),
        lambda plan: Plan.from_json(json.dumps(json.loads(plan.to_json()))),
    ],
)
def test_copies_are_the_same_object(again):
    plan = Plan.of(GROUPS, CONFIG)
    assert again(plan) is plan


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"format": 1}', '{"format": 2, "groups": [], "config": {}}',
             '{"format": 1, "groups": [{}], "config": {}}',
             Plan.of((HEAD,), CONFIG).to_json().replace('"trainable_tokens"', '"prompts"'),
             '{"format": 1, "groups": [], "config": {"rank": 1}}']
)  # fmt: skip
def test_json_of_something_else(text):
    with pytest.raises(ValueError, match="not the JSON of a plan"):
        Plan.from_json(text)


def test_shapes_of_adapters():
    assert TABLE.shapes(LORA) == {"lora_a": (12, 2), "lora_b": (2, 8)}
    assert TABLE.shapes(ROWS) == {"": (3, 8)}
    assert STACKED.shapes(DORA) == {
        "lora_a": (3, 8, 3), "lora_b": (3, 3, 2, 4), "lora_magnitude": (3, 2, 4)
    }  # fmt: skip
    assert HEAD.shapes(COPY) == {"": (8, 12)}
    assert HEAD.shapes(OUTPUT_ROWS) == {"": (1, 8)}  # rows are first, wherever tokens are
    assert [STACKED.size(DORA), HEAD.size(COPY), TABLE.size(ROWS)] == [168, 96, 24]


def test_separate_adapters_of_a_group():
    assert HEAD.separate == (OWN,)
    assert not OWN.covers("head/kernel")
    assert COPY.covers("head/kernel")
    assert COPY.covers("other/kernel")


@pytest.mark.parametrize(
    ("adapter", "text"),
    [(LORA, "LoRA, rank 2"), (DORA, "DoRA, rank 3"), (ROWS, "3 rows"), (COPY, "full copy"),
     (OWN, "full copy (lm_head only)"), (AdapterPlan("bias", "a/bias"), "bias")],
)  # fmt: skip
def test_adapters_print_what_they_are(adapter, text):
    assert str(adapter) == text


def test_a_member_that_is_transposed_has_its_axes_turned():
    info = TABLE.info(TABLE.members[1])
    assert (info.rows, info.batch, info.is_table) == ((1,), (), True)


def test_groups_of_a_plan():
    plan = Plan.of(GROUPS, CONFIG)
    assert plan.adapted == (TABLE, STACKED, HEAD)
    assert TABLE.key == "embed/embedding"
    assert TABLE.tie() == TieGroup(TABLE.members, ("declared",))
    assert "4 groups" in repr(plan)
    assert [a for _, a in plan.adapters("lora")] == [LORA, DORA]
    assert [g.key for g, _ in plan.adapters()] == [
        *["embed/embedding"] * 2, "layers/q/kernel", *["head/kernel"] * 3
    ]  # fmt: skip
    assert "target_modules=('embed',)" in repr(plan)


def test_wrap_interns_its_plan():
    params = init(TiedLM())
    first, second = (wrapped(params, ["embed_tokens", "up"], seed=s) for s in (1, 2))
    assert first.plan is second.plan
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert wrapped(params, ["embed_tokens"]).plan is not first.plan


def test_plan_of_a_wrapped_model_round_trips():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    plan = wrapped(params, "all-linear", sites=sites).plan
    assert Plan.from_json(plan.to_json()) is plan
    assert pickle.loads(pickle.dumps(plan)) is plan


def test_threads_that_make_equal_plans_get_one_object():
    interval, rounds = sys.getswitchinterval(), 100
    sys.setswitchinterval(1e-5)
    try:
        for alpha in range(1, rounds):
            config, barrier = LoraConfig(r=2, lora_alpha=alpha), threading.Barrier(8)

            def make(_, config=config, barrier=barrier):
                barrier.wait()
                return Plan.of(GROUPS, config)

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                first, *others = pool.map(make, range(8))
            assert all(plan is first for plan in others)
    finally:
        sys.setswitchinterval(interval)


def test_plans_that_nothing_holds_leave_nothing_behind():
    def allocated():
        gc.collect()
        return sys.getallocatedblocks()

    def make(count):
        for alpha in range(1, count):
            Plan.of(GROUPS, LoraConfig(r=2, lora_alpha=alpha))

    make(1000)
    before = allocated()
    make(1000)
    assert allocated() - before < 500
    plan = Plan.of(GROUPS, CONFIG)
    make(1000)
    assert Plan.of(GROUPS, CONFIG) is plan
