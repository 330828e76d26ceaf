"""explore.py: its statistics against numpy and scipy, what it prints, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from browser import Browser, needs_browser
from harness import SCORE, TOP_K, command, save_bert
from scipy.stats import spearmanr
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

import pipeline.score
import train.explore
from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.manifests import Manifest, load_tokenizer, read_manifest
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Columns, read_rows
from entropy_masking.shards.schema import Run
from train.explorer import sample, statistics

WORDS = ["--mask-unit", "word", "--mask-temperature", "1", "--mask-ratio", "0.3"]
SEED = "3"


# --- statistics ------------------------------------------------------------------------------------------------------

N, L, V = 40, 150, 60


def made(seed: int) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """A frame of made-up tokens, and the arrays that it was made of."""
    rng = np.random.default_rng(seed)
    ids = np.random.default_rng(0).zipf(1.4, (N, L)).clip(1, V - 1)
    arrays = {"ids": ids, "masked": rng.random((N, L)) < 0.2}
    for name in statistics.MEASURES:
        arrays[name] = rng.gamma(1.0, 2.0, (N, L)).astype(np.float16).astype(np.float32) + ids / 20
        arrays[name][:, 0] = np.nan
        arrays[name][3, 50:] = np.nan
    scores = {name: arrays[name] for name in statistics.MEASURES}
    return statistics.tokens(ids, scores, arrays["masked"], np.arange(V) >= 12, np.arange(V) % 9 == 4), arrays


def by(found: pl.DataFrame, column: str = "label") -> dict[Any, dict[str, float]]:
    return {row[column]: row for row in found.iter_rows(named=True)}


def test_a_frames_statistics_are_those_of_its_arrays() -> None:
    frame, arrays = made(1)
    ids, entropy = arrays["ids"], arrays["entropy"].astype(np.float64)
    scored = ~np.isnan(entropy)

    found = statistics.spread(frame, "surprisal")
    values = arrays["surprisal"][scored].astype(np.float64)
    expected = dict(zip(("low", "median", "high"), np.quantile(values, [0.1, 0.5, 0.9]), strict=True))
    assert found == pytest.approx(expected | {"mean": values.mean()})
    assert statistics.spread(frame.with_columns(surprisal=pl.lit(None, pl.Float32)), "surprisal") == {}

    shares = np.array(statistics.histogram(frame, "entropy", 0.5, 12))
    counts = np.histogram(entropy[scored].clip(0, 5.9), bins=12, range=(0, 6))[0]
    assert np.allclose(shares, counts / counts.sum()) and shares[-1] > 0

    def check(row: dict[str, float], where: np.ndarray) -> None:
        assert row["count"] == (where & scored).sum() and row["share"] == pytest.approx(row["count"] / scored.sum())
        for name in statistics.MEASURES:
            assert row[name] == pytest.approx(arrays[name][where & scored].astype(np.float64).mean())

    counted = sorted(((np.sum((ids == t) & scored), -t) for t in range(V)), reverse=True)
    rank = {-t: place for place, (count, t) in enumerate(counted, 1) if count}
    found = by(statistics.by_frequency(frame))
    assert list(found) == ["1–10", "11–30", "31–100"]
    for label, row in found.items():
        low, high = map(int, label.split("–"))
        check(row, np.isin(ids, [t for t, place in rank.items() if low <= place <= high]))

    apart = ids % 9 == 4
    continues = (ids >= 12) & ~apart & ~np.pad(apart[:, :-1], ((0, 0), (1, 0)))
    followed = np.pad(continues[:, 1:], ((0, 0), (0, 1)))
    found = by(statistics.by_part(frame))
    check(found["continuation"], continues)
    check(found["first token"], ~continues & followed)
    check(found["whole word"], ~continues & ~followed)

    found = by(statistics.by_position(frame))
    assert len(found) <= statistics.MOST_POSITIONS and set(np.diff(list(found))) == {3}
    for start, row in found.items():
        check(row, (np.arange(L) // 3 == start // 3)[None].repeat(N, 0))
    found = by(statistics.by_third(frame))
    check(found["last"], (np.arange(L) >= 100)[None].repeat(N, 0))
    found = by(statistics.by_mask(frame))
    check(found["masked"], arrays["masked"])

    found = statistics.by_token(frame, 20)
    assert found["entropy"].is_sorted(descending=True)
    assert set(found["label"]) == {t for t in range(V) if np.sum((ids == t) & scored) >= 20}
    for row in found.iter_rows(named=True):
        check(row, ids == row["label"])


def test_two_frames_are_compared_where_both_are_scored() -> None:
    (first, a), (second, b) = made(1), made(2)
    b["entropy"][5, 20:] = b["entropy"][7] = np.nan
    second = second.with_columns(entropy=pl.Series(b["entropy"].ravel()).fill_nan(None))
    both = ~np.isnan(a["entropy"]) & ~np.isnan(b["entropy"])
    found = by(statistics.agreement(first, second), "sequence")
    assert list(found) == list(range(N)) and found[7]["correlation"] is None
    for row in set(range(N)) - {7}:
        rho = spearmanr(a["entropy"][row][both[row]], b["entropy"][row][both[row]]).statistic
        assert found[row]["correlation"] == pytest.approx(rho)
        assert found[row]["overlap"] == pytest.approx((a["masked"] & b["masked"])[row].sum() / a["masked"][row].sum())

    rises = {t: b["entropy"][both & (a["ids"] == t)] - a["entropy"][both & (a["ids"] == t)] for t in range(V)}
    expected = {t: rise.astype(np.float64).mean() for t, rise in rises.items() if len(rise) >= 20}
    rose, fell = statistics.movements(first, second, 20)
    moved = pl.concat([rose, fell])
    assert dict(zip(moved["label"], moved["rise"], strict=True)) == pytest.approx(expected, abs=1e-6)
    assert rose["rise"].is_sorted(descending=True) and rose["rise"].min() > 0  # type: ignore[operator]
    assert fell["rise"].is_sorted() and fell["rise"].max() < 0  # type: ignore[operator]
    higher = first.with_columns(pl.col("entropy") + 1)
    assert statistics.movements(first, higher, 20)[1].is_empty(), "where all rise, none falls"

    cells = np.histogram2d(*(x["entropy"][both].clip(0, 5.9) for x in (a, b)), bins=6, range=[(0, 6)] * 2)[0]
    for x, y, share in statistics.joint(first, second, 1.0, 6).rows():
        assert share == pytest.approx(cells[x, y] / both.sum())


def test_a_sample_is_spread_over_row_groups_and_reads_few(scored: Path) -> None:
    manifest = read_manifest(str(scored))

    def holding(*rows: int) -> Manifest:
        first = manifest.shards[0]
        entries = [first.model_copy(update={"index": index, "rows": size}) for index, size in enumerate(rows)]
        return manifest.model_copy(update={"shards": entries})

    for rows, limit in (((1500, 10, 2048), 300), ((1500, 10, 2048), 9_999), ((3 * ROW_GROUP,) * 300, 1000), ((5,), 2)):
        picks = sample.pick([holding(*rows)], limit)
        chosen = {(index, block * ROW_GROUP + row) for index, block, taken in picks for row in taken.tolist()}
        assert len(chosen) == min(limit, sum(rows)) == sum(len(taken) for *_, taken in picks)
        assert all(row < rows[index] for index, row in chosen) and len(picks) <= sample.GROUPS
        assert picks == sorted(picks, key=lambda each: each[:2]) and picks[0][2].dtype.kind == "i"
    of_both = sample.pick([holding(20, 30, 40), holding(20, 31, 40)], 1000)
    assert {index for index, *_ in of_both} == {0, 2}, "shards that both have"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's corpus scored by a teacher that is surer of some tokens than of others."""
    root = tmp_path_factory.mktemp("explore")
    shutil.copytree(work / "teacher", root / "teacher")
    teacher = AutoModelForMaskedLM.from_pretrained(root / "teacher")
    teacher.get_output_embeddings().weight.data *= 40
    teacher.save_pretrained(root / "teacher")
    flags = [flag.replace(str(work / "teacher"), str(root / "teacher")) for flag in command(work, root / "scored")]
    pipeline.score.main([*flags[len(SCORE) :], "--backend", "local"])
    return root / "scored"


