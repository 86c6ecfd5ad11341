import re

import pytest
import yaml

from dpocli.config.commands import EvaluateOptions, PrecomputeOptions, TrainOptions
from dpocli.config.flags import COMMANDS, build_options, explain_unknown, given_keys, options_of, signature_of
from dpocli.config.losses import CATALOGUE
from dpocli.config.other_tools import FOREIGN_LOSSES, FOREIGN_OPTIONS
from dpocli.config.parsing import dump_yaml, load_options
from dpocli.errors import UsageError

NEEDED = {"model": "m", "out": "o"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(model, flags):
    with pytest.raises(UsageError) as caught:
        load_options(model, flags)
    return str(caught.value)


# where values come from


def test_defaults_are_below_the_file_and_the_file_is_below_flags(tmp_path):
    config = write(tmp_path / "c.yaml", "model: from-file\nout: o\nbeta: 0.3\nseed: 7\n")
    options = load_options(TrainOptions, {"config": config, "beta": "0.5"})
    assert (options.loss.beta, options.seed, options.model.name, options.optimizer.weight_decay) == (
        0.5,
        7,
        "from-file",
        0.0,
    )


def test_flags_that_were_not_given_change_nothing():
    options = load_options(TrainOptions, NEEDED | {"seed": None, "data": None, "track": []})
    assert set(given_keys(options)) == {"model", "out"}


@pytest.mark.parametrize("key", ["learning-rate", "learning_rate"])
@pytest.mark.parametrize("number", ["5e-7", "5.0e-7", "0.0000005", '"5e-7"'])
def test_numbers_and_keys_may_be_written_in_every_way(tmp_path, key, number):
    config = write(tmp_path / "c.yaml", f"model: m\nout: o\n{key}: {number}\n")
    assert load_options(TrainOptions, {"config": config}).optimizer.learning_rate == 5e-7


def test_yaml_takes_nothing_for_something_else(tmp_path):
    config = write(tmp_path / "c.yaml", "model: 0123\nrevision: no\nout: 1e5\nlimit: null\nshard: 1/3\ndata: a.jsonl\n")
    options = load_options(PrecomputeOptions, {"config": config})
    assert (options.model.name, options.model.revision, str(options.out), options.data.limit) == (
        "0123",
        "no",
        "1e5",
        None,
    )
    assert options.worker == (1, 3)
    assert options.data.files == ["a.jsonl"]


@pytest.mark.parametrize("given", [["a,b", "c"], ["a", "b", "c"], ["a, b,c,"]])
def test_comma_lists_may_be_repeated_too(given):
    options = load_options(PrecomputeOptions, NEEDED | {"data": ["x"], "keep_columns": given})
    assert options.data.keep_columns == ["a", "b", "c"]


def test_paths_with_commas_stay_whole():
    assert load_options(PrecomputeOptions, NEEDED | {"data": ["a,b.jsonl"]}).data.files == ["a,b.jsonl"]


# errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"beta": "0"}, "--beta 0: must be above 0."),
        ({"beta": "nan"}, "--beta nan: must be a finite number."),
        ({"learning_rate": "inf"}, "--learning-rate inf: must be a finite number."),
        ({"label_smoothing": "0.5"}, "--label-smoothing 0.5: must be below 0.5."),
        ({"epochs": "1.5"}, "--epochs 1.5: must be a whole number."),
        ({"seed": "-1"}, "--seed -1: must be at least 0."),
        ({"beta": "small"}, "--beta small: must be a number."),
        ({"dtype": "bf16"}, "--dtype bf16: is not one of 'float32', 'bfloat16' or 'float16'."),
        ({"template_date": "x"}, "--template-date x: must be a date such as 2025-01-31."),
        ({"epochs": "1", "max_steps": "2"}, "--max-steps: the length of the run is set by --epochs or by --max-steps"),
        ({"reference": "r", "limit": "3"}, "--limit: has no effect here"),
        ({"revision": ""}, "--revision: the value is empty"),
        (
            {"optimizer": "rmsprop", "adam_beta2": "0.99"},
            "--adam-beta2: a setting of AdamW, and --optimizer is rmsprop",
        ),
        ({"optimizer": "rmsprop", "weight_decay": "0.1"}, "--weight-decay: a setting of AdamW"),
        ({"warmup_steps": "9", "warmup_ratio": "0.2"}, "--warmup-steps: warm-up is set by --warmup-ratio or by"),
    ],
)
def test_an_impossible_value_is_told_with_its_flag(flags, expected):
    assert expected in error_of(TrainOptions, NEEDED | flags)


