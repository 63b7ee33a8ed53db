"""tunix's models as the modules they are: `tied_lora.nnx`, tunix's sampler and its trainer."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.rl.utils import is_sharing_backbone

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.libraries import comparing
from tests.libraries.comparing import LENGTH, TOKENS, far, loss_of
from tests.libraries.tunix_models import (
    FAMILIES,
    LAYERS,
    base_rollout,
    build,
    grpo_learner,
    peft_trainer,
    rl_cluster,
    sampler,
)

# tunix 0.1.7 reads `Variable.value`, which Flax 0.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
POSITIONS = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
MASK = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (len(TOKENS), LENGTH, LENGTH))
CALL = (TOKENS, POSITIONS, None, MASK)


def wrapped(name: str, remat: str = "NONE") -> Any:
    """Returns a module adapted at the table and every projection, with deltas that are not zero."""
    case = build(name, remat)
    config = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=case.family.targets)
    sites = tied_lora.nnx.trace(case.model, *CALL)
    adapted = tied_lora.nnx.wrap(case.model, config, sites=sites)
    numbers = np.random.default_rng(2)
    factors = nnx.state(adapted, nnx.LoRAParam)
    nnx.update(
        adapted,
        jax.tree.map(lambda x: jnp.asarray(0.2 * numbers.standard_normal(x.shape)), factors),
    )
    return adapted


@nnx.jit
def logits_of(model: Any) -> Any:
    return model(*CALL)[0]


@comparing.each_of(FAMILIES, quick=["gemma2 fused"])
def test_called_like_the_model(name):
    adapted = wrapped(name)
    tied_lora.nnx.explain(adapted, *CALL).assert_tied()
    assert adapted.config == build(name).model.config
    expected = logits_of(tied_lora.nnx.merge(adapted))
    assert far(logits_of(adapted), expected) < 1e-5
    assert far(logits_of(tied_lora.nnx.base(adapted)), expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "remat"),
    [("qwen3", "NONE"), pytest.param("gemma3", "DECODER", marks=pytest.mark.slow)],
)
def test_trained_as_nnx_trains(name, remat):
    """The loop that people write; its gradients are those of the merged model."""
    adapted = wrapped(name, remat)
    frozen = jax.tree.map(np.asarray, tied_lora.nnx.params(adapted))
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.LoRAParam)
    of_factors = nnx.DiffState(0, nnx.LoRAParam)

    def loss(model: Any) -> Any:
        return loss_of(model(*CALL)[0], TOKENS)

    def merged_loss(model: Any) -> Any:
        return loss(tied_lora.nnx.merge(model))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(loss, argnums=of_factors)(model)
        optimizer.update(model, grads)
        return value, grads

    expected, expected_grads = nnx.jit(nnx.value_and_grad(merged_loss, argnums=of_factors))(adapted)
    value, grads = step(adapted, optimizer)
    assert far(value, expected) < 1e-5
    worst = jax.tree.map(far, grads, expected_grads)
    assert max(jax.tree.leaves(worst)) < 1e-5, worst
    losses = [float(step(adapted, optimizer)[0]) for _ in range(5)]
    assert losses[-1] < value - 0.05
    jax.tree.map(np.testing.assert_array_equal, tied_lora.nnx.params(adapted), frozen)


def test_trained_by_tunix(tmp_path):
    """`PeftTrainer` finds the `nnx.LoRAParam`s, trains them alone and saves them alone."""
    adapted = wrapped("qwen3")
    frozen = jax.tree.map(np.asarray, tied_lora.nnx.params(adapted))
    before = jax.tree.map(np.asarray, tied_lora.nnx.adapted(adapted).adapters)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=4, checkpoint_root_directory=str(tmp_path)
    )
    trainer = peft_trainer.PeftTrainer(adapted, optax.sgd(0.1), config).with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": POSITIONS,
            "attention_mask": MASK,
        }
    )
    first = loss_of(logits_of(adapted), TOKENS)
    data = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS, bool))
    trainer.train([data] * 4)
    trainer.close()
    assert trainer.train_steps == 4
    assert loss_of(logits_of(adapted), TOKENS) < first
    jax.tree.map(np.testing.assert_array_equal, tied_lora.nnx.params(adapted), frozen)
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before, tied_lora.nnx.adapted(adapted).adapters
    )
    assert all(jax.tree.leaves(changed))

    # What it saved are the factors alone, and a new run goes on from them.
    fresh = wrapped("qwen3")
    again = peft_trainer.PeftTrainer(fresh, optax.sgd(0.1), config)
    again.close()
    assert again.train_steps == 4
    jax.tree.map(
        np.testing.assert_array_equal,
        tied_lora.nnx.adapted(fresh).adapters,
        tied_lora.nnx.adapted(adapted).adapters,
    )


class Letters:
    """A tokenizer of single letters, as tunix's sampler takes it."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_sampled_by_tunix(name):
    """tunix's `Sampler`, with its cache and its loop: the tokens of the merged model."""
    adapted, fields = wrapped(name), FAMILIES[name].fields

    def sampled(model: Any) -> list[Any]:
        cache = sampler.CacheConfig(32, LAYERS, fields["num_kv_heads"], fields["head_dim"])
        sample = sampler.Sampler(model, Letters(), cache)
        output = sample(["abc", "fedcb"], max_generation_steps=5, eos_tokens=[-1])
        return [np.asarray(tokens).tolist() for tokens in output.tokens]

    found = sampled(adapted)
    assert [len(tokens) for tokens in found] == [5, 5]
    assert found == sampled(tied_lora.nnx.merge(adapted))
    assert found != sampled(tied_lora.nnx.base(adapted))


def test_trained_by_grpo(promotion_in_threads, caplog):
    """tunix's `RLCluster`: an actor that shares its backbone with the reference, and a step."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    adapted = wrapped("qwen3")
    nnx.update(adapted, jax.device_put(nnx.state(adapted), jax.NamedSharding(mesh, jax.P())))
    expected = logits_of(tied_lora.nnx.base(adapted))
    reference = tied_lora.nnx.base(adapted)
    assert is_sharing_backbone(reference, adapted)
    frozen = jax.tree.map(np.asarray, tied_lora.nnx.params(adapted))
    before = jax.tree.map(np.asarray, tied_lora.nnx.adapted(adapted).adapters)

    role = rl_cluster.Role
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.sgd(0.1), max_steps=1, eval_every_n_steps=100
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=4, max_prompt_length=4, kv_cache_size=16
        ),
    )

    def variety(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(len(set(c.split()))) for c in completions]

    with flax.config.temp_flip_flag("always_shard_variable", False):  # as tunix sets it
        cluster = rl_cluster.RLCluster(
            actor=adapted, reference=reference, tokenizer=Letters(), cluster_config=config
        )
        algorithm = grpo_learner.GRPOConfig(num_generations=2)
        learner = grpo_learner.GRPOLearner(cluster, algorithm, reward_fns=variety)
        learner.train([{"prompts": np.array(["abc", "fed"])}])
    assert "do not share" not in caplog.text  # the backbone: it would be copied
    assert cluster.actor_trainer.train_steps == 1
    assert cluster.actor_trainer.model is adapted
    after = tied_lora.nnx.adapted(adapted).adapters
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert any(jax.tree.leaves(changed))
    jax.tree.map(np.testing.assert_array_equal, tied_lora.nnx.params(adapted), frozen)
    assert far(logits_of(cluster.inference_worker.get_model("reference")), expected) < 1e-5
    assert far(logits_of(cluster.rollout.model()), logits_of(adapted)) < 1e-5