def explore(*arguments: object) -> None:
    train.explore.main([str(argument) for argument in arguments])


def test_words_of_a_byte_level_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Punctuation is no part of a word; the first of a text, in a bracket or on a line begins without a mark."""
    text = 'Hello cats, believers (mats)\n"naïve cats": $300!'
    backend = ByteLevelBPETokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator([text], vocab_size=275, special_tokens=special, min_frequency=1, show_progress=False)
    roles = {f"{token[1:-1].lower()}_token": token for token in special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **roles)
    save_bert(tmp_path / "teacher", tokenizer)
    (tmp_path / "corpus.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 2)
    flags = ["--corpus", tmp_path / "corpus.jsonl", "--teacher", tmp_path / "teacher", "--output", tmp_path / "scored"]
    pipeline.score.main([str(flag) for flag in (*flags, "--sequence-length", 64, "--backend", "local")])
    seen: list[sample.Source] = []
    monkeypatch.setattr(train.explore, "summarise", lambda sources, *_: seen.extend(sources) or {})
    explore(tmp_path / "scored")

    groups: list[list[tuple[int, str]]] = []
    for token, part in seen[0].frame.select("token", "part").iter_rows():
        if part != "continuation":
            groups.append([])
        groups[-1].append((token, part))
    for (_, part), *others in groups:
        assert part == ("first token" if others else "whole word")
    words = [tokenizer.decode([token for token, _ in group], skip_special_tokens=True).strip() for group in groups]
    assert [word for word in words if re.search(r"\w", word)] == re.findall(r"\w+", text) * 2
    assert max(map(len, groups)) > 3


@pytest.fixture(scope="module")
def later(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another source: other entropies of the same tokens. A third of the positions was never scored; no surprisals."""
    manifest, target = read_manifest(str(scored)), str(tmp_path_factory.mktemp("later") / "later")
    fingerprint = manifest.fingerprint | {"teacher": "another"}
    hashed = storage.sha256_json(fingerprint)
    fields = {"uri": target, "teacher": "another", "top_k": 0, "fingerprint": fingerprint, "fingerprint_hash": hashed}
    copy = manifest.model_copy(update=fields)
    commit.begin_run(target, Run(fingerprint=fingerprint, shards=copy.planned_shards))
    commit.save_tokenizer(load_tokenizer(manifest.uri), target)
    records, originals = {}, commit.read_records(manifest.uri)
    for entry in manifest.shards:
        rows = read_rows(manifest, entry, Columns(entropy=True))
        ids_NL, entropy_NL = rows["input_ids"], rows["entropy"].astype(np.float32)
        entropy_NL[:, ::3] = np.nan
        none = np.empty((*ids_NL.shape, 0), np.int64)
        entropy_NL = (entropy_NL + (ids_NL % 7) / 2 - 1.5).clip(0, np.log(manifest.vocab_size))
        scores = parquet.Scores(entropy_NL, np.full_like(entropy_NL, np.nan), none, none.astype(np.float32), {})
        parts = parquet.row_groups(parquet.to_table(entry.index, ids_NL, scores, manifest.vocab_size, top_k=0))
        record = originals[entry.index].model_dump() | {"fingerprint_hash": hashed}
        records[entry.index] = commit.commit_shard(target, entry.index, parquet.to_parquet(parts), record, 0.0)
    commit.write_manifest(copy, records, {})
    return Path(target)