def test_each_error_has_its_line():
    lines = error_of(TrainOptions, {"beta": "0", "seed": "x"}).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["--beta 0", "--model", "--out", "--seed x"]


def test_missing_options_are_described():
    message = error_of(PrecomputeOptions, {})
    assert "--model: missing; give the model: a local directory or a hub id." in message
    assert "--out: missing; give the directory to write." in message
    assert "--data" in error_of(PrecomputeOptions, NEEDED)


@pytest.mark.parametrize("shard", ["3of4", "4/4", "-1/4", "1/0", "/"])
def test_an_impossible_shard(shard):
    assert "I/N" in error_of(PrecomputeOptions, NEEDED | {"data": ["x"], "shard": shard})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nepocs: 3\n", "c.yaml:2: epocs: there is no such option; did you mean epochs?"),
        ("model: m\nmodel: n\n", "c.yaml:2: model: given twice, first in line 1"),
        ("batch-size: 1\nbatch_size: 2\n", "c.yaml:2: batch_size: given twice"),
        ("# nothing\n", "holds no options"),
        ("- model\n", "holds no options"),
        ("just words\n", "holds no options"),
        ("model: m\nbeta: a: b\n", "c.yaml:2: is not valid YAML"),
        ("model: m\n\tbeta: 1\n", "c.yaml:2: is not valid YAML"),
        ("model: [a, b]\n", "c.yaml:1: model: takes one value."),
        ("beta: {a: 1}\n", "c.yaml:1: beta: takes one value."),
        ("data: [[a]]\n", "c.yaml:1: data: takes a value or a list of values."),
        ("model: m\nout: o\n\nbeta: 0\n", "c.yaml:4: beta 0: must be above 0."),
        ("model: m\nout: o\nbeta: true\n", "c.yaml:3: beta true: must be a number."),
        ("model: m\nout: o\nlimit: yes\n", "c.yaml:3: limit yes: must be a whole number."),
        ("model: m\nout: o\nmodel_dropout: perhaps\n", "c.yaml:3: model_dropout perhaps: must be true or false."),
        ("model: m\nout: o\nmax_steps: 1\nepochs: 2\n", "c.yaml:3: max_steps: the length of the run"),
        ("model: m\nout: o\nrevision: ''\n", "c.yaml:3: revision: the value is empty"),
        (
            "num_warmup_steps: 10\n",
            "c.yaml:1: num_warmup_steps: this is a name from another tool. Here, use --warmup-steps",
        ),
        ("shard: 0/2\n", "c.yaml:1: shard: this is no option of this command; it belongs to precompute."),
        ("as_json: true\n", "c.yaml:1: as_json: there is no such option"),
    ],
)
def test_an_error_in_yaml_names_file_and_line(tmp_path, text, expected):
    assert expected in error_of(TrainOptions, {"config": write(tmp_path / "c.yaml", text)})


def test_a_file_that_cannot_be_read(tmp_path):
    assert "no.yaml: cannot be read" in error_of(TrainOptions, {"config": str(tmp_path / "no.yaml")})
    assert "cannot be read" in error_of(TrainOptions, {"config": str(tmp_path)})
    assert "--config" in error_of(TrainOptions, {"config": ""})
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "is not UTF-8" in error_of(TrainOptions, {"config": str(tmp_path / "latin.yaml")})


# config.yaml

