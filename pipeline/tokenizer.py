#!/usr/bin/env python3
"""Train a tokenizer on a corpus; AutoTokenizer loads the result.

    python pipeline/tokenizer.py --corpus docstrings --vocab-size 8192 --output runs/tokenizer
    python pipeline/tokenizer.py --corpus 'articles/*.parquet' --text-column body --output runs/tokenizer
    python pipeline/tokenizer.py --corpus texts --kind bpe --output runs/tokenizer

WordPiece needs few tokens for a language with spaces. A byte-level BPE has no unknown tokens in any language. Both keep
case and accents, unless you pass --lowercase or --strip-accents. See docs/scoring.md.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import Parser, positive
from entropy_masking.errors import UsageError
from entropy_masking.shards import commit
from pipeline.corpus.packing import pieces, text_tokenizer, tokenize
from pipeline.corpus.plan import Corpus, plan_corpus
from pipeline.corpus.readers import Document, Reader, Rejects, read_documents
from pipeline.options import add_text_flags, text_options

# by role, in the order of their ids; a byte-level BPE has no [UNK]
SPECIAL_TOKENS = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
LAST_FILE = "tokenizer_config.json"  # of a tokenizer, whose files are written by name
ALPHABET = 1000  # characters of a WordPiece vocabulary; rarer ones become [UNK]
WORD_CHARACTERS = 100  # a longer word becomes [UNK]
MUCH_UNKNOWN = 0.001  # share of [UNK] tokens that is worth a warning


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    corpus = plan_corpus(args.corpus, output=str(args.output), **text_options(args))
    if corpus.from_shards:
        raise UsageError(f"{args.corpus} holds tokens, not text, and has a tokenizer already; name the text corpus")
    settings = {name: getattr(args, name) for name in ("vocab_size", "kind", "lowercase", "strip_accents")}
    made_from = {"corpus": corpus.identity, **settings}
    origin = args.output / "made_from.json"  # written first, so that a killed run can be repeated
    if origin.exists():
        same = False
        with contextlib.suppress(ValueError):
            same = storage.read_json(str(origin)) == made_from
        if not same:
            raise UsageError(f"{args.output} holds a tokenizer with other settings; choose a new --output")
        if (args.output / LAST_FILE).exists():
            print(f"{args.output} is finished already")
            return
    elif args.output.exists() and any(args.output.iterdir()):
        raise UsageError(f"{args.output} is not empty; choose a new --output")
    texts = Texts(corpus)
    if next(iter(texts), None) is None:
        reasons = "; ".join(sorted(texts.rejects.reasons)) or "no documents"
        raise UsageError(f"the corpus holds no usable text ({reasons}); choose another --corpus")
    tokenizer = train(texts, **settings)
    storage.write_json(str(origin), made_from)
    commit.save_tokenizer(tokenizer, str(args.output))
    rejects = texts.rejects
    rejected = f"{rejects.reasons.total():,} rejected"
    for first in rejects.listed[:1]:
        after = f" after byte {first['from_byte']:,}" if "from_byte" in first else ""
        rejected += f", the first in {first['file']}, line {first['line']}{after}: {first['reason']}"
    print(f"{args.output}: {len(tokenizer):,} tokens from {rejects.documents:,} documents ({rejected})")
    print_coverage(tokenizer, texts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("pipeline/tokenizer.py", __doc__)
    add = parser.add_argument
    add("--corpus", required=True, help="as for pipeline/score.py")
    add("--output", required=True, type=Path, help="directory of the tokenizer")
    add("--vocab-size", type=positive, default=8192, help="tokens, special tokens included (default: 8192)")
    add("--kind", choices=KINDS, default="wordpiece", help="wordpiece (default), or bpe: byte-level, without [UNK]")
    add("--lowercase", action="store_true", help="lower-case the text")
    marks = "remove combining marks: accents, but also vowel signs of languages such as Hindi and Thai"
    add("--strip-accents", action="store_true", help=marks)
    add_text_flags(parser)
    return parser.parse_args(argv)


class Texts:
    """The texts of a corpus. Each iteration reads its files again, so that memory holds only a few texts.

    ``rejects`` are those of the last iteration.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.rejects = corpus, Rejects()

    def documents(self) -> Iterator[Document]:
        """The usable documents; shows progress by shard."""
        self.rejects, reader = Rejects(), Reader()
        with console.Progress(len(self.corpus.shards), "shards", "reading") as progress:
            for ranges in self.corpus.shards:
                documents = read_documents(ranges, reader, self.rejects)
                yield from (document for document in documents if pieces(document, True, self.rejects))
                progress.advance(1)

    def __iter__(self) -> Iterator[str]:
        for document in self.documents():
            yield from pieces(document, True, Rejects())  # both kinds count the same words in pieces as in one go


