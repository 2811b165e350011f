"""What each model token is, in the eyes of Python: keyword, identifier, operator, string, comment, space, or prose."""

from __future__ import annotations

import io
import keyword
import tokenize

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from amoe.builtin.train.corpus import KIND_DOC, Document

CLASSES = ("space", "keyword", "identifier", "number", "operator", "string", "docstring", "comment", "prose")
_SPACE, _KEYWORD, _IDENTIFIER, _NUMBER, _OPERATOR, _STRING, _DOCSTRING, _COMMENT, _PROSE = range(len(CLASSES))
ClassArray = NDArray[np.int8]


def classify(tokenizer: Tokenizer, document: Document) -> ClassArray:
    """Class of each model token, `[num_tokens]`: that of the token's first character that is not space."""
    characters = _character_classes(document)
    encoding = tokenizer.encode(document.text)
    classes = np.zeros(len(encoding.ids), dtype=np.int8)
    for number, (start, stop) in enumerate(encoding.offsets):
        inside = characters[start:stop]
        solid = inside[inside != _SPACE]
        classes[number] = solid[0] if solid.size else _SPACE
    return classes


def _character_classes(document: Document) -> ClassArray:
    """Class of each character of the text."""
    text = document.text
    blank = np.array([c.isspace() for c in text], dtype=bool)
    if document.kind == KIND_DOC:
        return np.where(blank, _SPACE, _PROSE).astype(np.int8)
    classes = np.zeros(len(text), dtype=np.int8)
    line_starts = [0]
    for line in text.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start = line_starts[token.start[0] - 1] + token.start[1]
        stop = line_starts[token.end[0] - 1] + token.end[1]
        classes[start:stop] = _class_of(token)
    classes[blank] = _SPACE
    return classes


def _class_of(token: tokenize.TokenInfo) -> int:
    if token.type == tokenize.NAME:
        return _KEYWORD if keyword.iskeyword(token.string) else _IDENTIFIER
    if token.type == tokenize.STRING:
        return _DOCSTRING if '"""' in token.string or "'''" in token.string else _STRING
    return {tokenize.NUMBER: _NUMBER, tokenize.OP: _OPERATOR, tokenize.COMMENT: _COMMENT}.get(token.type, _SPACE)
