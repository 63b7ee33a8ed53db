"""Some of a weight's call sites: by role, by module scope, or both."""

from __future__ import annotations

import pytest

from flax_tied_lora import SiteFilter


@pytest.mark.parametrize(
    "scope",
    ["T/T.encode/encoder/shared", "T.encode/encoder/shared", "T/T.a/T.b/encoder/encoder.c/shared"],
)
def test_a_method_that_a_module_calls_of_itself_is_no_module(scope):
    assert SiteFilter(scope="T/encoder/shared")("lookup", scope)
    assert not SiteFilter(scope="T/T/encoder")("lookup", scope)
    assert SiteFilter(scope="a/a")("lookup", "T/a/a")  # a child of its parent's name


def test_role_and_scope_are_both_asked():
    assert SiteFilter()("lookup", "anywhere")
    assert SiteFilter(role="lookup")("lookup", "T/a")
    assert not SiteFilter(role="lookup")("projection", "T/a")
    both = SiteFilter(role="lookup", scope="a")
    assert both("lookup", "T/a/b")
    assert not both("lookup", "T/ab")
    assert not both("projection", "T/a")


def test_all_but_others():
    rest = SiteFilter(others=(SiteFilter(role="lookup"), SiteFilter(scope="head")))
    assert rest("projection", "T/body")
    assert not rest("lookup", "T/body")
    assert not rest("projection", "T/head")