def print_coverage(tokenizer: PreTrainedTokenizerFast, texts: Texts) -> None:
    """Print how well the tokenizer fits its corpus: tokens per word (between spaces), and the share of [UNK]."""
    count_V, words = np.zeros(len(tokenizer), np.int64), 0

    def counted() -> Iterator[Document]:
        nonlocal words
        for document in texts.documents():
            words += len(document.text.split())
            yield document

    for ids in tokenize(counted(), text_tokenizer(tokenizer), Rejects()):
        np.add.at(count_V, ids, 1)
    tokens, unknown = int(count_V.sum()), int(count_V[tokenizer.unk_token_id]) if tokenizer.unk_token else 0
    share = unknown / max(tokens, 1)
    print(f"  {tokens / words:.2f} tokens per word, {share:.2%} of the tokens are [UNK]")
    if share > MUCH_UNKNOWN:
        print(
            f"warning: {share:.1%} of the tokens are [UNK], so their text is lost: it has characters beyond the "
            f"{ALPHABET:,} most frequent, or words of more than {WORD_CHARACTERS} characters; use --kind bpe, which "
            "has no [UNK]",
            file=sys.stderr,
        )


def train(
    texts: Iterable[str], vocab_size: int, kind: str = "wordpiece", lowercase: bool = False, strip_accents: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``KINDS``, with the special tokens of BERT. The same texts give the same tokenizer.

    ``texts`` are iterated several times.

    Raises:
        UsageError: the vocabulary is too small for the characters of the corpus, or the corpus too small for it.
    """
    bert = kind == "wordpiece"  # clean and split the text as BERT does
    case_and_marks = normalizers.BertNormalizer(
        clean_text=bert, handle_chinese_chars=bert, strip_accents=strip_accents, lowercase=lowercase
    )
    backend = KINDS[kind](texts, vocab_size, normalizers.Sequence([normalizers.NFC(), case_and_marks]))
    size = backend.get_vocab_size()
    if size > vocab_size:
        problem = f"--vocab-size {vocab_size} is too small: single characters and special tokens need {size}"
        raise UsageError(f"{problem}; choose a larger one")
    if size < vocab_size:
        problem = f"the corpus is too small for --vocab-size {vocab_size}: it gives {size} tokens"
        raise UsageError(f"{problem}; choose at most {size}")
    special_tokens = {role: token for role, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    # not a BertTokenizer: it would replace the normalizer by its own
    names = BertTokenizer.model_input_names
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special_tokens)


def train_wordpiece(texts: Iterable[str], vocab_size: int, normalizer: normalizers.Normalizer) -> Tokenizer:
    """The trainer alone does not always give the same vocabulary: it numbers single characters in the order of a
    randomly seeded hash map, and resolves ties by number. So a first pass without merges collects the characters, and
    the second pass gets them in order, as special tokens.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]  # ties to the lower code
    alphabet = sorted(character for character in kept if not character.isspace())
    special_tokens = list(SPECIAL_TOKENS.values())

    def of(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=WORD_CHARACTERS)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def vocabulary(size: int, first: list[str]) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=sys.stderr.isatty(),
        )
        tokenizer = of()
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    characters = sorted(vocabulary(1, special_tokens).keys() - set(special_tokens))
    return of(vocabulary(vocab_size, [*special_tokens, *characters]))


def train_bpe(texts: Iterable[str], vocab_size: int, normalizer: normalizers.Normalizer) -> Tokenizer:
    """Byte-level: all 256 bytes are tokens. A word is the same at the start of a text as after a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[token for token in SPECIAL_TOKENS.values() if token != "[UNK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


KINDS = {"wordpiece": train_wordpiece, "bpe": train_bpe}


if __name__ == "__main__":
    console.run(main)
