#!/usr/bin/env python3
"""Train a WordPiece tokenizer on a corpus; AutoTokenizer loads the result.

python pipeline/tokenizer.py --corpus docstrings --vocab-size 8192 --output runs/tokenizer
python pipeline/tokenizer.py --corpus 'articles/*.parquet' --text-column body --output runs/tokenizer
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import BertTokenizer

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from pipeline.corpus.plan import UNITS, Corpus, plan_corpus
from pipeline.corpus.readers import Rejects, read_documents

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABET = 1000  # characters; rarer ones become [UNK]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    corpus = plan_corpus(
        args.corpus, text_column=args.text_column, document=args.document, limit_documents=args.limit_documents
    )
    if corpus.from_shards:
        raise UsageError(f"{args.corpus} holds tokens, not text, and has a tokenizer already; name the text corpus")
    made_from = {"corpus": corpus.identity, "vocab_size": args.vocab_size, "lowercase": args.lowercase}
    origin = args.output / "made_from.json"
    if origin.exists():
        try:
            same = storage.read_json(str(origin)) == made_from
        except ValueError:
            same = False
        if not same:
            raise UsageError(f"{args.output} holds a tokenizer with other settings; choose a new --output")
        print(f"{args.output} is finished already")
        return
    started = args.output / "unfinished"  # left by a killed run, whose files may be overwritten
    if args.output.exists() and any(args.output.iterdir()) and not started.exists():
        raise UsageError(f"{args.output} is not empty; choose a new --output")
    rejects = Rejects()
    texts = list(documents(corpus, rejects))
    tokenizer = train(texts, args.vocab_size, args.lowercase)
    storage.write_bytes(str(started), b"")
    tokenizer.save_pretrained(args.output)
    storage.write_json(str(origin), made_from)  # it marks the tokenizer as complete
    started.unlink()
    print(
        f"{args.output}: {len(tokenizer):,} tokens from {rejects.documents:,} documents"
        f" ({rejects.reasons.total():,} rejected)"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = console.Parser(prog="pipeline/tokenizer.py", description=__doc__)
    add = parser.add_argument
    add("--corpus", required=True, help="as for pipeline/score.py")
    add("--output", required=True, type=Path, help="directory of the tokenizer")
    add("--vocab-size", type=console.positive, default=8192, help="tokens, special tokens included (default: 8192)")
    add("--lowercase", action=argparse.BooleanOptionalAction, default=True, help="lower-case the text (default: yes)")
    add("--text-column", help="column or key of the text (default: text)")
    add("--document", choices=UNITS, help="unit of a document in plain-text files (default: paragraph)")
    add("--limit-documents", type=console.positive, help="only the first N documents of the corpus")
    return parser.parse_args(argv)


def documents(corpus: Corpus, rejects: Rejects) -> Iterator[str]:
    """The texts of the whole corpus; shows progress by shard."""
    with console.Progress(len(corpus.shards), "shards", "reading") as progress:
        for ranges in corpus.shards:
            yield from (document.text for document in read_documents(ranges, corpus.text_column, rejects))
            progress.advance(1)


def train(texts: list[str], vocab_size: int, lowercase: bool = True) -> BertTokenizer:
    """A BERT-style WordPiece tokenizer; the same texts give the same tokenizer.

    The trainer alone does not guarantee that: it numbers single characters in the order of a randomly seeded hash map,
    and resolves ties by number. So a first pass without merges collects the characters, and the second pass gets them
    in order, as special tokens.

    Raises:
        UsageError: the vocabulary is too small for the characters of the corpus, or the corpus too small for it.
    """
    alphabet = most_frequent_characters(texts, lowercase)
    fixed = {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet), "show_progress": sys.stderr.isatty()}
    characters = BertWordPieceTokenizer(lowercase=lowercase)
    characters.train_from_iterator(texts, vocab_size=1, special_tokens=SPECIAL_TOKENS, **fixed)
    ordered = sorted(characters.get_vocab().keys() - set(SPECIAL_TOKENS))
    trained = BertWordPieceTokenizer(lowercase=lowercase)
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *ordered], **fixed)
    wordpiece = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=lowercase)
    size = wordpiece.get_vocab_size()
    if size > vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: the characters of the corpus need {size}; choose a larger one"
        )
    if size < vocab_size:
        raise UsageError(
            f"the corpus is too small for --vocab-size {vocab_size}: it gives {size} tokens; choose at most {size}"
        )
    return BertTokenizer(tokenizer_object=Tokenizer.from_str(wordpiece.to_str()), do_lower_case=lowercase)


def most_frequent_characters(texts: list[str], lowercase: bool) -> list[str]:
    """The ``ALPHABET`` most frequent normalised characters, sorted; ties to the lower code point."""
    normalizer = BertWordPieceTokenizer(lowercase=lowercase).normalizer
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]
    return sorted(character for character in kept if not character.isspace())


if __name__ == "__main__":
    console.run(main)
