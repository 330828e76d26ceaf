#!/usr/bin/env python3
"""Show the entropies of a shard directory and the tokens that would be masked: a summary, and optionally a page.

    python train/explore.py runs/scored
    python train/explore.py runs/scored --output entropy.html
    python train/explore.py runs/scored --mask-temperature 1 --mask-unit word --output entropy.html
    python train/explore.py runs/scored runs/self-entropies --output difference.html

The page is one file that needs no network. Two directories must hold other scores of the same tokens, such as those of
a teacher and a student. See docs/explore.md.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking.commands import console
from train.explorer.options import parse

if __name__ == "__main__":
    console.check_flags(lambda: parse(sys.argv[1:], __doc__))  # before the imports that take seconds

from entropy_masking import storage
from entropy_masking.commands.mask_flags import check_scored, mask_policy
from entropy_masking.errors import UsageError
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import read_manifest, shard_tokenizer
from entropy_masking.shards.read import masker_of
from train.explorer import sample, statistics
from train.explorer.sample import Source, View
from train.explorer.summary import summarise


def main(argv: list[str] | None = None) -> None:
    options, directories = parse(argv, __doc__)
    mask = mask_policy(options, options.entropy_source, options.seed)
    manifests = [read_manifest(uri) for uri in directories]
    for manifest in manifests:
        check_shards(manifest, contents=False)
        if manifest.sequences_hash != manifests[0].sequences_hash:
            fix = f"score one with --corpus {directories[0]}, which keeps them"
            raise UsageError(f"{directories[0]} and {manifest.uri} hold different tokens; {fix}")
        check_scored(mask, "parquet", manifest)  # its statistics need scores, even if masks are random
    view = View(masker_of(manifests[0], mask.unit), mask, shard_tokenizer(manifests[0].uri))
    picks = sample.pick(manifests, options.limit)
    if not picks:
        raise UsageError(f"no sequence is in {' and '.join(directories)}; finish the scoring")
    ends = [storage.absolute(uri).rstrip("/").rpartition("/")[2] for uri in directories]
    names = ends if len(set(ends)) == len(ends) else directories
    sources = [
        Source(name, manifest, sample.frame_of(manifest, picks, view))
        for name, manifest in zip(names, manifests, strict=True)
    ]
    if statistics.side_by_side(sources[0].frame, sources[-1].frame).is_empty():
        raise UsageError(f"no token of {' and '.join(directories)} has scores; score a corpus that has text")
    summary = summarise(sources, mask, view.label)
    for title, lines in summary.items():
        print(title)
        for name, text in lines.items():
            print(f"  {name:12} {text}")
    if options.output:
        from train.explorer.page import render  # matplotlib is slow to import

        texts = sample.texts(sources, picks, options.sequences, view)
        storage.write_bytes(options.output, render(sources, mask, summary, texts).encode())
        print(f"written to {options.output}")


if __name__ == "__main__":
    console.run(main)
