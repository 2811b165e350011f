"""The training and held-out texts: sources and documentation that every Python installation carries.

Standard library only. A *document* is one source file, or one topic of `pydoc_data.topics` (the language reference).
Held-out modules are named one by one, and leave the training texts together with their tests. A module of which
training has a near copy (`wave` and `aifc`) is no good as held-out text.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

# Whole modules that training never sees: algorithms, text, numbers, dates, I/O, concurrency, a class-heavy one.
HELD_OUT_MODULES: tuple[str, ...] = (
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "netrc.py",
    "sched.py",
    "selectors.py",
    "shlex.py",
    "smtplib.py",
    "statistics.py",
    "textwrap.py",
)

# Topics of the language reference that training never sees (prose, not code): those which no other topic quotes.
HELD_OUT_TOPICS: tuple[str, ...] = (
    "calls",
    "slicings",
    "strings",
    "subscriptions",
    "truth",
)

# Neither trained on nor held out: a third of its word sequences stand in `pdb.py`.
SKIPPED_TOPICS: frozenset[str] = frozenset({"debugger"})

# Generated tables, vendored or deliberately broken files: many bytes, little to learn.
SKIPPED_DIRS: frozenset[str] = frozenset({"site-packages", "lib-dynload", "encodings", "__pycache__", "crashers"})
SKIPPED_FILES: frozenset[str] = frozenset({"pydoc_data/topics.py", "stringprep.py"})
TESTS_OF_HELD_OUT: frozenset[str] = frozenset({"cfgparser.py"})
MAX_FILE_BYTES = 240_000
MAX_DATA_FRACTION = 0.5  # of a file's lines; above it, a file is a table of data

KIND_LIBRARY, KIND_TEST, KIND_DOC = "library", "test", "doc"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text. `name` is relative to the standard library; `kind` is library, test or doc."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out documents, both in a fixed order."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def load_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the corpus from `stdlib` (by default the running interpreter's)."""
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    documents = _python_files(root) + _topics(root)
    train = tuple(d for d in documents if not is_held_out(d.name) and not is_test_of_held_out(d.name))
    held_out = tuple(d for d in documents if is_held_out(d.name))
    return Corpus(train=train, held_out=held_out)


def is_held_out(name: str) -> bool:
    """Whether a document is one of the held-out modules or topics."""
    return name in HELD_OUT_MODULES or name in {f"topics/{topic}" for topic in HELD_OUT_TOPICS}


def is_test_of_held_out(name: str) -> bool:
    """Whether a document is a test of a held-out module (which quotes it, so it must not be trained on either)."""
    if not _is_test(name):
        return False
    parts = name.split("/")
    if parts[-1] in TESTS_OF_HELD_OUT:
        return True
    stems = {Path(module).stem for module in HELD_OUT_MODULES}
    return any(part.removesuffix(".py").removeprefix("test_") in stems for part in parts)


def _is_test(name: str) -> bool:
    return any(part in {"test", "tests", "idle_test"} for part in name.split("/")[:-1])


def _python_files(root: Path) -> list[Document]:
    """Sources below `root`, without duplicates, in the order of their names."""
    documents, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if (
            SKIPPED_DIRS & set(name.split("/"))
            or name in SKIPPED_FILES
            or name.startswith(("_sysconfigdata", "config-"))
        ):
            continue
        text = _read_source(path)
        if text is None or (not is_held_out(name) and _is_table(text)):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            documents.append(Document(name=name, kind=KIND_TEST if _is_test(name) else KIND_LIBRARY, text=text))
    return documents


def _read_source(path: Path) -> str | None:
    """The text of a source file, or None where it is empty, too large or not decodable."""
    if not 64 <= path.stat().st_size <= MAX_FILE_BYTES:
        return None
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
    return text.expandtabs(8).replace("\r\n", "\n").replace("\f", "")


def _is_table(text: str) -> bool:
    """Whether most lines are literals (hex bytes, numbers): a table of data rather than code."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    literal = sum(1 for line in lines if line[0] in "0123456789'\"(b[" and not any(c in line for c in "=."))
    return not lines or literal > MAX_DATA_FRACTION * len(lines)


def _topics(root: Path) -> list[Document]:
    """The language reference that `help()` shows, one document a topic. Parsed: `root` need not be importable."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [
                Document(name=f"topics/{topic}", kind=KIND_DOC, text=text)
                for topic, text in sorted(topics.items())
                if topic not in SKIPPED_TOPICS
            ]
    return []