COMPLETE = {
    PrecomputeOptions: NEEDED
    | {"data": ["a.jsonl", "b: c.jsonl"], "shard": "1/4", "keep_columns": ["x,y"], "template_date": "2026-02-03"}
    | {"limit": "10", "max_skipped": "1e-3", "trust_remote_code": True, "json": True, "revision": "0123"},
    TrainOptions: NEEDED
    | {"reference": "r", "learning_rate": "5e-7", "loss": "simpo", "gamma": "1", "track": ["wandb"], "epochs": "2"}
    | {"gradient_checkpointing": True, "model_dropout": False, "adam_epsilon": "1e-8", "dtype": "float32"},
    EvaluateOptions: NEEDED
    | {"data": ["ä.jsonl"], "beta": "0.1", "scratch": "~/s", "json": False, "model": ["a", "b,c"]}
    | {"require": ["loss<0.7", "reward_accuracy >= 0.65"], "slice_by": ["x,y"]},
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("complete", [True, False])
def test_config_yaml_reproduces_the_command(tmp_path, command, complete):
    model = COMMANDS[command]
    flags = COMPLETE[model] if complete else NEEDED | {"data": ["d"]}
    options = load_options(model, flags)
    config = write(tmp_path / "config.yaml", dump_yaml(options, command))
    again = load_options(model, {"config": config})
    assert again.model_copy(update={"as_json": options.as_json}) == options
    assert build_options(model, **yaml.safe_load((tmp_path / "config.yaml").read_text())) == again


def test_config_yaml_is_for_readers():
    text = dump_yaml(load_options(TrainOptions, NEEDED | {"seed": "3", "json": True}), "train")
    given, _, defaults = text.partition("# Left at their defaults:\n")
    assert re.match(r"# dpocli train, version \S+\. .*--config", given)
    assert yaml.safe_load(given) == {"out": "o", "model": "m", "seed": 3}
    assert "weight_decay: 0.0\n" in defaults
    assert "null" not in text
    assert "json" not in yaml.safe_load(text)


# flags


@pytest.mark.parametrize("model", COMMANDS.values())
def test_every_option_has_a_parameter_and_a_help_text(model):
    parameters = signature_of(model).parameters
    assert set(parameters) == {"config", *(option.key for option in options_of(model))}
    assert all(parameter.default is None for parameter in parameters.values())
    assert all(option.info.description for option in options_of(model))


def test_the_fixed_names_exist():
    fixed = (
        "--model --data --reference --out --loss --beta --learning-rate --batch-size --epochs --max-steps --seed "
        "--max-length --truncation --dtype --shard --rows-per-part --eval-reference --json"
    )
    assert set(fixed.split()) <= {option.flag for model in COMMANDS.values() for option in options_of(model)}


# names from elsewhere


def test_foreign_names_are_none_of_ours():
    ours = {option.key for model in COMMANDS.values() for option in options_of(model)}
    assert not ours & FOREIGN_OPTIONS.keys()
    assert not CATALOGUE.keys() & FOREIGN_LOSSES.keys()


def test_conversions_name_only_what_exists():
    ours = {flag for model in COMMANDS.values() for option in options_of(model) for flag in option.flags}
    for name, hint in FOREIGN_OPTIONS.items():
        assert set(re.findall(r"--[a-z0-9-]+", hint)) <= ours, name
        assert set(re.findall(r"--loss (\w+)", hint)) <= CATALOGUE.keys(), name
    for name, hint in FOREIGN_LOSSES.items():
        assert set(re.findall(r"it is(?: called)? (\w+)", hint)) <= CATALOGUE.keys(), name


@pytest.mark.parametrize("name", FOREIGN_OPTIONS)
def test_every_foreign_name_is_recognised_with_dashes_too(name):
    assert "another tool" in explain_unknown("--" + name.replace("_", "-"), TrainOptions)


def test_a_foreign_loss_is_converted():
    with pytest.raises(UsageError, match=r"It is called dpo here\. There are dpo,"):
        load_options(TrainOptions, NEEDED | {"loss": "sigmoid"}).loss_choice()
