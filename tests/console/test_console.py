import io
import json
import sys

import pytest

from dpocli.console.console import Console, format_value, without_nan


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def install():  # during the test, since pytest gives each phase a stderr of its own
        stream = Screen()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return install


def test_messages_go_to_stderr_whole_and_plain(capsys):
    console = Console()
    long = "word " * 60 + "[bold]no markup[/bold] :smile: 5e-7"
    console.say(long)
    console.warn("careful")
    console.error("wrong")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{long}\nwarning: careful\nerror: wrong\n"


def test_other_ranks_are_silent_except_for_errors(capsys):
    console = Console(rank=3)
    console.say("x")
    console.warn("x")
    console.table("x", ["a"], [[1]])
    console.result({"a": 1}, lambda printer: printer.say("x"))
    with console.progress(10, "x") as progress:
        progress.update(pairs=10)
    assert capsys.readouterr() == ("", "")
    console.error("wrong")
    assert capsys.readouterr().err == "error (rank 3): wrong\n"


def test_colour_on_a_terminal_unless_no_color(screen, monkeypatch):
    stream = screen()
    Console().warn("careful")
    assert "\x1b[1;33m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = screen()
    Console().warn("careful")
    assert "33m" not in stream.getvalue()
    assert "careful" in stream.getvalue()


def test_tables_align_numbers_and_keep_brackets(capsys):
    Console().table("Figures", ["name", "value"], [["[a]", 1.5], ["b", None], ["c", 12345]])
    assert capsys.readouterr().err.split("\n")[0].strip() == "Figures"
    Console().table("", ["name", "value"], [["[a]", 1.5], ["b", None], ["c", 12345]])
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["name   value", "[a]   1.5000", "b          -", "c     12,345"]


def test_the_result_is_one_json_object(capsys):
    Console(json=True).result({"a": [1, float("nan")], "b": {"c": float("inf"), "d": "ä"}}, lambda printer: None)
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": [1, None], "b": {"c": None, "d": "ä"}}, "")
    assert out.count("\n") == 1


def test_the_result_is_rendered_on_stdout(capsys):
    Console().result({"a": 1}, lambda printer: printer.table("", ["a"], [[1]]))
    out, err = capsys.readouterr()
    assert (out.split(), err) == (["a", "1"], "")


def test_a_file_gets_a_line_every_ten_seconds_and_a_last_one(capsys):
    clock = Clock()
    with Console(clock=clock).progress(1000, "score") as progress:
        for _ in range(100):
            clock.now += 0.3
            progress.update(pairs=10, tokens=6000, loss=0.69314)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "score: 340/1000 pairs (34%), 33 pairs/s, 20.0k tokens/s, 0:20 left, loss 0.6931"
    assert len(lines) == 3
    assert lines[-1] == "score: 1000 pairs in 0:30, 33 pairs/s, 20.0k tokens/s, loss 0.6931"


@pytest.mark.parametrize(("unit", "done"), [("pairs", 8), ("rows", 8), ("steps", 1)])
def test_what_advances(capsys, unit, done):
    with Console().progress(None, "x", unit=unit) as progress:
        progress.update(pairs=8)
    assert capsys.readouterr().err.startswith(f"x: {done} {unit} in 0:00")


def test_a_resumed_run_estimates_from_its_own_pace(capsys):
    clock = Clock()
    with Console(clock=clock).progress(100, "train", unit="steps", initial=90) as progress:
        clock.now += 20
        progress.update(pairs=4)
    assert capsys.readouterr().err.startswith("train: 91/100 steps (91%), 0.2 pairs/s, 3:00 left\n")


def test_an_empty_piece_of_work(capsys):
    with Console().progress(0, "x"):
        pass
    assert capsys.readouterr().err == "x: 0 pairs in 0:00\n"


def test_a_live_bar_on_a_terminal(screen):
    stream, console = screen(), Console()
    with console.progress(10, "score") as progress:
        progress.update(pairs=4, tokens=100, loss=0.5)
        console.say("in between")
        progress.update(pairs=6)
    shown = stream.getvalue()
    assert "\r" in shown
    assert "in between\n" in shown
    assert "10/10 pairs" in shown
    assert "loss 0.5000" in shown
    assert "tokens/s" in shown


def test_progress_ends_with_an_error_too(capsys):
    with pytest.raises(KeyError), Console().progress(10, "x"):
        raise KeyError
    assert capsys.readouterr().err == "x: 0 pairs in 0:00\n"


def test_a_closed_pipe_stops_nothing(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(sys, "stdout", Closed())
    Console().say("x")
    Console().table("x", ["a"], [[1]])
    Console(json=True).result({}, lambda printer: None)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *[(0.0, "0.0000"), (0.69314, "0.6931"), (5e-7, "5e-07"), (12345.6, "1.235e+04"), (float("nan"), "nan")],
        *[(None, "-"), (True, "True"), (1234, "1,234"), ("x", "x")],
    ],
)
def test_values_for_people(value, shown):
    assert format_value(value) == shown


def test_json_knows_no_nan():
    assert without_nan({"a": (float("nan"), 1, "x", -float("inf"))}) == {"a": [None, 1, "x", None]}
