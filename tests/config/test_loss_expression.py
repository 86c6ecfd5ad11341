"""What `--loss` says, in every way to write it: read, completed, refused, written back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpocli.config.commands import EvaluateOptions, TrainOptions
from dpocli.config.hyperparameters import BETA, Hyperparameter, Need, Value
from dpocli.config.loss_expression import LossChoice, LossTerm, choices_of, named, split_list, text_of_terms
from dpocli.config.losses import CATALOGUE, MIXTURES, LossSpec, losses_using
from dpocli.config.options import NUMBERS_OF_LOSSES
from dpocli.config.other_tools import FOREIGN_LOSSES, REFUSED_LOSSES
from dpocli.config.parsing import load_options
from dpocli.errors import UsageError

settings.register_profile("loss_choice", derandomize=True, deadline=None, max_examples=150, database=None)
PROFILE = settings.get_profile("loss_choice")


def train(**flags: str) -> TrainOptions:
    return load_options(TrainOptions, {"model": "m", "out": "o", "reference": "r", **flags})


def evaluate(**flags: str) -> EvaluateOptions:
    return load_options(EvaluateOptions, {"model": "m", "out": "o", "reference": "r", **flags})


def error_of(text: str, **numbers: Value) -> str:
    with pytest.raises(UsageError) as caught:
        LossChoice.of(text, numbers)
    return str(caught.value)


def single(text: str, **numbers: Value) -> LossTerm:
    (term,) = LossChoice.of(text, numbers).terms
    return term


# reading


def test_a_loss_has_every_number_of_the_paper() -> None:
    for name, spec in CATALOGUE.items():
        term = single(name)
        assert (term.name, term.weight, term.beta, term.hyperparameters) == (name, 1.0, spec.beta, spec.defaults)
        assert term.modifiers == {}
        assert term.numbers == spec.defaults | ({} if spec.beta is None else {"beta": spec.beta})


@pytest.mark.parametrize(
    "text", ["dpo_norm", "dpo-norm", "DPO-Norm", " dpo_norm ", "dpo_norm()", "1*dpo_norm", "1.0 * dpo_norm"]
)
def test_ways_to_write_one_loss(text: str) -> None:
    assert LossChoice.of(text) == LossChoice.of("dpo_norm")


@pytest.mark.parametrize(
    "text",
    [
        "0.8*dpo(beta=0.2,ld_alpha=0.5)+0.2*sft(reduction=sum)",
        " 0.8 * dpo ( beta = 0.2 , ld-alpha = .5 ) + 0.2 * SFT ( reduction = sum ) ",
        "8e-1*dpo(beta=2E-1,ld_alpha=0.5,)+.2*sft(reduction=sum)",
    ],
)
def test_ways_to_write_a_sum(text: str) -> None:
    first, second = LossChoice.of(text).terms
    assert (first.name, first.weight, first.beta) == ("dpo", 0.8, 0.2)
    assert first.hyperparameters == {"label_smoothing": 0.0, "ld_alpha": 0.5}
    assert (first.numbers, first.modifiers) == ({"beta": 0.2, "label_smoothing": 0.0}, {"ld_alpha": 0.5})
    assert (second.name, second.weight, second.beta) == ("sft", 0.2, None)
    assert second.numbers == {"reduction": "sum"}


def test_mpo_is_the_sum_of_its_paper() -> None:
    choice = LossChoice.of("mpo")
    assert choice == LossChoice.of(" MPO ") == LossChoice.of("0.8*dpo+0.2*bco_pair(beta=0.1)+sft")
    assert choice.label == "0.8*dpo+0.2*bco_pair+sft"
    assert [(term.beta, term.weight) for term in choice.terms] == [(0.1, 0.8), (0.1, 0.2), (None, 1.0)]
    # What is given for all goes where the mixture says nothing.
    betas = [term.beta for term in LossChoice.of("mpo", {"beta": 0.3}).terms]
    assert betas == [0.3, 0.1, None]


def test_numbers_may_be_text_or_numbers() -> None:
    assert single("simpo", gamma="0.5", beta=3) == single("simpo(gamma=5e-1, beta=3.0)")
    assert type(single("simpo", beta="3").beta) is float


def test_what_a_sum_needs_is_what_its_terms_need() -> None:
    choice = LossChoice.of("simpo+sft")
    assert (choice.needs, choice.needs_reference, choice.is_whole_batch) == (frozenset(), False, False)
    choice = LossChoice.of("simpo+0.1*aot+dpo(ld_alpha=0.3, weighting=wpo)")
    assert choice.needs == set(Need)
    assert choice.needs_reference
    assert choice.is_whole_batch
    assert LossChoice.of("bco_pair").is_whole_batch
    assert not LossChoice.of("bco_pair(delta=none)").is_whole_batch


@pytest.mark.parametrize(
    ("text", "ranked_by"),
    [("dpo", "dpo"), ("sft", "sft"), ("sft+simpo", "simpo"), ("0.1*sft+hinge+dpo", "hinge"), ("0.5*sft", "sft")],
)
def test_a_sum_ranks_by_its_first_term_that_compares(text: str, ranked_by: str) -> None:
    assert LossChoice.of(text).ranked_by.name == ranked_by


@pytest.mark.parametrize(
    ("text", "label", "is_single"),
    [("dpo(beta=3)", "dpo", True), ("2*dpo", "2*dpo", False), ("dpo(beta=3) + 0.2*sft", "dpo+0.2*sft", False)],
)
def test_labels_are_short(text: str, label: str, is_single: bool) -> None:
    choice = LossChoice.of(text)
    assert (choice.label, choice.is_single) == (label, is_single)
    assert LossChoice.of(label).label == label


# several losses


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dpo", ["dpo"]),
        ("dpo, simpo(beta=2.5, gamma=1) ,hinge+0.2*sft", ["dpo", "simpo(beta=2.5, gamma=1)", "hinge+0.2*sft"]),
    ],
)
def test_commas_in_parentheses_do_not_part_losses(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts


def test_evaluate_takes_several_losses() -> None:
    choices = evaluate(loss="dpo,simpo(gamma=1.5, beta=3),dpo+0.2*sft", beta="0.5").loss.loss_choices()
    assert [choice.label for choice in choices] == ["dpo", "simpo", "dpo+0.2*sft"]
    assert [choice.terms[0].beta for choice in choices] == [0.5, 3.0, 0.5]
    assert list(named(choices)) == ["dpo", "simpo", "dpo+0.2*sft"]
    assert list(named(choices).values()) == choices


def test_a_number_must_be_used_by_one_of_them_at_least() -> None:
    first, second = evaluate(loss="dpo,simpo", gamma="0.5").loss.loss_choices()
    assert "gamma" not in first.terms[0].hyperparameters
    assert second.terms[0].hyperparameters["gamma"] == 0.5
    with pytest.raises(UsageError, match="--gamma: dpo, hinge does not use it"):
        evaluate(loss="dpo,hinge", gamma="0.5").loss.loss_choices()


def test_losses_that_differ_in_numbers_are_named_by_them() -> None:
    choices = evaluate(loss="dpo,dpo(beta=0.5),hinge").loss.loss_choices()
    assert list(named(choices)) == [
        "dpo(beta=0.1, label_smoothing=0)",
        "dpo(beta=0.5, label_smoothing=0)",
        "hinge",
    ]


@pytest.mark.parametrize("text", ["dpo,dpo", "dpo,simpo,dpo(beta=0.1)", "dpo+sft,1.0*dpo+sft"])
def test_the_same_loss_twice(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--loss: dpo\(beta=0\.1, label_smoothing=0\).* is given twice\.$"):
        named(evaluate(loss=text).loss.loss_choices())


def test_train_takes_one_loss() -> None:
    assert train(loss="dpo+0.2*sft").loss_choice().label == "dpo+0.2*sft"
    with pytest.raises(
        UsageError, match=r"a run trains with one loss\. Write a weighted sum with \+, as in dpo\+simpo,"
    ):
        train(loss="dpo, simpo").loss_choice()


def test_without_a_loss_it_is_dpo() -> None:
    assert train().loss_choice() == LossChoice.of("dpo")
    assert train(beta="0.4").loss_choice() == LossChoice.of("dpo(beta=0.4)")


# precedence

DEFAULT = LossChoice.of("0.5*simpo(beta=7, gamma=0.7, label_smoothing=0.3)+dpo(ld_alpha=0.6, label_smoothing=0.4)")
"""Of a model that was trained with it."""


def test_own_numbers_before_given_ones_before_the_models_before_the_papers() -> None:
    def numbers(text: str, given: dict[str, Value], default: LossChoice | None) -> tuple[Value | None, ...]:
        (term,) = LossChoice.of(text, given, default).terms
        return term.beta, term.hyperparameters["gamma"], term.hyperparameters["label_smoothing"]

    assert numbers("simpo", {}, None) == (2.0, 1.0, 0.0)
    assert numbers("simpo", {}, DEFAULT) == (7.0, 0.7, 0.3)
    assert numbers("simpo", {"gamma": 0.2}, DEFAULT) == (7.0, 0.2, 0.3)
    assert numbers("simpo(gamma=0.1)", {"gamma": 0.2, "beta": 4.0}, DEFAULT) == (4.0, 0.1, 0.3)
    assert numbers("simpo(gamma=0.1, beta=3)", {"gamma": 0.2, "beta": 4.0}, None) == (3.0, 0.1, 0.0)
    # Numbers of another loss of the model are not those of this one.
    assert LossChoice.of("hinge", {}, DEFAULT) == LossChoice.of("hinge")


def test_the_models_loss_is_the_default_with_all_its_numbers() -> None:
    assert evaluate().loss.loss_choices(DEFAULT) == [DEFAULT]
    assert evaluate(loss="dpo").loss.loss_choices(DEFAULT) == [LossChoice(terms=(DEFAULT.terms[1],))]
    (changed,) = evaluate(label_smoothing="0.1").loss.loss_choices(DEFAULT)
    assert [term.hyperparameters["label_smoothing"] for term in changed.terms] == [0.1, 0.1]
    assert [term.weight for term in changed.terms] == [0.5, 1.0]


def test_a_modifier_of_the_model_can_be_turned_off() -> None:
    model = LossChoice.of("dpo(f_divergence=alpha, f_alpha=0.3, ld_alpha=0.5, weighting=wpo)")
    off: dict[str, Value] = {"ld_alpha": 1.0, "weighting": "none", "f_divergence": "reverse_kl"}
    assert LossChoice.of("dpo", off, model) == LossChoice.of("dpo")
    assert LossChoice.of("dpo", {"f_divergence": "js"}, model).terms[0].modifiers.keys() == {
        *("ld_alpha", "weighting", "f_divergence")
    }
    assert LossChoice.of("dpo", {"f_alpha": 0.8}, model).terms[0].hyperparameters["f_alpha"] == 0.8


def test_the_alpha_divergence_has_an_order_and_no_other_has() -> None:
    assert single("dpo(f_divergence=alpha)").modifiers == {"f_divergence": "alpha", "f_alpha": 0.5}
    assert single("dpo(f_divergence=js)").modifiers == {"f_divergence": "js"}


def test_a_model_of_a_later_version() -> None:
    unknown = LossChoice.model_validate({"name": "dpo_of_tomorrow", "beta": 0.1, "hyperparameters": {}})
    with pytest.raises(UsageError, match=r"dpocli\.json: it was trained with the loss dpo_of_tomorrow, which"):
        evaluate().loss.loss_choices(unknown)
    unknown = LossChoice.model_validate({"name": "dpo", "beta": 0.1, "hyperparameters": {"omega": 1.0}})
    with pytest.raises(UsageError, match=r"dpocli\.json: it was trained with dpo and omega, which"):
        evaluate().loss.loss_choices(unknown)
    # A number that it did not have yet is the paper's.
    older = LossChoice.model_validate({"name": "simpo", "beta": 4.0, "hyperparameters": {}})
    assert evaluate().loss.loss_choices(older) == [LossChoice.of("simpo(beta=4)")]


# written and read again


def test_json_of_a_single_loss_is_that_of_earlier_versions() -> None:
    written = {"name": "simpo", "beta": 2.0, "hyperparameters": {"gamma": 0.5, "label_smoothing": 0.0}}
    choice = LossChoice.of("simpo", {"gamma": 0.5})
    assert choice.model_dump() == written
    assert choice.model_dump(mode="json") == written
    assert LossChoice.model_validate(written) == choice
    assert LossChoice.model_validate_json(json.dumps(written)) == choice


def test_json_of_a_sum_has_terms() -> None:
    choice = LossChoice.of("0.5*dpo+sft")
    assert choice.model_dump(mode="json") == {
        "terms": [
            {"name": "dpo", "weight": 0.5, "beta": 0.1, "hyperparameters": {"label_smoothing": 0.0}},
            {"name": "sft", "weight": 1.0, "beta": None, "hyperparameters": {"reduction": "mean"}},
        ]
    }
    assert LossChoice.of("2*dpo").model_dump().keys() == {"terms"}


@pytest.mark.parametrize("extra", [{"name": "dpo", "lambda": 3}, {"terms": [], "name_of_terms": "x"}])
def test_json_that_says_more_is_not_read(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LossChoice.model_validate(extra)


def test_str_is_what_can_be_written_again() -> None:
    choice = LossChoice.of("0.8*dpo(weighting=wpo)+bco_pair")
    assert str(choice) == "0.8*dpo(beta=0.1, label_smoothing=0, weighting=wpo) + bco_pair(beta=0.01, delta=running)"
    assert str(single("sft")) == "sft(reduction=mean)"


def values_of(parameter: Hyperparameter) -> st.SearchStrategy[Value]:
    """Every value that is allowed, the bounds among them."""
    if parameter.choices:
        return st.sampled_from(parameter.choices)
    low = parameter.minimum if parameter.minimum is not None else parameter.above
    high = parameter.maximum if parameter.maximum is not None else parameter.below
    return st.floats(
        low,
        high,
        exclude_min=parameter.above is not None,
        exclude_max=parameter.below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


@st.composite
def texts_and_numbers(draw: st.DrawFn, spec: LossSpec) -> tuple[str, dict[str, Value]]:
    numbers: dict[str, Value] = {} if spec.beta is None else {"beta": draw(values_of(BETA))}
    for name, parameter in spec.accepts.items():
        if draw(st.booleans()):
            numbers[name] = draw(values_of(parameter))
    if numbers.get("f_divergence") != "alpha":
        numbers.pop("f_alpha", None)
    inside = ", ".join(f"{name}={value!r}".replace("'", "") for name, value in numbers.items())
    return f"{spec.name}({inside})", numbers


@st.composite
def sums(draw: st.DrawFn) -> tuple[str, list[dict[str, Value]]]:
    names = draw(st.lists(st.sampled_from(sorted(CATALOGUE)), min_size=1, max_size=4, unique=True))
    weights = [draw(st.one_of(st.just(1.0), st.floats(1e-300, 1e300))) for _ in names]
    terms = [draw(texts_and_numbers(CATALOGUE[name])) for name in names]
    text = "+".join(f"{weight!r}*{term}" for weight, (term, _) in zip(weights, terms, strict=True))
    return text, [numbers | {"weight": weight} for weight, (_, numbers) in zip(weights, terms, strict=True)]


@settings(PROFILE)
@given(sums())
def test_every_choice_is_read_as_written_and_written_as_read(drawn: tuple[str, list[dict[str, Value]]]) -> None:
    text, numbers = drawn
    choice = LossChoice.of(text)
    for term, expected in zip(choice.terms, numbers, strict=True):
        found = {"weight": term.weight, "beta": term.beta} | term.hyperparameters
        for name, value in expected.items():
            off = term.spec.accepts[name].off if name in ("ld_alpha", "f_divergence", "weighting") else None
            assert found.get(name, off) == value
    assert LossChoice.of(str(choice)) == choice
    assert LossChoice.model_validate(choice.model_dump()) == choice
    assert LossChoice.model_validate_json(choice.model_dump_json()) == choice
    assert evaluate().loss.loss_choices(choice) == [choice]
    assert split_list(f"{choice}, sft") == [str(choice), "sft"]


# YAML


def of_yaml(tmp_path: Path, text: str) -> TrainOptions:
    config = tmp_path / "c.yaml"
    config.write_text(f"model: m\nout: o\nreference: r\n{text}", encoding="utf-8")
    return load_options(TrainOptions, {"config": str(config)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss: dpo+0.2*sft", "dpo+0.2*sft"),
        ("loss: {name: simpo, gamma: 1.5, beta: 2.5}", "simpo(beta=2.5, gamma=1.5)"),
        (
            "loss:\n- name: dpo\n  weight: 0.8\n  ld-alpha: .5\n- {name: sft, weight: 2e-1, reduction: sum}",
            "0.8*dpo(ld_alpha=0.5)+0.2*sft(reduction=sum)",
        ),
        ("loss:\n  - name: DPO-norm\nbeta: 3", "dpo_norm(beta=3)"),
        ("loss: [{name: bco_pair, delta: none}]", "bco_pair(delta=none)"),
        ("loss:", "dpo"),
    ],
)
def test_a_loss_in_yaml(tmp_path: Path, text: str, expected: str) -> None:
    assert of_yaml(tmp_path, text).loss_choice() == LossChoice.of(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "loss: [dpo, simpo]",
            "loss: each term is a mapping with a name, such as {name: dpo, weight: 0.8, beta: 0.1}.",
        ),
        ("loss: {beta: 0.1}", "loss: each term is a mapping with a name"),
        ("loss: [[{name: dpo}]]", "loss: each term is a mapping with a name"),
        ("loss: {name: dpo, beta: [1, 2]}", "loss: beta takes one value."),
        ("loss: {name: dpo, hyperparameters: {beta: 1}}", "loss: hyperparameters takes one value."),
        ("loss: {name: [dpo]}", "loss: name takes one value."),
        ("loss: {[a]: b}", "loss: "),
        ("loss: []", "loss: the value is empty"),
    ],
)
def test_a_loss_in_yaml_that_is_none(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_yaml(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}:4: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss: {name: dpo, weight: -1}", "weight: '-1' is not a number above 0"),
        ("loss: {name: dpo, weight: 0}", "the weight of dpo must be above 0"),
        ("loss: {name: dpo, beta: }", "'beta=' should be of the form name=value"),
        ("loss: {name: dpoo}", "there is no loss dpoo"),
        ("loss: [{name: dpo}, {name: dpo}]", "dpo stands there twice"),
        ("loss: {name: dpo, gamma: 1}", "dpo does not use gamma"),
    ],
)
def test_a_term_in_yaml_that_cannot_be(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_yaml(tmp_path, text).loss_choice()
    assert expected in str(caught.value)


def test_text_of_terms() -> None:
    terms = [{"name": "dpo", "weight": "0.8", "beta": "0.1", "ld_alpha": "0.5"}, {"name": "sft"}]
    assert text_of_terms(terms) == "0.8*dpo(beta=0.1, ld_alpha=0.5)+sft"
    assert text_of_terms({"name": "mpo"}) == "mpo"


def test_the_options_are_the_hyperparameters_of_the_catalogue() -> None:
    assert set(NUMBERS_OF_LOSSES) == {"beta", *(name for spec in CATALOGUE.values() for name in spec.accepts)}
    assert NUMBERS_OF_LOSSES.count("beta") == 1
    options = train(loss="0.8*dpo+0.2*bco_pair", delta="none", ld_alpha="0.5", f_divergence="js", beta="0.2")
    assert options.loss_choice() == LossChoice.of(
        "0.8*dpo(ld_alpha=0.5, f_divergence=js, beta=0.2) + 0.2*bco_pair(delta=none, beta=0.2)"
    )


# errors


def test_a_loss_that_does_not_exist() -> None:
    message = error_of("dpoo")
    assert message.startswith("--loss dpoo: there is no loss dpoo. Did you mean dpo? There are dpo, ")
    assert message.endswith(f", {', '.join(MIXTURES)}.")
    assert all(name in message for name in CATALOGUE)
    assert error_of("qqqq").startswith("--loss qqqq: there is no loss qqqq. There are dpo, ")
    assert error_of("dpo+qqqq").startswith("--loss dpo+qqqq: there is no loss qqqq. ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tr_dpo", "moves its reference while it trains, and a cache holds a frozen one"),
        ("tdpo", "takes the KL divergence over the whole vocabulary at every position"),
        ("kto", "learns from single answers and estimates a KL divergence on answers of other prompts"),
    ],
)
def test_losses_that_no_cache_can_serve_are_refused_with_the_reason(name: str, reason: str) -> None:
    message = error_of(name)
    assert message.startswith(f"--loss {name}: {name} {reason}")
    assert "; nearest here " in message
    in_a_sum = f"dpo+0.1*{name.upper().replace('_', '-')}"
    assert error_of(in_a_sum).startswith(f"--loss {in_a_sum}: {name} {reason}")


@pytest.mark.parametrize("name", REFUSED_LOSSES)
def test_every_refused_loss_says_why(name: str) -> None:
    assert error_of(name) == f"--loss {name}: {name} {REFUSED_LOSSES[name]}."


@pytest.mark.parametrize("name", FOREIGN_LOSSES)
def test_a_name_from_elsewhere_is_translated(name: str) -> None:
    hint = FOREIGN_LOSSES[name]
    assert f"there is no loss {name}. {hint[0].upper()}{hint[1:]}. There are dpo," in error_of(name)


def test_no_name_has_two_meanings() -> None:
    kinds = [CATALOGUE.keys(), MIXTURES.keys(), FOREIGN_LOSSES.keys(), REFUSED_LOSSES.keys()]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("text", ["mpo+sft", "2*mpo", "mpo(beta=0.2)", "dpo+mpo"])
def test_a_mixture_stands_alone(text: str) -> None:
    assert "t is a sum itself, 0.8*dpo+0.2*bco_pair(beta=0.1)+sft, and stands alone." in error_of(text)


def test_a_number_that_is_not_used_names_the_losses_that_use_it() -> None:
    assert error_of("dpo", gamma=1.0) == ("--gamma: dpo does not use it. Losses that do: simpo, simpo_hinge, alphapo.")
    assert (
        error_of("dpo+sft", discopop_tau=1.0) == "--discopop-tau: dpo, sft does not use it. Losses that do: discopop."
    )
    assert error_of("sft", beta=1.0) == "--beta: sft does not use it. Losses that do: all but sft."
    assert error_of("dpo(gamma=1)") == (
        "--loss dpo(gamma=1): dpo does not use gamma. It takes beta, label_smoothing, ld_alpha, f_divergence, f_alpha, "
        "weighting."
    )
    assert error_of("sft(beta=1)") == "--loss sft(beta=1): sft does not use beta. It takes reduction."
    assert losses_using("reduction") == ["ipo", "sft", "rpo"]


@pytest.mark.parametrize(
    ("name", "number", "value", "expected"),
    [
        ("robust", "label_smoothing", "0.5", "must be below 0.5"),
        ("dpo", "label_smoothing", "-0.1", "must be at least 0"),
        ("exo_pair", "label_smoothing", "0", "must be above 0"),
        ("exo_pair", "label_smoothing", "0.5", "must be below 0.5"),
        ("dpo", "ld_alpha", "1.5", "must be at most 1"),
        ("dpo", "ld_alpha", "-0.5", "must be at least 0"),
        ("dpo", "beta", "-1", "must be above 0"),
        ("dpo", "beta", "0", "must be above 0"),
        ("dpo", "beta", "nan", "must be a finite number"),
        ("dpo", "beta", "inf", "must be a finite number"),
        ("dpo", "beta", "1e999", "must be a finite number"),
        ("dpo", "beta", "small", "must be a number"),
        ("dpop", "dpop_lambda", "-1", "must be at least 0"),
        ("r_dpo", "r_dpo_alpha", "-1", "must be at least 0"),
        ("discopop", "discopop_tau", "0", "must be above 0"),
        ("simpo", "gamma", "-1", "must be at least 0"),
        ("cpo", "sft_weight", "-1", "must be at least 0"),
        ("beta_dpo", "beta_dpo_alpha", "-1", "must be at least 0"),
        ("beta_dpo", "beta_dpo_momentum", "1", "must be below 1"),
        ("alphapo", "alphapo_alpha", "nan", "must be a finite number"),
        ("ipo", "reduction", "max", "is not one of mean, sum"),
        ("bco_pair", "delta", "1", "is not one of running, none"),
        ("dpo", "f_divergence", "kl", "is not one of reverse_kl, forward_kl, js, alpha"),
        ("dpo", "weighting", "yes", "is not one of none, wpo"),
    ],
)
def test_a_value_out_of_bounds(name: str, number: str, value: str, expected: str) -> None:
    flag = f"--{number.replace('_', '-')} {value}"
    term = f"{name}({number}={value})"
    assert error_of(name, **{number: value}) == f"{flag}: {expected} for {name}."
    assert error_of(term) == f"--loss {term}: {expected} for {name}."
    assert error_of(f"sft(reduction=sum)+{term}") == f"--loss {term}: {expected} for {name}."


@pytest.mark.parametrize("value", ["1_0", "٢", "1,000", "0x10"])
def test_what_only_python_takes_for_a_number(value: str) -> None:
    assert error_of("dpo", beta=value) == f"--beta {value}: must be a number for dpo."


@pytest.mark.parametrize(("value", "expected"), [("1", "must be below 1"), ("0", "must be above 0")])
def test_the_order_of_the_alpha_divergence_is_between_its_limits(value: str, expected: str) -> None:
    assert error_of(f"dpo(f_divergence=alpha, f_alpha={value})") == f"--loss dpo(f_alpha={value}): {expected} for dpo."


@pytest.mark.parametrize("text", ["dpo(f_alpha=0.3)", "dpo(f_divergence=js, f_alpha=0.3)"])
def test_an_order_without_the_alpha_divergence(text: str) -> None:
    assert error_of(text) == "--f-alpha: only the alpha divergence uses it; give --f-divergence alpha with it."
    assert error_of("dpo", f_alpha=0.3) == error_of(text)


def test_bounds_hold_for_flags_too() -> None:
    with pytest.raises(UsageError, match=r"^--label-smoothing 0\.5: must be below 0\.5"):
        train(loss="robust", label_smoothing="0.5").loss_choice()
    with pytest.raises(UsageError, match=r"^--label-smoothing 0\.0: must be above 0 for exo_pair\.$"):
        train(loss="exo_pair", label_smoothing="0").loss_choice()
    with pytest.raises(UsageError, match=r"^--beta -1: must be above 0"):
        train(beta="-1").loss_choice()
    with pytest.raises(UsageError, match=r"^--f-divergence kl: is not one of "):
        train(f_divergence="kl").loss_choice()


@pytest.mark.parametrize("weight", ["0", "0.0", "1e-999", "1e999"])
def test_a_weight_that_is_none(weight: str) -> None:
    assert f"--loss {weight}*dpo: the weight of dpo must be " in error_of(f"{weight}*dpo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read from "),
        ("dpo+", "cannot be read from "),
        ("+dpo", "cannot be read from '+dpo' on. It takes a loss, or a weighted sum such as dpo+0.2*sft or "),
        ("dpo++sft", "cannot be read from '+sft' on."),
        ("dpo - 0.2*sft", "cannot be read from '- 0.2*sft' on."),
        ("dpo-0.2*sft", ""),
        ("-1*dpo", "cannot be read from '-1*dpo' on."),
        ("2dpo", "cannot be read from '2dpo' on."),
        ("dpo sft", "cannot be read from 'sft' on."),
        ("dpo*2", "cannot be read from '*2' on."),
        ("dpo(beta=0.1", "cannot be read from '(beta=0.1' on."),
        ("dpo)", "cannot be read from ')' on."),
        ("dpo((beta=1))", "cannot be read from '((beta=1))' on."),
        ("dpo(beta=1)(beta=2)", "cannot be read from '(beta=2)' on."),
        ("dpo,simpo", "cannot be read from ',simpo' on."),
        ("dpo(beta)", "'beta' should be of the form name=value."),
        ("dpo(beta=)", "'beta=' should be of the form name=value."),
        ("dpo(0.1)", "'0.1' should be of the form name=value."),
        ("dpo(beta=1, beta=2)", "beta is given twice for dpo."),
        ("dpo+dpo", "dpo stands there twice."),
        ("dpo+0.2*sft+DPO(beta=2)", "dpo stands there twice."),
    ],
)
def test_what_cannot_be_read(text: str, expected: str) -> None:
    assert error_of(text).startswith(f"--loss {text}: {expected}")


def test_errors_of_several_losses_are_those_of_each() -> None:
    with pytest.raises(UsageError, match=r"^--loss dpoo: there is no loss dpoo"):
        choices_of(["dpo", "dpoo"], {})
    with pytest.raises(UsageError, match=r"^--loss : cannot be read"):
        evaluate(loss="dpo,").loss.loss_choices()


def test_a_parsed_number_is_a_float() -> None:
    parsed = BETA.parse("3")
    assert type(parsed) is float
    assert parsed == 3.0
    with pytest.raises(ValueError, match="must be a finite number"):
        BETA.parse(math.nan)
