"""The texts of tokens, put together, are the text of all tokens; no character is lost between two of them."""

import pytest

from dpocli.data.detokenize import decoded, token_texts
from tests.data.tokenizers_for_tests import byte_level, metaspace

TEXTS = [
    "The quick brown fox\n\njumps  over\tthe lazy dog. ",
    "naïve café: Größe, Владивосток, 東京, עברית, عربى",
    "👩‍👩‍👧 flag 🇩🇪, skin 👍🏽, e\u0301 combined",
    "a real replacement character: \ufffd\ufffd, and on",
    "<script>alert('x')</script>",
    " ",
]


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", "Answer: ", "日本"])
def test_pieces_add_up_to_the_text(text, before):
    tokenizer = byte_level()
    ids = ids_of(tokenizer, text)
    pieces = token_texts(tokenizer, ids_of(tokenizer, before), ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert pieces[0].start == 0
    assert pieces[-1].stop == len(ids)


def test_bytes_of_a_character_stay_together():
    """The small vocabulary has no emoji: each is four tokens, and one piece."""
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "a👍b")
    assert len(ids) == 6
    assert [(piece.text, piece.stop - piece.start) for piece in token_texts(tokenizer, [], ids)] == [
        ("a", 1),
        ("👍", 4),
        ("b", 1),
    ]


def test_a_character_cut_by_truncation_spoils_only_itself():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "fine 👍")[:-1]
    pieces = token_texts(tokenizer, [], ids)
    assert "".join(piece.text for piece in pieces) == "fine \ufffd"
    assert pieces[-1].stop == len(ids)


def test_a_character_that_began_in_the_prompt_is_shown_where_it_ends():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "x👍y")
    pieces = token_texts(tokenizer, ids[:3], ids[3:])
    assert "".join(piece.text for piece in pieces) == "👍y"


def test_spaces_that_decoders_drop_at_the_beginning_are_kept():
    """SentencePiece's decoder drops the first space of whatever it is given."""
    tokenizer = metaspace()
    ids = ids_of(tokenizer, "The answer is yes")
    before, after = ids[:1], ids[1:]
    assert decoded(tokenizer, ids).startswith("The")
    whole = "".join(piece.text for piece in token_texts(tokenizer, before, after))
    assert decoded(tokenizer, before) + whole == decoded(tokenizer, ids)


def test_special_tokens_are_shown():
    tokenizer = byte_level()
    ids = tokenizer.encode("yes<|im_end|>", add_special_tokens=False)
    assert token_texts(tokenizer, [], ids)[-1].text == "<|im_end|>"


def test_a_long_text_takes_a_short_window(monkeypatch):
    """Decoding everything up to each token would take minutes for a long answer."""
    tokenizer = byte_level()
    longest = 0

    def watched(tokenizer, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decoded(tokenizer, ids)

    monkeypatch.setattr("dpocli.data.detokenize.decoded", watched)
    token_texts(tokenizer, [], ids_of(tokenizer, "quite a long text " * 100))
    assert longest < 20


def test_no_tokens_have_no_texts():
    assert token_texts(byte_level(), [], []) == []
