"""Tables of names: each line asked in both directions, and which lines are refused."""

from __future__ import annotations

import numpy as np
import pytest
from flax import traverse_util

from flax_tied_lora.names import UnmappedError, from_state_dict, names_of, to_state_dict
from tests.helpers.name_tables import OWN, SHAPES, assert_same, own


class TestTables:
    def test_each_leaf_there_and_back(self):
        names = own()
        for path, shape in SHAPES.items():
            for weight in names.to_torch(path, shape):
                assert names.to_flax(weight.name) == (path, weight)

    def test_numbers_of_paths_are_kept_as_they_are_written(self):
        names = own()
        (weight,) = names.to_torch("block_007/mlp/up/bias", 1)
        assert weight.name == "model.layers.007.mlp.up_proj.bias"
        assert names.to_flax(weight.name)[0] == "block_007/mlp/up/bias"
        with pytest.raises(UnmappedError):
            names.to_flax("moe.3.experts.01.w.weight")

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("x/kernel", "is no line"),
            (("x/kernel",), "is no line"),
            (("x/kernel", 3), "is no line"),
            (("x", "x.weight", "d -> d", "vector", "more"), "is no line"),
            (("x/{}/kernel", "x.weight"), "placeholder {} is on one side only"),
            (("x/kernel", "x.{}.weight"), "placeholder {} is on one side only"),
            (("x/{a}/kernel", "x.{b}.weight"), "placeholder {a} is on one side only"),
            (("x", "x.weight", "{e} d -> d"), "placeholder {e} is on one side only"),
            (("x/{e}", "x.{e}.weight", "{e} d -> d"), "{e} is in the path and in the layout"),
            (("x/{a}/{a}", "x.{a}.weight"), "must differ"),
            (("x/{_0}/kernel", "x.{_0}.weight"), "must differ and not begin with '_'"),
            (("x/{0}/kernel", "x.{0}.weight"), "has a brace that is no {}"),
            (("x/{/kernel", "x.weight"), "has a brace that is no {}"),
            (("x.kernel", "x/weight"), "expected a Flax path"),
            (("x//kernel", "x.weight"), "expected a Flax path"),
            (("", "x.weight"), "expected a Flax path"),
            (("x/kernel", ".weight"), "expected a Flax path"),
            (("x/kernel", "x.weight", None, "dense"), "kind 'dense' is not one of linear"),
            (("x/kernel", "x.weight", None, "vector"), "a vector parameter has 1 axes"),
            (("x", "x.weight", "a b c -> a b c", "linear"), "a linear parameter has 2 axes"),
        ],
    )
    def test_a_wrong_line_is_explained(self, line, says):
        with pytest.raises(ValueError, match="line") as error:
            names_of("gpt2", [line])
        assert says in str(error.value)

    def test_a_name_in_two_lines_is_an_error(self):
        with pytest.raises(ValueError, match=r"'x.weight' is in two lines"):
            names_of(None, [("x/kernel", "x.weight"), ("y/kernel", "x.weight")])

    def test_two_leaves_of_one_name_are_an_error(self):
        names = names_of("gpt2", [("wte2/embedding", "transformer.wte.weight")])
        table = np.zeros((3, 2), np.float32)
        params = {"wte2": {"embedding": table}, "transformer": {"wte": {"embedding": table}}}
        with pytest.raises(ValueError, match=r"both 'transformer/wte/embedding' and 'wte2/emb"):
            to_state_dict(params, names)

    def test_lines_of_the_user_go_before_the_family_s(self):
        extra = [("transformer/h/{}/attn/c_attn/kernel", "h.{}.qkv.weight", "i o -> o i")]
        names = names_of("gpt2", extra)
        (weight,) = names.to_torch("transformer/h/3/attn/c_attn/kernel", (4, 12))
        assert (weight.name, weight.kind) == ("h.3.qkv.weight", "matrix")
        assert names.to_flax("h.3.qkv.weight")[0] == "transformer/h/3/attn/c_attn/kernel"
        (bias,) = names.to_torch("transformer/h/3/attn/c_attn/bias", 1)
        assert bias.name == "transformer.h.3.attn.c_attn.bias"

    def test_hashable_and_equal_by_value(self):
        assert names_of("gpt2") == names_of({"model_type": "gpt2"})
        assert len({own(), own(), names_of("gpt2"), names_of("opt")}) == 3
        assert repr(names_of(None, OWN)) == "Names('own', 12 lines)"

    @pytest.mark.parametrize(
        ("path", "shape", "line"),
        [
            ("h/0/mlp/kernel", (2, 3), ("h/{}/mlp/kernel", "h.{}.mlp.weight")),
            ("h/0/ln/scale", (2,), ("h/{}/ln/scale", "h.{}.ln.weight")),
            ("h_2/x/embedding", (5, 2), ("h_{}/x/embedding", "h_{}.x.weight")),
            (
                "a/q/w", (4, 2, 3),
                ("a/q/w", "a.q.weight", "axis0 axis1 axis2 -> (axis1 axis2) axis0"),
            ),
            ("a/mask", (4, 2), ("a/mask", "a.mask", "axis0 axis1 -> axis0 axis1")),
            ("alpha", (), ("alpha", "alpha", " -> ")),
        ],
    )  # fmt: skip
    def test_the_error_shows_a_line_that_works(self, path, shape, line):
        names = names_of("gpt2")
        with pytest.raises(UnmappedError) as error:
            names.to_torch(path, shape)
        assert str(error.value).startswith(f"leaf {path!r} {list(shape)} has no PyTorch name")
        assert f"extra=[{line!r}]" in str(error.value)
        leaf = np.arange(np.prod(shape)).reshape(shape)
        params = traverse_util.unflatten_dict({path: leaf}, sep="/")
        added = names_of("gpt2", [line])
        assert_same(from_state_dict(to_state_dict(params, added), params, added), params)

    def test_the_error_for_a_name_shows_a_line_that_works(self):
        with pytest.raises(UnmappedError) as error:
            names_of("gpt2").to_flax("transformer.h.4.attn.c_atn.weight")
        line = ("transformer/h/{}/attn/c_atn/kernel", "transformer.h.{}.attn.c_atn.weight")
        assert f"extra=[{line!r}]" in str(error.value)
        assert names_of("gpt2", [line]).to_flax("transformer.h.4.attn.c_atn.weight")
        with pytest.raises(KeyError, match=r"The table has 'model.layers.{}.mlp.up_proj.weight'"):
            own().to_flax("model.up_proj.weight")

    def test_a_leaf_of_another_number_of_axes(self):
        with pytest.raises(ValueError, match=r"\[4, 2, 3\] does not have the 2 axes of its line"):
            own().to_torch("block_0/mlp/up/kernel", (4, 2, 3))
        with pytest.raises(ValueError, match="of 1 axes does not have the 4 axes of its line"):
            own().to_torch("block_0/attn/kv", 1)

    def test_slices_must_be_the_whole_leaf(self):
        with pytest.raises(ValueError, match=r"'block_0/attn/kv' \[3, 4, 2, 3\] is not covered"):
            own().to_torch("block_0/attn/kv", (3, 4, 2, 3))
        with pytest.raises(ValueError, match="one line for each index of axis 0"):
            own().to_torch("block_0/attn/kv", (1, 4, 2, 3))
        mixed = [("x", "k.weight", "0 a b -> a b"), ("x", "v.weight", "a 1 b -> a b")]
        with pytest.raises(ValueError, match="is not covered once"):
            names_of(None, mixed).to_torch("x", (2, 2, 2))

    def test_slices_by_number_need_the_shape(self):
        assert len(own().to_torch("experts/3/w", (4, 12, 5))) == 12
        with pytest.raises(ValueError, match="give to_torch its shape"):
            own().to_torch("experts/3/w", 3)
