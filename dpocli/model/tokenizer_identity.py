"""Identity of a tokenizer by meaning: a re-saved copy is the same one, a changed merge makes another."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpocli.model.hashing import changes, digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a tokenizer does to text, independent of the bytes of its files. Digests are sha256."""

    num_ids: int
    """Largest token id + 1. The digests of the vocabulary and of the added tokens cover the ids below it."""
    vocabulary: str
    model: str
    """Kind of model and its parameters."""
    merges: str
    normalizer: str
    pre_tokenizer: str
    added_tokens: str
    affixes: tuple[tuple[int, ...], tuple[int, ...]]
    """Ids that it adds before and after a text."""
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Mapping[str, str]
    """Template by name; a tokenizer's only template is called `default`."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", num_ids: int | None = None) -> "TokenizerIdentity":
        """The identity of a tokenizer, or of its first `num_ids` ids."""
        pairs = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        num_ids = num_ids if num_ids is not None else (pairs[-1][0] + 1 if pairs else 0)
        backend = _backend(tokenizer)
        model = backend["model"]
        scores = [score for _, score in model["vocab"][:num_ids]] if isinstance(model.get("vocab"), list) else None
        parameters = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
        added = sorted(
            (token for token in backend["added_tokens"] if token["id"] < num_ids), key=lambda token: token["id"]
        )
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
        return cls(
            num_ids=num_ids,
            vocabulary=digest_json([pair for pair in pairs if pair[0] < num_ids]),
            model=digest_json([_meaning(parameters), scores]),
            merges=digest_json(merges),
            normalizer=digest_json(_meaning(backend.get("normalizer"))),
            pre_tokenizer=digest_json(_meaning(backend.get("pre_tokenizer"))),
            added_tokens=digest_json(added),
            affixes=_affixes(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            chat_template=_templates(tokenizer),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TokenizerIdentity":
        before, after = value["affixes"]
        return cls(**{**value, "affixes": (tuple(before), tuple(after))})

    def id_differences(self, other: "TokenizerIdentity") -> list[str]:
        """Where the two give different ids for the same text, or different text for the same ids."""
        return changes("tokenizer", self._parts(), other._parts())

    def use_differences(self, other: "TokenizerIdentity") -> list[str]:
        """Where texts or conversations become different input although the ids mean the same."""
        before, after = (
            {"affixes": each.affixes, "bos_token_id": each.bos_token_id, "eos_token_id": each.eos_token_id}
            for each in (self, other)
        )
        return changes("tokenizer", before, after) + _template_differences(self.chat_template, other.chat_template)

    def _parts(self) -> dict[str, Any]:
        return {
            "ids": self.num_ids,
            "vocabulary": self.vocabulary,
            "model": self.model,
            "merges": self.merges,
            "normalizer": self.normalizer,
            "pre-tokenizer": self.pre_tokenizer,
            "added tokens": self.added_tokens,
        }


def compare_tokenizer(stored: TokenizerIdentity, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], list[str]]:
    """Differences that forbid a tokenizer for cached pairs, and those that only deserve a warning. More ids are fine."""
    live = TokenizerIdentity.of(tokenizer, num_ids=stored.num_ids)
    if (size := max(tokenizer.get_vocab().values(), default=-1) + 1) < stored.num_ids:
        return [f"tokenizer: ids: {stored.num_ids} -> {size}"], []
    return stored.id_differences(live), stored.use_differences(live)


def _backend(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The parts of a tokenizer as the `tokenizers` library writes them; of other tokenizers, what can be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        fast: dict[str, Any] = json.loads(backend.to_str())
        return fast
    pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", bytes)()
    added = [
        {"id": number, **{flag: getattr(token, flag) for flag in _TOKEN_FLAGS}}
        for number, token in tokenizer.added_tokens_decoder.items()
    ]
    model = {"type": type(tokenizer).__name__, "pieces": hashlib.sha256(pieces).hexdigest()}
    return {"model": model, "added_tokens": added}


def _meaning(component: Any) -> Any:
    """A part of a tokenizer without unset parameters, offsets, and sequences of one."""
    if isinstance(component, list):
        return [_meaning(item) for item in component]
    if not isinstance(component, dict):
        return component
    members = component.get("normalizers") or component.get("pretokenizers")
    if component.get("type") == "Sequence" and members and len(members) == 1:
        return _meaning(members[0])
    is_unset = {name for name, value in component.items() if value is None or value is False or value == ""}
    return {name: _meaning(value) for name, value in component.items() if name not in is_unset | {"trim_offsets"}}


def _affixes(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Found by a trial, since one effect has many representations (post-processors, flags, Python code)."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return tuple(full), ()


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    template = tokenizer.chat_template
    return dict(template) if isinstance(template, dict) else {"default": template} if template else {}


def _template_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    differences = []
    for name in sorted(old.keys() | new.keys()):
        label = "chat template" if name == "default" else f"chat template {name}"
        if name not in old or name not in new:
            differences.append(f"{label}: none before, one now" if name in new else f"{label}: one before, none now")
        elif old[name] != new[name]:
            before, after = old[name].split("\n"), new[name].split("\n")
            same = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
            differences.append(
                f"{label}: differs from line {(min(len(before), len(after)) if same is None else same) + 1}"
            )
    return differences
