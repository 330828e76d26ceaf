"""The flags of train/explore.py."""

from dataclasses import dataclass
from typing import Literal

from entropy_masking import storage
from entropy_masking.commands.flags import Parser, check_rules, option
from entropy_masking.commands.mask_flags import MaskOptions
from entropy_masking.errors import UsageError
from train.options import check_ranges


@dataclass(kw_only=True)
class Options(MaskOptions):
    """The flags."""

    output: str | None = option("HTML file to write (default: only print the summary)")
    limit: int = option("maximum number of sequences for the statistics (default: 10000)", 10_000)
    sequences: int = option("sequences to show as text on the page (default: 6)", 6)
    entropy_source: Literal["parquet", "random"] = option("mask by the scores of the shards, or at random", "parquet")
    seed: int = option("seed of the masks; the masks of the first epoch are shown", 42)


def parse(argv: list[str] | None, description: str | None) -> tuple[Options, list[str]]:
    """The flags, and one or two shard directories. Raises UsageError."""
    parser = Parser("train/explore.py", description)
    parser.add_argument("directory", metavar="DIR", help="shard directory with scores, a path or a URI")
    parser.add_argument("other", metavar="DIR2", nargs="?", help="another directory: other scores of the same tokens")
    parser.add_fields(Options)
    given = vars(parser.parse_args(argv))
    directories = [uri for uri in (given.pop("directory"), given.pop("other")) if uri]
    check_ranges(given)
    of_page = "{flag} only applies to the page; name its file with --output, or leave it out"
    check_rules(given, [(not given["output"], {"sequences": Options.sequences}, of_page)])
    options = Options(**given)
    if options.output and storage.exists(options.output) and storage.size(options.output) is None:
        raise UsageError(f"--output {options.output} is a directory; name a file, such as {options.output}/page.html")
    return options, directories
