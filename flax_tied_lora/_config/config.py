"""What to adapt and how: `LoraConfig`, with PEFT's field names, defaults and meanings.

Names and meanings are those of PEFT 0.21.2 (``peft.LoraConfig``), so that people bring what they
know and ``adapter_config.json`` can be read and written. A config is frozen and hashable, so it can
be static data of a compiled function, and it is checked when it is made: every error names the
field. What PEFT has and this library does not carry out is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from flax_tied_lora._config import as_dict
from flax_tied_lora._config import axes_and_parts as own
from flax_tied_lora._config import checks as check
from flax_tied_lora._config.checks import Bias, Initialisation, TaskType
from flax_tied_lora._config.keywords import with_hints
from flax_tied_lora._config.patterns import FrozenMapping

_EMPTY: FrozenMapping[Any] = FrozenMapping()
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "r": check.positive_int,
    "lora_alpha": check.positive,
    "lora_dropout": check.probability,
    **dict.fromkeys(("use_rslora", "inference_mode", "use_dora"), check.boolean),
    "fan_in_fan_out": check.boolean,
    "task_type": check.task_type,
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), check.text),
    **dict.fromkeys(("target_modules", "exclude_modules"), check.names),
    "layers_pattern": check.layer_names,
    **dict.fromkeys(("modules_to_save", "target_parameters"), check.name_list),
    "trainable_token_indices": check.token_indices,
    "layers_to_transform": check.indices,
    "rank_pattern": lambda f, v: check.patterns(f, v, check.positive_int),
    "alpha_pattern": lambda f, v: check.patterns(f, v, check.positive),
    "auto_mapping": lambda f, v: None if v is None else check.mapping(f, v, check.text),
    "axes": own.axes,
    "parts": own.parts,
    "peft_type": lambda f, v: check.one_of(f, "LORA" if v is None else v, ["LORA"]),
    "bias": lambda f, v: check.one_of(f, v, get_args(Bias)),
    "init_lora_weights": check.initialisation,
    "ensure_weight_tying": lambda f, v: check.one_of(f, v, [None, True, False]),
}


@with_hints
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig:
    """What to adapt and how, in PEFT's words; frozen, hashable, checked when it is made.

    Lists are stored as tuples (sets are sorted first), dicts as ordered, hashable mappings.

    Args:
        r: Rank of the factors, an int above 0. Default 8.
        lora_alpha: Numerator of the scaling, a finite number above 0. Default 8.
        use_rslora: False (default): scaling is ``alpha / r``. True: ``alpha / sqrt(r)``
            (rank-stabilised LoRA, arXiv:2312.03732).
        target_modules: What to adapt: a list of names, each a whole path or its last parts; or one
            regex that must match a whole path; or ``"all-linear"``. An empty list: nothing, where
            another field says what to train. Default None (PEFT then goes by architecture; `wrap`
            asks for names, unless another field says what to train).
        exclude_modules: What to leave out, as a list or a regex in the same way. Default None.
        layers_to_transform: Layer index or indices (from 0) to adapt; only with a list of
            `target_modules`. Default None: all layers.
        layers_pattern: Name or names of the list of layers that those indices count in
            (``"layers"``, ``"h"``); only with `layers_to_transform`. Default None: any.
        rank_pattern: Module name or regex -> rank, where it differs from `r`; the first match
            wins. Default {}.
        alpha_pattern: The same for `lora_alpha`. Default {}.
        lora_dropout: Probability in [0, 1) of dropping an input of the factors while training.
            Default 0.0.
        target_parameters: Names of single parameters to adapt, each a whole path or its last parts
            (``"experts.gate_up_proj"``), for weights that are no module's kernel; no regexes. Not
            with `lora_dropout`, `use_dora` or `fan_in_fan_out`. Default None.
        init_lora_weights: How the factors start. True (default): the delta is zero. False: both
            factors random, for debugging. ``"gaussian"``: the random factor is normal with
            deviation 1 / r. ``"pissa"`` (arXiv:2404.02948): the r largest singular directions of
            the weight, which are taken out of the frozen weight; ``"pissa_niter_<k>"``: the same by
            a fast SVD of k subspace iterations. ``"olora"`` (arXiv:2406.01775): from the weight's
            QR decomposition, taken out likewise. ``"orthogonal"``: orthogonal to each other, so
            that the delta is zero; the rank must be even.
        use_dora: Whether to learn the magnitude of each column of a weight on its own and the
            direction by the factors (DoRA, arXiv:2402.09353). Default False.
        bias: Which biases are trained: ``"none"`` (default); ``"all"`` of the model;
            ``"lora_only"``: those of the adapted modules.
        fan_in_fan_out: PEFT's word for kernels stored as [in, out], as GPT-2's are in PyTorch;
            kept for PEFT. Nothing here depends on it: the model says which axis is which.
        modules_to_save: Names of modules to train in full, as a copy of the weight: one for all
            members of a tie group, unless `ensure_weight_tying` is False. A list, never a regex; a
            name means every module whose path ends with it, so that ``"norm"`` is
            ``"input_layernorm"``, too. Default None.
        trainable_token_indices: Token ids whose rows are trained, and no others: a list, for the
            input embedding; or a dict from a table's name to its list. Default None.
        ensure_weight_tying: Adapters of tied weights. None (default) ties what is tied and says
            nothing. True and False do what they do in PEFT, with its warnings and errors: True
            ties, False gives each name that is targeted an adapter of its own.
        task_type: One of PEFT's task types; kept as written, like the next five. Default None.
        base_model_name_or_path: Name of the base model. Default None.
        revision: Its version. Default None.
        inference_mode: Whether PEFT should load the adapter frozen. Default False.
        peft_version: PEFT's version that wrote the file. Default None.
        auto_mapping: PEFT's record of the base model's class. Default None.
        peft_type: ``"LORA"``, and nothing else.
        axes: Module or leaf name, or regex -> ``(rows, columns)`` of its leaf, each an axis or a
            list of axes, where a trace is not to say; axes in neither are batch axes, with factors
            for each entry. Not PEFT's, as `parts`; in `to_dict` under a key of our own. Default {}.
        parts: Module or leaf name, or regex -> ``(axis, names)`` of the parts of a fused kernel
            along an axis, of one size, or ``(axis, {name: size})``. Each part gets factors of its
            own; targets, exclusions and patterns name one as ``"qkv_proj:q"``. Default {}.

    PEFT's other fields are no parameters. In a file or a dict (`from_json`, `from_dict`,
    `peft.load_adapter`) they may have PEFT's default, and are refused by name otherwise.

    Raises:
        TypeError: An unknown field (close names are listed), a positional argument, a wrong type.
        ValueError: A value out of range, an invalid regex, fields that contradict each other.
        NotImplementedError: A value of PEFT's that this version does not carry out.

    Example:
        >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["embed_tokens", "q_proj"])
        >>> config
        LoraConfig(r=8, lora_alpha=16, target_modules=('embed_tokens', 'q_proj'))
        >>> config.scaling_for("model/layers/0/q_proj")
        2.0
        >>> LoraConfig.from_json(config.to_json()) == config
        True
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: Initialisation = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    rank_pattern: Mapping[str, int] = _EMPTY
    alpha_pattern: Mapping[str, float] = _EMPTY
    target_parameters: Collection[str] | None = None
    use_dora: bool = False
    bias: Bias = "none"
    fan_in_fan_out: bool = False
    modules_to_save: Collection[str] | None = None
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    ensure_weight_tying: bool | None = None
    peft_type: Literal["LORA"] = "LORA"
    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    peft_version: str | None = None
    auto_mapping: Mapping[str, str | None] | None = None
    axes: Mapping[str, Sequence[own.Axes]] = _EMPTY
    parts: Mapping[str, tuple[int, own.PartNames]] = _EMPTY

    def __post_init__(self) -> None:
        """Checks every field and stores it in its hashable form."""
        for field, convert in _CHECKS.items():
            value = getattr(self, field)
            if isinstance(value, enum.Enum):  # PEFT's TaskType and PeftType are str enums
                value = value.value
            object.__setattr__(self, field, convert(field, value))
        refuse_contradictions(self)

    def rank_for(self, path: str) -> int:
        """Returns the rank for a module: `rank_pattern`'s first match, or `r`.

        Args:
            path: Module path, joined by "/" or by ".", as ``model/layers/0/q_proj``; with
                ``:<part>`` for a part, to which the module's value goes down.
        """
        return own.value_for(self.rank_pattern, path, self.r)

    def alpha_for(self, path: str) -> float:
        """Returns alpha for a module: `alpha_pattern`'s first match, or `lora_alpha`."""
        return float(own.value_for(self.alpha_pattern, path, self.lora_alpha))

    def scaling_for(self, path: str) -> float:
        """Returns the factor before ``lora_a @ lora_b``: alpha / r; for rsLoRA alpha / sqrt(r)."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain Python values, under the keys of ``adapter_config.json``."""
        return as_dict.to_dict(self)

    def to_json(self) -> str:
        """Returns the text of ``adapter_config.json``: fields sorted, patterns in their order."""
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoraConfig:
        """Returns the config with these fields, defaults for the rest; the inverse of `to_dict`.

        Raises:
            TypeError: Not a mapping; and all that `LoraConfig` raises.
            ValueError: A regex may take hours to match; `LoraConfig` itself takes it, as PEFT.
            NotImplementedError: A field that only PEFT has is not at PEFT's default.
        """
        return cls(**as_dict.from_others(fields))

    @classmethod
    def from_json(cls, text: str) -> LoraConfig:
        """Returns the config in a JSON text; the inverse of `to_json`.

        Raises:
            ValueError: Not JSON; and all that `from_dict` raises.
        """
        return cls.from_dict(as_dict.from_json(text))

    def __repr__(self) -> str:
        """Shows `r`, `lora_alpha`, `target_modules`, and whatever is not at its default."""
        always = ("r", "lora_alpha", "target_modules")
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name in always or getattr(self, f.name) != f.default
        ]
        return f"LoraConfig({', '.join(shown)})"


