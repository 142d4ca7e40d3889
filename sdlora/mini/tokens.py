"""The mini base's tokenizer: CLIP's byte-level BPE, learned on the world's own words so that each is one token.

Any other word still has tokens (its letters), so a trigger word that nobody has thought of works here as in Stable Diffusion.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from sdlora.mini import world

SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def words() -> list[str]:
    """Every word that a caption of the world can hold, without the example character's name and the styles."""
    return sorted({*world.KINDS, *world.COLOURS, *world.BACKGROUNDS, *["a", "an", "on", "and", "background", "small", "big"]})


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learns vocabulary and merges, writes `vocab.json` and `merges.txt` into `folder`, and opens them as a `CLIPTokenizer`."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator([" ".join(words())] * 4, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), *SPECIAL])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