def test_the_summary_is_that_of_the_shards(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore(scored)
    printed = capsys.readouterr().out
    frame = pl.read_parquet(scored / "part-*.parquet").select(pl.col("input_ids", "entropy", "surprisal").explode())
    frame = frame.with_columns(pl.col("entropy", "surprisal").cast(pl.Float64).fill_nan(None)).drop_nulls()
    for name in ("entropy", "surprisal"):
        assert f"{name:12} mean {frame[name].mean():.2f} nats, median {frame[name].median():.2f}" in printed
    assert f"{len(frame):,} scored" in printed and "context masked" in printed
    means = frame.group_by("input_ids").agg(pl.len(), pl.col("entropy").mean()).filter(pl.col("len") >= 10)
    top = means.sort("entropy", descending=True).row(0, named=True)
    tokens = manifests.load_tokenizer(str(scored)).convert_ids_to_tokens([top["input_ids"]])
    assert f"uncertain    {tokens[0]} {top['entropy']:.2f}" in printed
    assert not list(tmp_path.iterdir()) and "written" not in printed and "<" not in printed


def test_it_shows_the_masks_of_a_run(work: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["--corpus", scored, "--teacher", work / "teacher", "--output", tmp_path / "targets", "--backend", "local"]
    pipeline.score.main([str(flag) for flag in (*named, "--mask-source", "parquet", "--mask-seed", SEED, *WORDS)])
    targets = pl.read_parquet(tmp_path / "targets" / "part-*.parquet").filter(pl.col("variant") == 0)
    seen: list[sample.Source] = []
    monkeypatch.setattr(train.explore, "summarise", lambda sources, *_: seen.extend(sources) or {})
    explore(scored, "--entropy-source", "parquet", "--seed", SEED, *WORDS)
    masked = seen[0].frame.filter("masked").group_by("sequence", maintain_order=True).agg("position")
    assert masked["position"].to_list() == targets.sort("sequence_id")["positions"].to_list()


def test_a_limit_bounds_what_is_read(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore(scored, "--limit", 7)
    assert "; 7 of " in capsys.readouterr().out


def test_mistakes_are_one_sentence(work: Path, scored: Path, later: Path, tmp_path: Path) -> None:
    corpus, blank = ["--corpus", str(work / "corpus.jsonl"), "--backend", "local"], tmp_path / "tokens"
    tokenizer = ["--tokenizer", str(work / "tokenizer"), "--sequence-length", "24"]
    pipeline.score.main([*corpus, "--teacher", "none", *tokenizer, "--output", str(blank)])
    manifest = json.loads((blank / "manifest.json").read_text())
    for arguments, sentence in (
        ([tmp_path / "nowhere"], "is not a shard directory"),
        ([scored / "manifest.json"], "manifest.json is not a shard directory"),
        ([blank], "has no entropies"),
        ([scored, "--limit", 0], "--limit 0 is out of range; use at least 1"),
        ([scored, "--sequences", 0], "--sequences 0 is out of range; use at least 1"),
        ([scored, "--seed", -1], "--seed -1 is out of range"),
        ([scored, "--mask-warmup", 0.5], "--mask-warmup depends on the length of a run"),
        ([scored, "--predict-by", "surprisal"], "--predict-by has no effect here, because all masked .*; leave it out"),
        ([scored, "--entropy-source", "random", "--hard-share", 0.1], "--hard-share needs scores"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            explore(*arguments, "--output", tmp_path / "page.html")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"--output .* is a directory; name a file, such as .*/page.html"):
        explore(tmp_path / "nowhere", "--output", tmp_path)
    (blank / "manifest.json").write_text(json.dumps(manifest | {"scored": True}))
    with pytest.raises(UsageError, match="hold different tokens"):
        explore(scored, blank)
    same = {"scored": True, "sequences_hash": read_manifest(str(scored)).sequences_hash, "shards": [], "failed": {}}
    same |= {"planned_shards": 0}
    (blank / "manifest.json").write_text(json.dumps(manifest | same))
    with pytest.raises(UsageError, match="no sequences in common"):
        explore(scored, blank)
    assert not (tmp_path / "page.html").exists()


# --- the page --------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1100, True), (1100, False)])
def test_the_page_shows_the_numbers(
    browser: Browser, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int, dark: bool
) -> None:
    explore(scored, "--output", tmp_path / "page.html", "--seed", SEED, *WORDS)
    printed = capsys.readouterr().out
    browser.open_alone(tmp_path / "page.html", width, dark)

    text = browser.js("document.body.innerText")
    manifest = read_manifest(str(scored))
    mean = re.search(r"entropy +mean ([\d.]+)", printed)
    assert mean and float(mean[1]) == pytest.approx(
        manifest.totals["entropy_sum"] / manifest.totals["scored_tokens"], abs=0.006
    )
    assert f"mean {mean[1]} nats" in text and "30% of a sequence's tokens, whole words" in text
    lines = {line[2:14].strip(): line[15:] for line in printed.splitlines() if line.startswith("  ")}
    assert {"entropy", "surprisal", "by frequency", "by position", "uncertain", "certain"} <= set(lines)
    for line in lines.values():
        assert " ".join(line.split()) in " ".join(text.split()), "what the terminal says is on the page"
    drawn = browser.js(
        "[...document.querySelectorAll('svg')]"
        ".map(svg => [svg.ariaLabel, [...svg.querySelectorAll('text')].map(text => text.textContent)])"
    )
    for title, name in (("By frequency", "by frequency"), ("By part of a word", "by word part")):
        groups = [group.rpartition(" ")[::2] for group in lines[name].split(", ")]
        words = dict(drawn)[f"{title}: entropy"]
        shown = [word.rpartition(" (")[0] for word in words if word.endswith("%)")]
        values = [word for word in words if re.fullmatch(r"\d+\.\d\d", word)][-len(shown) :]  # the axis' come first
        assert len(groups) > 2 and list(zip(shown, values, strict=True)) == groups, "each group has its value"


@needs_browser
@pytest.mark.parametrize("touch", [True, False])
def test_a_token_says_what_the_teacher_predicted(browser: Browser, scored: Path, tmp_path: Path, touch: bool) -> None:
    explore(scored, "--output", tmp_path / "page.html", "--sequences", 3, "--recipe", "paper")
    browser.open(tmp_path / "page.html", 390 if touch else 1100, touch=touch)
    shown = browser.js("[...document.querySelectorAll('.text')].map(p => [...p.children].map(t => t.textContent))")
    masked = browser.js("[...document.querySelectorAll('.text')].map(p => p.querySelectorAll('.ma').length)")
    assert len(shown) == 3 and all(tokens[0] == "[CLS]" for tokens in shown) and max(masked) == round(0.15 * 30)

    manifest, tokenizer = read_manifest(str(scored)), manifests.load_tokenizer(str(scored))
    columns = Columns(entropy=True, surprisal=True, top_k=True)
    rows = [read_rows(manifest, entry, columns) for entry in manifest.shards]
    pieces = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(range(manifest.vocab_size))]
    ids_NL = np.concatenate([read["input_ids"] for read in rows])
    row = next(i for i, ids in enumerate(ids_NL) if [pieces[t] for t in ids if t][1:-1] == shown[1][1:-1])
    read = {name: np.concatenate([each[name] for each in rows])[row] for name in rows[0]}
    position = int(np.nanargmax(read["entropy"].astype(np.float32)))
    browser.js(f"document.querySelectorAll('.text')[1].children[{position}].id = 'wanted'")
    selector = "#wanted"
    assert browser.js(f"document.querySelector({selector!r}).classList.contains('ma')"), "the highest entropy is masked"
    assert browser.js("document.getElementById('card').hidden")
    (browser.tap if touch else browser.hover)(selector)
    card = browser.js("document.getElementById('card').innerText")
    label = tokenizer.convert_ids_to_tokens(int(read["input_ids"][position]))
    assert card.split("\n")[0].startswith(label)
    assert f"entropy {read['entropy'][position]:.2f} · surprisal {read['surprisal'][position]:.2f}" in card
    assert "masked: the student sees " in card or "masked, but unchanged" in card
    top = browser.js("[...document.querySelectorAll('#card li')].map(row => [...row.children].map(x => x.textContent))")
    tokens = tokenizer.convert_ids_to_tokens(read["topk_ids"][position].tolist())
    probabilities = np.exp(read["topk_logprobs"][position].astype(np.float64))
    assert [name for name, _ in top] == [*tokens, "all others"] and len(tokens) == TOP_K
    for (_, percent), p in zip(top, [*probabilities, 1 - probabilities.sum()], strict=True):
        assert float(percent.rstrip("%")) == pytest.approx(100 * p, abs=0.51 if p > 0.09 else 0.06)
    box = browser.js(
        "(b => [b.left, b.right, b.top, b.bottom])(document.getElementById('card').getBoundingClientRect())"
    )
    assert 0 <= box[0] < box[1] <= browser.js("innerWidth") and 0 <= box[2] < box[3] <= browser.js("innerHeight") + 1

    if touch:
        browser.tap("h1")
        assert browser.js("document.getElementById('card').hidden"), "a tap elsewhere closes it"
    else:
        browser.js(f"document.querySelector({selector!r}).parentElement.focus()")
        browser.press("ArrowRight")
        first = browser.js("document.getElementById('card').firstChild.textContent.replace('##', '')")
        assert first == shown[1][1]
        browser.press("Escape")
        assert browser.js("document.getElementById('card').hidden")


@needs_browser
def test_two_sources_and_their_difference(
    browser: Browser, scored: Path, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explore(scored, later, "--output", tmp_path / "page.html")
    printed = capsys.readouterr().out
    agreement = next(line for line in printed.splitlines() if "rank correlation" in line).split(maxsplit=1)[1]
    browser.open(tmp_path / "page.html", 390, touch=True)
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert agreement in browser.js("document.body.innerText")
    rose = re.search(r"rose most +(\S+) 1\.50", printed)
    assert rose and manifests.load_tokenizer(str(scored)).convert_tokens_to_ids(rose[1]) % 7 == 6
    assert "rose most" in browser.js("document.body.innerText")

    colour = "getComputedStyle(document.querySelector('.t.{}')).backgroundColor"
    for view, word in (("a", "scored: entropy"), ("b", "later: entropy"), ("d", "later minus scored")):
        browser.tap(f"label:has(input[value={view}])")
        assert word in browser.js("document.querySelector('.only:not([style])') && document.body.innerText")
        legends = browser.js("[...document.querySelectorAll('.only')].filter(p => p.offsetHeight).length")
        assert legends == 1
    assert browser.js(colour.format("less")) != browser.js(colour.format("t:not(.less)")), "up and down differ"
    browser.tap(".t.ma")
    card = browser.js("document.getElementById('card').innerText")
    assert "scored" in card and "later" in card and "surprisal –" in card


def test_a_source_keeps_its_colour(scored: Path, later: Path, tmp_path: Path) -> None:
    """Where the first has no surprisals, those of the second are drawn as the second's."""
    explore(later, scored, "--output", tmp_path / "page.html")
    drawn = re.findall(r"<h3>surprisal</h3>(<svg.*?</svg>)", (tmp_path / "page.html").read_text())
    assert len(drawn) == 4 and all("var(--c1)" in chart and "var(--c0)" not in chart for chart in drawn)


@needs_browser
def test_tokens_are_never_html(browser: Browser, scored: Path, tmp_path: Path) -> None:
    evil = [
        "<script>window.evil=1</script>",
        "</script><img/src=x/onerror=evil=1>",
        '"><svg/onload=evil=1>',
        "\x1b[31mred",
    ]
    directory = tmp_path / "<b>'evil'"
    shutil.copytree(scored, directory)
    file = directory / "tokenizer" / "tokenizer.json"
    backend = json.loads(file.read_text())
    counts = pl.read_parquet(scored / "part-*.parquet")["input_ids"].explode().value_counts(sort=True)["input_ids"]
    names = {token: name for name, token in backend["model"]["vocab"].items()}
    renamed = [token for token in counts if token >= 5 and not names[token].startswith("##")][: len(evil)]
    names |= dict(zip(renamed, evil, strict=True))
    backend["model"]["vocab"] = {name: token for token, name in names.items()}
    file.write_text(json.dumps(backend))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"tokenizer_hash": manifests.tokenizer_hash(manifests.load_tokenizer(str(directory)))}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"teacher": "<i>teacher</i>"}))
    continuing_tokens(manifests.load_tokenizer(str(directory)), manifest["vocab_size"])

    explore(directory, "--output", tmp_path / "page.html", "--sequences", 40)
    browser.requests.clear()
    browser.open(tmp_path / "page.html", 1100)
    assert len(browser.requests) == 1 and browser.js("typeof evil") == "undefined"
    assert browser.js("document.querySelectorAll('img, i, script').length") == 2, "the data and the script, no more"
    text = browser.js("document.body.innerText")
    for name in [*evil[:3], "\\x1b[31mred", "<i>teacher</i>", "<b>'evil'"]:
        assert name in text
    for place in range(len(evil)):
        browser.js(
            f"[...document.querySelectorAll('.t')].find(t => t.textContent == {json.dumps(evil[place])})?.click()"
        )
        assert browser.js("typeof evil") == "undefined"
