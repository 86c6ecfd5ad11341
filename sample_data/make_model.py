"""Make sample_data/tiny-model: a small Llama, trained for a few minutes to speak like the sample pairs.

    python sample_data/make_model.py

It learns from freshly written pairs about every subject, chosen and rejected answers in equal parts: so it knows the
world that it is asked about but hardly prefers either answer, which is left to DPO. Seeded; the same bytes every time
on one machine.
"""

import shutil
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
from make_pairs import ALL_SUBJECTS, Message, Pair, PairWriter, assistant
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_DIR = Path(__file__).resolve().parent / "tiny-model"
NUM_PAIRS = 16_000
BATCH_SIZE = 32  # conversations
LEARNING_RATE = 3e-3
NUM_THREADS = 1  # fixed, since the order of the sums decides the last digits

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def conversations(pair: Pair) -> list[list[Message]]:
    """The two conversations of a pair, one with each answer."""
    start = [{"role": "system", "content": pair.system}] if pair.system else []
    return [[*start, *pair.turns, assistant(answer)] for answer in (pair.chosen, pair.rejected)]


def make_tokenizer(corpus: list[list[Message]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the words of the corpus, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=[PAD, END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system", "user", "assistant", "\n"]
    texts = [message["content"] for conversation in corpus for message in conversation]
    bpe.train_from_iterator(texts + roles * len(corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About a million parameters, a fifth of them the token embeddings."""
    end_of_turn, pad = tokenizer.convert_tokens_to_ids([TURN_END, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=end_of_turn, pad_token_id=pad, max_new_tokens=64, do_sample=False
    )
    return model


def batches(sequences: list[list[int]], rng: Random) -> list[list[list[int]]]:
    """Batches of sequences of about the same length, for little padding, in random order."""
    rng.shuffle(sequences)
    sequences.sort(key=len)
    cut = [sequences[start : start + BATCH_SIZE] for start in range(0, len(sequences), BATCH_SIZE)]
    rng.shuffle(cut)
    return cut


def last_exchange(sequence: list[int], turn_start: int) -> list[int]:
    """The labels: the last question and its answer. What came before (with good answers only) is not learned."""
    start = [place for place, token in enumerate(sequence) if token == turn_start][-2]
    return [-100] * start + sequence[start:]


def pretrain(model: LlamaForCausalLM, sequences: list[list[int]], turn_start: int, rng: Random) -> None:
    """One pass over the sequences with the plain next-token loss."""
    steps = batches(sequences, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(steps))
    model.train()
    for step, batch in enumerate(steps):
        input_ids = padded(batch, model.config.pad_token_id)
        labels = padded([last_exchange(sequence, turn_start) for sequence in batch], -100)
        loss = model(input_ids=input_ids, labels=labels).loss  # the padding is on the right, where no token sees it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == len(steps) - 1:
            print(f"step {step:4d} of {len(steps)}: loss {loss.item():.3f}", flush=True)


def padded(sequences: list[list[int]], value: int) -> Tensor:
    """The sequences filled up on the right, (sequences, longest)."""
    return pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=value)


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(5)
    pairs = islice(PairWriter(Random(6), ALL_SUBJECTS).pairs(), NUM_PAIRS)
    corpus = [conversation for pair in pairs for conversation in conversations(pair)]

    tokenizer = make_tokenizer(corpus)
    rendered = tokenizer.apply_chat_template(corpus, tokenize=False)
    sequences = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {sum(map(len, sequences)):,} to learn from")
    pretrain(model, sequences, tokenizer.convert_tokens_to_ids(TURN_START), Random(7))

    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    model.save_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(MODEL_DIR)
    print(f"{MODEL_DIR.name}: written after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
