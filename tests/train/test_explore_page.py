"""The page of train/explore.py in a real browser: its numbers, one token, two sources, and tokens like HTML."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from browser import Browser, needs_browser
from in_process import SEED, explore_here

from entropy_masking import codes, storage
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.manifests import read_manifest, shard_tokenizer
from entropy_masking.shards.read import read_rows
from entropy_masking.shards.schema import Run

WORDS = ["--mask-unit", "word", "--mask-temperature", 1, "--mask-ratio", 0.3]


@pytest.fixture(scope="module")
def later(sharp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other entropies of the same tokens, without surprisals; a third of the positions has no score."""
    manifest, target = read_manifest(str(sharp)), str(tmp_path_factory.mktemp("later") / "later")
    fingerprint = manifest.fingerprint | {"teacher": "another"}
    hashed = storage.sha256_json(fingerprint)
    fields = {"uri": target, "teacher": "another", "top_k": 0, "temperatures": [1.0]}
    fields |= {"fingerprint": fingerprint, "fingerprint_hash": hashed}
    copy = manifest.model_copy(update=fields)
    commit.begin_run(target, Run(fingerprint=fingerprint, shards=copy.planned_shards))
    commit.save_tokenizer(shard_tokenizer(manifest.uri), f"{target}/tokenizer")
    records, originals = {}, commit.read_records(manifest.uri)
    for entry in manifest.shards:
        rows = read_rows(manifest, entry, ["entropy"])
        ids_NL, entropy_NL = rows["input_ids"], rows["entropy"].astype(np.float32)
        entropy_NL[:, ::3] = np.nan
        entropy_NL = (entropy_NL + (ids_NL % 7) / 2 - 1.5).clip(0, np.log(manifest.vocab_size))
        scores = {"entropy": entropy_NL, "surprisal": np.full_like(entropy_NL, np.nan)}
        parts = parquet.row_groups(parquet.to_table(copy, entry.index, ids_NL, scores))
        record = originals[entry.index].model_dump() | {"fingerprint_hash": hashed}
        records[entry.index] = commit.commit_shard(target, entry.index, parquet.to_parquet(parts), record, 0.0)
    commit.write_manifest(copy, records, {})
    return Path(target)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1100, True), (1100, False)])
def test_the_page_shows_the_numbers(
    browser: Browser, sharp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int, dark: bool
) -> None:
    explore_here(sharp, "--output", tmp_path / "page.html", "--seed", SEED, *WORDS)
    printed = capsys.readouterr().out
    browser.open_alone(tmp_path / "page.html", width, dark)

    text = browser.js("document.body.innerText")
    manifest = read_manifest(str(sharp))
    mean = re.search(r"entropy +mean ([\d.]+)", printed)
    assert mean and float(mean[1]) == pytest.approx(
        manifest.totals["entropy_sum"] / manifest.totals["scored_tokens"], abs=0.006
    )
    assert f"mean {mean[1]} nats" in text and "30% of the tokens, in whole words" in text
    lines = {line[2:14].strip(): line[15:] for line in printed.splitlines() if line.startswith("  ")}
    assert {"entropy", "surprisal", "by frequency", "uncertain", "certain"} <= set(lines)
    for line in lines.values():
        assert " ".join(line.split()) in " ".join(text.split()), "what the terminal says is on the page"
    drawn = browser.js(
        "[...document.querySelectorAll('svg')]"
        ".map(svg => [svg.ariaLabel, [...svg.querySelectorAll('text')].map(text => text.textContent)])"
    )
    groups = [group.rpartition(" ")[::2] for group in lines["by frequency"].split(", ")]
    words = dict(drawn)["By frequency: entropy"]
    shown = [word.rpartition(" (")[0] for word in words if word.endswith("%)")]
    values = [word for word in words if re.fullmatch(r"\d+\.\d\d", word)][-len(shown) :]  # the axis' come first
    assert len(groups) > 2 and list(zip(shown, values, strict=True)) == groups, "each group has its value"


