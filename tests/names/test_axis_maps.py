"""Maps of axes: what they do to one axis, that they are undone, and what has no inverse."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_tied_lora.names import (
    Interleaved,
    Offset,
    Padding,
    Permutation,
    Scale,
    from_state_dict,
    names_of,
    to_state_dict,
)
from tests.helpers.axis_maps import maps_of


class TestOneAxis:
    def test_what_each_map_does(self):
        x = np.arange(12.0).reshape(2, 6)
        np.testing.assert_array_equal(Scale(-2).to_torch(x, 1), -2 * x)
        np.testing.assert_array_equal(Scale(-2).from_torch(x, 1), x / -2)
        np.testing.assert_array_equal(Permutation((5, 4, 3, 2, 1, 0)).to_torch(x, 1), np.flip(x, 1))
        halves = Interleaved().to_torch(x, 1)
        np.testing.assert_array_equal(halves, np.concatenate([x[:, ::2], x[:, 1::2]], 1))
        np.testing.assert_array_equal(Interleaved(torch=True).to_torch(halves, 1), x)
        np.testing.assert_array_equal(Padding(2, 1).to_torch(x), x[:1])
        np.testing.assert_array_equal(Padding(2, 1).from_torch(x[:1]), [x[0], 0 * x[0]])
        np.testing.assert_array_equal(Padding(2, 3).to_torch(x), [*x, 0 * x[0]])
        np.testing.assert_array_equal(Padding(2, 3).from_torch(np.ones((3, 6))), np.ones((2, 6)))

    def test_an_offset(self):
        x = np.arange(3.0, dtype=np.float32)
        np.testing.assert_array_equal(Offset(-1).to_torch(x), x - 1)
        np.testing.assert_array_equal(Offset(-1).from_torch(x - 1), x)
        names = names_of(None, [("norm/scale", "norm.weight", None, None, {"d": Offset(-1.0)})])
        params = {"norm": {"scale": x}}
        state = to_state_dict(params, names)
        np.testing.assert_array_equal(state["norm.weight"], x - 1)
        back = from_state_dict(state, params, names)
        np.testing.assert_array_equal(back["norm"]["scale"], x)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            (("up/kernel", "up.weight", None, None, {"in": Offset(1.0)}), "found a matrix"),
            (("a/scale", "a.weight", None, None, {"d": (Scale(2.0), Offset(1.0))}), "only map"),
        ],
    )
    def test_an_offset_is_a_vector_s_and_alone(self, line, words):
        with pytest.raises(ValueError, match=words):
            names_of(None, [line])
        with pytest.raises(ValueError, match="expected a finite number"):
            Offset(math.inf)

    def test_several_heads_and_a_part_of_each(self):
        x = np.arange(12)
        np.testing.assert_array_equal(
            Interleaved(head_dim=6).to_torch(x), [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
        )
        np.testing.assert_array_equal(
            Interleaved(head_dim=6, rotary_dim=4).to_torch(x),
            [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11],
        )

    @given(st.data())
    def test_to_and_fro(self, data):
        size = data.draw(st.integers(1, 8))
        x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
        for axis_map in maps_of(data, size):
            there = axis_map.to_torch(x, 1)
            assert there.shape == (3, axis_map.torch_size(x.shape[1]))
            assert there.dtype == x.dtype
            kept = min(x.shape[1], there.shape[1])
            back = axis_map.from_torch(there, 1)
            np.testing.assert_allclose(back[:, :kept], x[:, :kept], 1e-6)
            assert not back[:, kept:].any()
            x = there

    def test_a_scale_is_rounded_once(self):
        x: Any = np.arange(1, 300).astype(ml_dtypes.bfloat16)
        by = math.sqrt(3)
        expected = (x.astype(np.float32) * np.float32(by)).astype(ml_dtypes.bfloat16)
        found = Scale(by).to_torch(x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, expected)
        assert (expected != x * ml_dtypes.bfloat16(by)).any()

    @pytest.mark.parametrize(
        ("kind", "arguments", "says"),
        [
            (Scale, [0], "Scale.0. has no inverse"),
            (Scale, [math.inf], "no inverse"),
            (Scale, [math.nan], "no inverse"),
            (Scale, [1e-50], "no inverse in float32"),
            (Scale, ["2"], "expected a number"),
            (Scale, [True], "expected a number"),
            (Permutation, [(0, 2)], "no inverse"),
            (Permutation, [(0, 0)], "no inverse"),
            (Permutation, [()], "no inverse"),
            (Permutation, [(0.5, 1)], "no inverse"),
            (Interleaved, [3], "head_dim=3; expected an even number"),
            (Interleaved, [-2], "expected an even number"),
            (Interleaved, [4, 3], "rotary_dim=3; expected an even"),
            (Interleaved, [4, 6], "no more than a head has"),
            (Padding, [0, 3], "leaf=0; expected a number above 0"),
            (Padding, [3, 2.0], "torch=2.0; expected a number above 0"),
        ],
    )
    def test_what_has_no_inverse_is_refused_when_it_is_made(self, kind, arguments, says):
        with pytest.raises(ValueError, match=says):
            kind(*arguments)


def table(*maps, axis="row"):
    return names_of(None, [("e/embedding", "e.weight", None, "embedding", {axis: maps})])


class TestLines:
    def test_maps_are_of_axes_of_the_layout(self):
        names = names_of(None, [
            ("q/kernel", "q.weight", "in heads dim -> (heads dim) in", None,
             {"dim": [Interleaved(), Scale(2.0)], "heads": Padding(4, 3)}),
            ("up/kernel", "up.weight", {"out": Scale(3.0)}),
        ])  # fmt: skip
        q = np.arange(5 * 4 * 6.0).reshape(5, 4, 6)
        params = {"q": {"kernel": q}, "up": {"kernel": np.ones((2, 3))}}
        state = to_state_dict(params, names)
        halves = np.concatenate([q[:, :3, ::2], q[:, :3, 1::2]], -1)
        np.testing.assert_array_equal(state["q.weight"], 2 * halves.reshape(5, 18).T)
        np.testing.assert_array_equal(state["up.weight"], 3 * np.ones((3, 2)))
        back = from_state_dict(state, params, names)
        np.testing.assert_array_equal(back["q"]["kernel"][:, :3], q[:, :3])
        assert not back["q"]["kernel"][:, 3].any()
        (weight,) = names.to_torch("q/kernel", q.shape)
        assert weight.shape(q.shape) == (18, 5)
        assert weight.factor == 2
        assert hash(names) == hash(names)

    def test_tied_names_have_the_maps_of_the_leaf(self):
        names = names_of(
            None, [("e/embedding", "e.weight", {"row": Padding(4, 3)})],
            tied={"e/embedding": ["lm_head"]},
        )  # fmt: skip
        assert names.to_flax("lm_head.weight")[1].maps == ((0, Padding(4, 3)),)
        state = to_state_dict({"e": {"embedding": np.ones((4, 2))}}, names, duplicates=True)
        assert {name: x.shape for name, x in state.items()} == {
            "e.weight": (3, 2), "lm_head.weight": (3, 2),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ({"rows": Scale(2.0)}, "'rows', which is no axis of the leaf; .*'row', 'column'"),
            ({"row": 2.0}, "map of 'row' is 2.0; expected Scale"),
            ({"row": (Scale(2.0), "x")}, "map of 'row' is 'x'"),
        ],
    )
    def test_a_wrong_line_is_explained(self, line, says):
        with pytest.raises(ValueError, match=f"table of names, line .*{says}"):
            names_of(None, [("e/embedding", "e.weight", line)])

    @pytest.mark.parametrize(
        ("axis_map", "says"),
        [
            (Padding(8, 6), r"Padding.leaf=8, torch=6. is not for 4 entries"),
            (Permutation((0, 1, 2)), "a Permutation of 3 is not for 4 entries"),
            (Interleaved(head_dim=8), "Interleaved.*is not for 4 entries"),
            (Interleaved(rotary_dim=6), "Interleaved.*is not for 4 entries"),
        ],
    )
    def test_a_leaf_of_another_size_is_refused(self, axis_map, says):
        with pytest.raises(ValueError, match=rf"e.weight of a Flax leaf \[4, 2\]: {says}"):
            table(axis_map).to_torch("e/embedding", (4, 2))

    def test_integers_are_not_scaled(self):
        with pytest.raises(ValueError, match=r"e.weight has a Scale.*int32"):
            to_state_dict({"e": {"embedding": np.ones((4, 2), np.int32)}}, table(Scale(2.0)))
