"""The checkpoint's tokenizer and chat template, exactly as Hugging Face runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from amoe.engine.chat_template import ChatTemplate, ChatTemplates
from amoe.engine.detokenizer import ByteDecoder, Detokenizer, TokenDecoder, WindowDecoder
from amoe.errors import CheckpointError, RequestError
from amoe.models.config import read_json_object
from amoe.types import SamplingParams

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: those that print stand for themselves, the rest come from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet


BYTE_OF_CHAR = _byte_alphabet()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; empty if there is no such file.

    Raises:
        CheckpointError: if the file is no JSON object.
    """
    return read_json_object(path) if path.exists() else {}


def _is_local(name: str, value: Any) -> bool:
    """An entry of tokenizer_config.json that tells where the checkpoint has been."""
    return name == "name_or_path" or (isinstance(value, str) and Path(value).is_absolute())


class Tokenizer:
    """Text to ids and back, for one checkpoint directory.

    Attributes:
        vocab_size: ids that the tokenizer knows; the model's embedding may have more rows.
        special_ids: tokens that stand for no text.

    Raises:
        CheckpointError: if the directory has no tokenizer.json, or a file in it cannot be read.
    """

    def __init__(self, path: str | Path, chat_template: str | Path | None = None) -> None:
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: amoe needs the tokenizer in this format")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = read_json(directory / "tokenizer_config.json")
        self._special_tokens = self._read_special_tokens(directory)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids: set[int] = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._is_byte_level = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        if chat_template is None:
            self._templates = ChatTemplates.from_directory(directory, self._config)
        else:
            self._templates = ChatTemplates.from_file(Path(chat_template))
        # Every token stands for at least one and at most this many characters, which bounds a text's length in tokens.
        self.max_token_chars = max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model expects around a text."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode: {error.reason} at {error.start}") from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token are left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token stands for, special or not; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            # The same rule as the library's: a token with a character outside the alphabet is text, not byte stand-ins.
            if all(char in BYTE_OF_CHAR for char in token):
                return bytes(BYTE_OF_CHAR[char] for char in token)
            return token.encode("utf-8")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if token_id in self.special_ids:
            return token.encode("utf-8")
        return token.replace("▁", " ").encode("utf-8")

    def detokenizer(self, params: SamplingParams) -> Detokenizer:
        """A fresh detokenizer for one sequence."""
        decoder: TokenDecoder
        skipped = self.special_ids.difference(params.visible_token_ids) if params.skip_special_tokens else set[int]()
        if self._is_byte_level:
            decoder = ByteDecoder(lambda token_id: b"" if token_id in skipped else self.token_bytes(token_id))
        else:
            decoder = WindowDecoder(lambda ids: self.decode([i for i in ids if i not in skipped], False))
        return Detokenizer(decoder, params.stop, params.include_stop_str_in_output, params.min_tokens)

    def chat_template(self, *, with_tools: bool = False) -> ChatTemplate:
        """The template for a conversation with or without tools.

        Raises:
            RequestError: if there is none.
        """
        template = self._templates.choose(with_tools=with_tools)
        if template is None:
            raise RequestError(
                "this model has no chat template (chat_template.jinja or tokenizer_config.json): use /v1/completions",
                param="messages",
            )
        return template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        template: ChatTemplate | None = None,
    ) -> str:
        """Prompt text of a conversation.

        Args:
            template: None: the checkpoint's own.

        Raises:
            RequestError: if the checkpoint has no chat template, or the template rejects the messages.
        """
        return (template or self.chat_template()).render(messages, {**self._special_tokens, **variables})

    def token(self, token_id: int) -> str:
        """How the vocabulary writes one token, with its stand-ins for bytes; empty for an id without a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def info(self) -> dict[str, Any]:
        """What the checkpoint says of its tokenizer, special tokens and chat template; no path of this machine."""
        template = self._templates.choose(with_tools=False)
        said = {name: value for name, value in self._config.items() if not _is_local(name, value)}
        return said | self._special_tokens | ({} if template is None else {"chat_template": template.source})

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token `text`; None if that is ordinary text here, or several tokens."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def _read_special_tokens(self, directory: Path) -> dict[str, str]:
        """Special tokens by name: from tokenizer_config.json, or, in older checkpoints, special_tokens_map.json."""
        found = {}
        sources = (self._config, read_json(directory / "special_tokens_map.json"))
        for name in SPECIAL_TOKEN_NAMES:
            for source in sources:
                token = source.get(name)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found[name] = token
                    break
        return found