def refuse_contradictions(config: LoraConfig) -> None:
    """Raises a ValueError where two checked fields cannot both hold."""
    _refuse_no_targets(config)
    _refuse_layers_of_a_regex(config)
    _refuse_named_twice(config)
    _refuse_odd_ranks(config)
    if config.target_parameters:
        for field in ("lora_dropout", "use_dora", "fan_in_fan_out"):
            if getattr(config, field):  # as PEFT's ParamWrapper
                raise ValueError(
                    f"LoraConfig: {field}={getattr(config, field)} does not go with "
                    f"target_parameters={config.target_parameters}, whose inputs nobody sees; "
                    "leave one of the two out"
                )


def _refuse_no_targets(config: LoraConfig) -> None:
    others = ("target_parameters", "modules_to_save", "trainable_token_indices")
    if config.target_modules == () and not any(getattr(config, name) for name in others):
        raise ValueError(
            "LoraConfig: target_modules is empty, so nothing would be adapted; list some names, or "
            f"give one of {', '.join(others)}"
        )


def _refuse_layers_of_a_regex(config: LoraConfig) -> None:
    for field in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, field) is not None:
            raise ValueError(
                f"LoraConfig: {field} needs target_modules as a list, found the string "
                f"{config.target_modules!r}; list the names, or put the layers into the regex"
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"LoraConfig: layers_pattern={config.layers_pattern!r} needs layers_to_transform, "
            "found None; say which layers, or leave layers_pattern out"
        )


def _refuse_named_twice(config: LoraConfig) -> None:
    excluded = set(check.as_tuple(config.exclude_modules))
    both = [t for t in check.as_tuple(config.target_modules) if t in excluded]
    if both:
        raise ValueError(
            f"LoraConfig: {', '.join(both)} named in both target_modules and exclude_modules; "
            "drop one of them"
        )
    tokens = config.trainable_token_indices
    saved = {_dotted(name) for name in config.modules_to_save or ()}
    tables = [str(name) for name in tokens] if isinstance(tokens, Mapping) else []
    both = [name for name in tables if _dotted(name) in saved]
    if both:
        raise ValueError(
            f"LoraConfig: {', '.join(both)} named in both trainable_token_indices and "
            "modules_to_save, which trains all of its rows already; drop one of them"
        )


def _refuse_odd_ranks(config: LoraConfig) -> None:
    if config.init_lora_weights != "orthogonal":
        return
    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    for field, rank in ranks.items():
        if rank % 2:
            raise ValueError(
                f"LoraConfig: {field}={rank} with init_lora_weights='orthogonal'; expected an even "
                f"rank, such as {rank + 1}: half of it goes to each factor"
            )


def _dotted(name: str) -> str:
    return name.replace("/", ".")
