import pytest

from dpocli.report.token_heatmap import HEAD_TOKENS, ExamplePairs, ExampleToken, Palette, colored, folded, strongest
from tests.support.reports import made_up_pair

PALETTE = Palette(strongest=2.0, has_reference=True)


@pytest.mark.parametrize(
    ("value", "color"),
    [(2.0, "u5"), (9.0, "u5"), (1.2, "u3"), (-1.2, "d3"), (-0.4, "d1"), (0.1, ""), (0.0, ""), (float("nan"), "")],
)
def test_colors_tell_direction_and_strength(value, color):
    assert PALETTE.color(ExampleToken("x", value, True)) == color


def test_tokens_that_do_not_count_are_pale_whatever_they_did():
    assert PALETTE.color(ExampleToken("x", 5.0, False)) == "off"


def test_log_probs_have_one_direction():
    assert Palette(2.0, has_reference=False).color(ExampleToken("x", -2.0, True)) == "s5"


def test_one_odd_token_does_not_pale_the_others():
    tokens = tuple(ExampleToken("x", 1.0, True) for _ in range(99))
    pair = made_up_pair(chosen=(*tokens, ExampleToken("odd", 500.0, True)), rejected=tokens)
    assert Palette.of(ExamplePairs((pair,), (), has_reference=True)).strongest == 1.0


def test_tokens_that_do_not_count_set_no_scale():
    tokens = (ExampleToken("x", 1.0, True), ExampleToken("y", 100.0, False), ExampleToken("z", float("nan"), True))
    pair = made_up_pair(chosen=tokens, rejected=())
    assert Palette.of(ExamplePairs((pair,), (), has_reference=True)).strongest == 1.0


def test_without_any_difference_there_are_no_colors():
    """The policy is its reference."""
    tokens = (ExampleToken("x", 0.0, True),)
    palette = Palette.of(ExamplePairs((made_up_pair(chosen=tokens, rejected=tokens),), (), has_reference=True))
    assert colored(tokens, palette).head == '<span title="+0">x</span>'
    assert palette.legend() == [("", "0")]


def test_the_legend_goes_from_one_end_to_the_other():
    legend = PALETTE.legend()
    assert [color for color, _ in legend] == ["d5", "d4", "d3", "d2", "d1", "", "u1", "u2", "u3", "u4", "u5"]
    assert [value for _, value in legend][:2] == ["−2", "−1.6"]


def test_a_text_a_little_longer_than_the_limit_is_not_folded():
    tokens = [ExampleToken("x", 0.5, True)] * (HEAD_TOKENS + 1)
    assert not colored(tokens, PALETTE).middle
    assert colored(tokens * 2, PALETTE).hidden == f"{HEAD_TOKENS + 2} more tokens"
    assert not folded("x" * 1000).middle


def test_the_strongest_tokens_go_either_way_and_count():
    tokens = tuple(
        ExampleToken(text, value, scored)
        for text, value, scored in [("a", 0.1, True), ("b", -3.0, True), ("c", 2.0, True), ("d", 9.0, False)]
    )
    assert [token.text for token in strongest(tokens, 2)] == ["b", "c"]
    assert not strongest((ExampleToken("x", float("nan"), True),))
