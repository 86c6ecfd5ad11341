"""Small tokenizers made in code, and chat templates that print what real ones print."""

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the answer to this question? Answer: yes, it is.",
    "You are a helpful assistant. How are you today? I am fine, thank you. user assistant system tool think",
    "Peas are planted in March, beans in May; tomatoes want a warm wall and water in the evening.",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|call_end|>", "<think>", "</think>"]

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
THINKING = CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
EOS_AT_EACH_TURN = """\
{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{%- else %}{{ '[' + message['role'] + '] ' + message['content'] + ' [/]' }}\
{%- endif %}{%- endfor %}"""
NO_END = """\
{{ bos_token }}{%- for message in messages %}{{ '\\n' + message['role'] + ': ' + message['content'] }}{%- endfor %}\
{%- if add_generation_prompt %}{{ '\\nassistant: ' }}{%- endif %}"""
EOS_AFTER_THE_END = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- else %}{{ eos_token }}{%- endif %}"""
LAST_END_DIFFERS = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\
{%- if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}{{ '<|im_end|>' }}\
{%- else %}{{ '<|end|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
STRIPS_THINKING = """\
{%- for message in messages %}{%- set content = message['content'] if loop.last else \
message['content'].split('</think>')[-1] %}{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Case:
    """A tokenizer with a chat template, and what is known about it."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    end: str
    """The token that ends a turn; empty where the template prints none."""
    rest: str = ""
    """What the template prints after the last end."""
    begins_with_bos: bool = False


@cache
def byte_level(adds_bos: bool = False, bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen. It takes any text and gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, adds_bos, bos, template)


@cache
def metaspace(adds_bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A unigram model over `▁` for space, as in Llama 2 and Gemma, with pieces that reach over word boundaries."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, adds_bos, True, template)


def _wrap(tokenizer: Tokenizer, adds_bos: bool, bos: bool, template: str | None) -> PreTrainedTokenizerFast:
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", model_max_length=16
    )
    wrapped.chat_template = template
    return wrapped


class Characters(PreTrainedTokenizer):
    """A slow tokenizer, written in Python: a token a character."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012  # the library's own declaration

    def __init__(self, **kwargs: object) -> None:
        self._vocabulary = {chr(code): code for code in range(256)}
        super().__init__(unk_token=AddedToken("?"), **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, ord("?"))

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def characters(template: str | None = None) -> Characters:
    tokenizer = Characters(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = template
    return tokenizer


def chat_cases() -> list[Case]:
    return [
        Case("chatml", byte_level(template=CHATML), "<|im_end|>", "\n"),
        Case("chatml, no bos", byte_level(bos=False, template=CHATML), "<|im_end|>", "\n"),
        Case("thinking", byte_level(template=THINKING), "<|im_end|>", "\n"),
        Case("eos at each turn", byte_level(True, template=EOS_AT_EACH_TURN), "</s>", "", True),
        Case("no end", byte_level(True, template=NO_END), "", "", True),
        Case("eos after the end", byte_level(template=EOS_AFTER_THE_END), "<|end|>", "\n</s>"),
        Case("last end differs", byte_level(template=LAST_END_DIFFERS), "<|im_end|>"),
        Case("metaspace chatml", metaspace(template=CHATML), "<|im_end|>", "\n"),
        Case("metaspace, no end", metaspace(template=NO_END), "", "", True),
    ]
