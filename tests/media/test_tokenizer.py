"""Tests prompt cleaning, token ids against transformers', truncation, and the tiny model's tokenizer file."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from wanfast.runtime.errors import CorruptArtifactError, MissingArtifactError
from wanfast.runtime.facts.model_spec import DEFAULT_NEGATIVE_PROMPT
from wanfast.runtime.media.tokenizer import PromptTokenizer, TokenizedPrompt, clean_prompt

ROOT = Path(__file__).parents[2]
TINY = ROOT / "wanfast/assets/tiny/tokenizer/tokenizer.json"
MAX_TOKENS = 32
PAD, END, UNK = 0, 1, 2

TEXTS = {
    "plain": "A small red circle moves right on a white background.",
    "double spaces": "  a  red   circle ",
    "newlines and tabs": "a\tred\n\ncircle",
    "chinese": "一只猫在海滩上。",
    "emoji": "a cat 🐈‍⬛ and 🏳️‍🌈",
    "special tokens": "a </s> b <pad> c <unk>",
    "empty": "",
    "only spaces": "  \n ",
    "over-long": "the camera zooms out and " * 40,
    "ligatures": "ﬁne ﬂowers of oﬃce",
    "control characters": "a\x00b\x07c\x1bd\u200be\ufefff",
    "combining": "cafe\u0301 Å naïve",
    "right to left": "قطة على الشاطئ",
}


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TINY, MAX_TOKENS)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ids_equal_transformers(tokenizer: PromptTokenizer, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(TINY), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    prompt = tokenizer.encode(text)
    cleaned = clean_prompt(text)
    assert prompt.text == cleaned
    assert list(prompt.ids) == reference(cleaned, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    assert prompt.num_tokens_before_truncation == len(reference(cleaned)["input_ids"])
    assert prompt.ids[-1] == END
    assert len(prompt.ids) <= MAX_TOKENS


def test_truncation_is_said_and_keeps_the_end_token() -> None:
    text = " ".join(["circle"] * 20)
    whole = PromptTokenizer(TINY, 512).encode(text)
    length = len(whole.ids)
    assert whole.num_tokens_before_truncation == length and not whole.truncated
    assert PromptTokenizer(TINY, length).encode(text) == whole
    cut = PromptTokenizer(TINY, length - 1).encode(text)
    assert cut == TokenizedPrompt(text=text, ids=(*whole.ids[: length - 2], END), num_tokens_before_truncation=length)
    assert cut.truncated
    assert PromptTokenizer(TINY, 1).encode(text).ids == (END,)
    assert PromptTokenizer(TINY, 512).encode("").ids == (END,)


def test_settings_saved_in_the_file_do_not_pad_or_cut(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(TINY))
    saved.enable_padding(length=64, pad_id=PAD, pad_token="<pad>")
    saved.enable_truncation(4)
    saved.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS["plain"]
    assert PromptTokenizer(tmp_path / "tokenizer.json", MAX_TOKENS).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("ＪＰＥＧ，ｒｅｄ！", "JPEG,red!"),  # full width -> ASCII
        ("“a” ‘b’ it’s", "\"a\" 'b' it's"),  # curly quotes -> straight
        ("cafÃ© â€œhiâ€\x9d", 'café "hi"'),  # UTF-8 that was read as Windows-1252
        ("一只猫。", "一只猫。"),  # the ideographic full stop stays
        ("a &amp;amp; b", "a & b"),  # entities, twice
        ("<b> &amp;amp; c", "<b> & c"),  # the same, although ftfy keeps entities in a text with a tag
        ("a&amp;nbsp;&nbsp;b", "a b"),
        ("  A\t Red\r\n\n Cat \u3000", "A Red Cat"),  # whitespace collapsed, case kept
        ("", ""),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean_prompt(raw) == cleaned


def test_default_negative_prompt_is_the_references() -> None:
    raw, cleaned = DEFAULT_NEGATIVE_PROMPT, clean_prompt(DEFAULT_NEGATIVE_PROMPT)
    assert len(raw) == 137
    assert sha256(raw) == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert sha256(cleaned) == "42811917cca5c2c7e47e55003083c67a4f9122f03b95a1cfe8a4001ea6a2e5d3"
    assert cleaned == raw.replace("，", ",")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match=r"absent\.json") as caught:
        PromptTokenizer(tmp_path / "absent.json", MAX_TOKENS)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\x00", TINY.read_bytes()[:-100]])
def test_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"broken\.json") as caught:
        PromptTokenizer(path, MAX_TOKENS)
    assert len(str(caught.value).splitlines()) == 1


def test_file_that_adds_no_end_token_is_refused(tmp_path: Path) -> None:
    document = json.loads(TINY.read_text())
    document["post_processor"] = None
    path = tmp_path / "endless.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptArtifactError, match=r"endless\.json"):
        PromptTokenizer(path, MAX_TOKENS)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tiny_tokenizer_represents_any_text(text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY))
    ids = tokenizer.encode(text).ids
    if "<unk>" not in text:
        assert UNK not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_tokenizer_is_what_the_script_makes() -> None:
    make_tokenizer = runpy.run_path(str(ROOT / "training/make_tokenizer.py"))["make_tokenizer"]
    made, stored = json.loads(make_tokenizer().to_str()), json.loads(TINY.read_text())
    assert made == stored
    vocab = stored["model"]["vocab"]
    assert (vocab["<pad>"], vocab["</s>"], vocab["<unk>"]) == (PAD, END, UNK)
    assert sorted(vocab.values()) == list(range(960))
    assert TINY.stat().st_size < 100_000


def test_importing_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'ftfy'}"
    script = f"import sys, wanfast.runtime.media.tokenizer; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
