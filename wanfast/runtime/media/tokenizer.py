"""Turns a prompt into token ids, as UMT5 was trained to read them.

The text is cleaned and split into tokens, and </s> is appended. The text must be cleaned, because the model was trained
on cleaned texts. Cleaning rewrites full-width punctuation, for example, and thus changes the ids of the default
negative prompt. Ids are not padded, because UMT5 gives the same vectors with or without padding.

Limit: a prompt longer than `max_tokens` loses its end (never its </s>); `TokenizedPrompt.truncated` reports this.
The parent process imports this module. Therefore, this module imports neither torch nor transformers, and imports large
packages only when they are needed. The small `tokenizers` library reads `tokenizer.json`, which holds the whole
tokenizer.

Source: the text tokenizer and the shared configuration of Wan-Video/Wan2.2 (42bf4cf).
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.errors import CorruptArtifactError, MissingArtifactError, foreign

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_TOKEN = "</s>"
_AGAIN = "this file is not a readable tokenizer.json; copy it again"


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """This class holds a cleaned prompt and its ids, which end in </s>."""

    text: str
    ids: tuple[int, ...]
    num_tokens_before_truncation: int

    @property
    def truncated(self) -> bool:
        return len(self.ids) < self.num_tokens_before_truncation


class PromptTokenizer:
    """This class tokenizes with one `tokenizer.json` and truncates to `max_tokens` ids, </s> included.

    Raises MissingArtifactError if the file is missing, and CorruptArtifactError if it is not UMT5's tokenizer.
    """

    def __init__(self, tokenizer_json: Path, max_tokens: int) -> None:
        self._file, self._max_tokens = tokenizer_json, max_tokens
        self._tokenizer = _load(tokenizer_json)

    def encode(self, text: str) -> TokenizedPrompt:
        """Cleans and tokenizes `text`.

        If `text` contains a special token, such as </s>, the special token gets its own id, as in Wan2.2.
        """
        cleaned = clean_prompt(text)
        with foreign(str(self._file), _AGAIN, CorruptArtifactError):
            *ids, end = self._tokenizer.encode(cleaned).ids
        kept = (*ids[: self._max_tokens - 1], end)
        return TokenizedPrompt(text=cleaned, ids=kept, num_tokens_before_truncation=len(ids) + 1)


def clean_prompt(text: str) -> str:
    """Repairs mojibake, replaces full-width characters and curly quotes, and resolves HTML entities (twice).

    Then each run of whitespace becomes one space.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _load(tokenizer_json: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    with foreign(str(tokenizer_json), _AGAIN, CorruptArtifactError):
        is_missing = not tokenizer_json.is_file()
    if is_missing:
        raise MissingArtifactError(f"{tokenizer_json} is missing: copy the model folder again")
    with foreign(str(tokenizer_json), _AGAIN, CorruptArtifactError):
        tokenizer = Tokenizer.from_buffer(tokenizer_json.read_bytes())
        tokenizer.no_padding()  # the file may have such settings
        tokenizer.no_truncation()
        ends, end = tokenizer.encode("").ids[-1:], tokenizer.token_to_id(END_TOKEN)
    if ends != [end]:
        raise CorruptArtifactError(
            f"{tokenizer_json} does not append {END_TOKEN} to a text: replace this file by UMT5's tokenizer.json"
        )
    return tokenizer