@needs_browser
@pytest.mark.parametrize("touch", [True, False])
def test_a_token_says_what_the_teacher_predicted(browser: Browser, sharp: Path, tmp_path: Path, touch: bool) -> None:
    explore_here(sharp, "--output", tmp_path / "page.html", "--sequences", 3, "--recipe", "paper")
    browser.open(tmp_path / "page.html", 390 if touch else 1100, touch=touch)
    shown = browser.js("[...document.querySelectorAll('.text')].map(p => [...p.children].map(t => t.textContent))")
    masked = browser.js("[...document.querySelectorAll('.text')].map(p => p.querySelectorAll('.ma').length)")
    assert len(shown) == 3 and all(tokens[0] == "[CLS]" for tokens in shown) and max(masked) == round(0.15 * 30)

    manifest, tokenizer = read_manifest(str(sharp)), manifests.shard_tokenizer(str(sharp))
    columns = [*parquet.SCORE_COLUMNS, *parquet.TOP_K_COLUMNS]
    rows = [read_rows(manifest, entry, columns) for entry in manifest.shards]
    texts = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(range(manifest.vocab_size))]
    ids_NL = np.concatenate([read["input_ids"] for read in rows])
    row = next(i for i, ids in enumerate(ids_NL) if [texts[t] for t in ids if t][1:-1] == shown[1][1:-1])
    read = {name: np.concatenate([shard[name] for shard in rows])[row] for name in rows[0]}
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
    probabilities = np.exp(codes.decode(read["topk_logprobs"][position]).astype(np.float64))
    assert [name for name, _ in top] == [*tokens, "all others"] and len(tokens) == manifest.top_k
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
    browser: Browser, sharp: Path, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explore_here(sharp, later, "--output", tmp_path / "page.html")
    printed = capsys.readouterr().out
    agreement = next(line for line in printed.splitlines() if "rank correlation" in line).split(maxsplit=1)[1]
    browser.open(tmp_path / "page.html", 390, touch=True)
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert agreement in browser.js("document.body.innerText")

    colour = "getComputedStyle(document.querySelector('.t.{}')).backgroundColor"
    for view, word in (("a", "sharp: entropy"), ("b", "later: entropy"), ("d", "later minus sharp")):
        browser.tap(f"label:has(input[value={view}])")
        assert word in browser.js("document.querySelector('.only:not([style])') && document.body.innerText")
        legends = browser.js("[...document.querySelectorAll('.only')].filter(p => p.offsetHeight).length")
        assert legends == 1
    assert browser.js(colour.format("less")) != browser.js(colour.format("t:not(.less)")), "up and down differ"
    browser.tap(".t.ma")
    card = browser.js("document.getElementById('card').innerText")
    assert "sharp" in card and "later" in card and "surprisal –" in card


def test_a_source_keeps_its_colour(sharp: Path, later: Path, tmp_path: Path) -> None:
    """Where the first has no surprisals, those of the second are drawn as the second's."""
    explore_here(later, sharp, "--output", tmp_path / "page.html")
    drawn = re.findall(r"<h3>surprisal</h3>(<svg.*?</svg>)", (tmp_path / "page.html").read_text())
    assert len(drawn) == 2 and all("var(--c1)" in chart and "var(--c0)" not in chart for chart in drawn)


@needs_browser
def test_tokens_are_never_html(browser: Browser, sharp: Path, tmp_path: Path) -> None:
    evil = [
        "<script>window.evil=1</script>",
        "</script><img/src=x/onerror=evil=1>",
        '"><svg/onload=evil=1>',
        "\x1b[31mred",
    ]
    directory = tmp_path / "<b>'evil'"
    shutil.copytree(sharp, directory)
    file = directory / "tokenizer" / "tokenizer.json"
    backend = json.loads(file.read_text())
    counts = pl.read_parquet(sharp / "part-*.parquet")["input_ids"].explode().value_counts(sort=True)["input_ids"]
    names = {token: name for name, token in backend["model"]["vocab"].items()}
    renamed = [token for token in counts if token >= 5 and not names[token].startswith("##")][: len(evil)]
    names |= dict(zip(renamed, evil, strict=True))
    backend["model"]["vocab"] = {name: token for token, name in names.items()}
    file.write_text(json.dumps(backend))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"tokenizer_hash": manifests.tokenizer_hash(manifests.shard_tokenizer(str(directory)))}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"teacher": "<i>teacher</i>"}))
    continuing_tokens(manifests.shard_tokenizer(str(directory)), manifest["vocab_size"])

    explore_here(directory, "--output", tmp_path / "page.html", "--sequences", 40)
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
