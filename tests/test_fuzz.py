"""Random harm to the files that the commands read: each is read, or refused in one sentence, and nothing else happens.

What the long search has found is in ``FOUND``, which every run of the tests repeats.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_results import summary, write_results
from made_shards import write_shards

import pipeline.status
from entropy_masking import cards
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, costs, manifests
from entropy_masking.shards.schema import Run
from glue import compare, report, tables
from glue.results import read_regimes
from train import results, resume, split

Change = tuple[tuple[str | int, ...], object]  # a place in a document, and its new value
EXAMPLES = 1500

hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e-320, 1e30, 1e300]),
    st.text(max_size=8),
    st.sampled_from(["\x1b[31m", "a|b\n# c", "../../x", "parquet+kd", "self", "part-00000.parquet", "1e5", ""]),
    st.lists(st.integers(), max_size=3),
    st.sampled_from([{}, [], [[]], {"": None}, {"a": {"b": [1e999]}}, [{"step": 1}]]),
)


def places(value: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The places of all values in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(place for key, own in pairs for place in places(own, (*prefix, key)))]


def changed(document: Any, changes: list[Change]) -> Any:
    """A copy with other values, each at its place if that still exists."""
    document = copy.deepcopy(document)
    for (*path, last), value in (change for change in changes if change[0]):
        parent = document
        try:
            for key in path:
                parent = parent[key]
            parent[last] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue
    return document


def changes_of(document: object) -> st.SearchStrategy[list[Change]]:
    return st.lists(st.tuples(st.sampled_from(places(document)[1:]), hostile), min_size=1, max_size=3)


def read_or_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except (UsageError, RunError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def repeat(search: Callable[[], None], path: Path) -> None:
    sound = path.read_bytes()
    try:
        search()
    finally:
        path.write_bytes(sound)


# --- the readers, and what the commands do with what they have read --------------------------------------------------


def use_manifest(directory: Path) -> None:
    manifest = manifests.read_manifest(str(directory))
    pipeline.status.to_text(pipeline.status.status(str(directory), 1e9))
    cards.dataset_card(manifest)
    results.costs(manifest)
    parts = split.all_rows(manifest)
    assert all(part.tokens >= 0 for part in parts)
    costs.totals(list(commit.read_records(str(directory)).values()))


def use_records(directory: Path) -> None:
    if run := manifests.read_json_file(Run, manifests.run_uri(str(directory))):
        commit.done_records(str(directory), run)
    pipeline.status.to_text(pipeline.status.status(str(directory), 1e9))


def use_results(directory: Path, drawn: bool = False) -> None:
    regimes = read_regimes({"random": [str(directory.parent / "sound")], "parquet": [str(directory)]})
    table = compare.compare(regimes, "random", [])
    json.dumps(table)
    assert tables.to_markdown(table) and tables.to_csv(table)
    report.warnings(compare.summaries_of(regimes))
    if drawn:
        report.page(table, compare.summaries_of(regimes))
        report.chart(table)


def use_state(directory: Path) -> None:
    resume.check_state(directory)
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    results.curve(log)


STATE = {
    **{"global_step": 2, "max_steps": 4, "epoch": 0.5, "total_flos": 0, "stateful_callbacks": {}},
    "log_history": [{"step": 1, "loss": 2.5}, {"step": 1, "train_seconds": 1.0}, {"step": 2, "eval_loss": 2.0}],
}
READERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "manifest": ("manifest.json", use_manifest),
    "record": ("_records/part-00000.json", use_records),
    "run": ("_records/run.json", use_records),
    "result": ("cola-seed1.json", use_results),
    "state": ("trainer_state.json", use_state),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound directory for each reader; a test changes one file of it."""
    root = tmp_path_factory.mktemp("fuzz")
    unfinished = {name: write_shards(root / name) for name in ("record", "run")}
    for directory in unfinished.values():
        (directory / "manifest.json").unlink()
    write_results(root / "sound", {"cola": {1: 0.5}}, summary("random", 1))
    result = write_results(root / "result", {"cola": {1: 0.6}}, summary("parquet+kd", 1))
    (root / "state").mkdir()
    (root / "state" / "trainer_state.json").write_text(json.dumps(STATE))
    return unfinished | {"manifest": write_shards(root / "manifest"), "result": result, "state": root / "state"}


@pytest.fixture(scope="module")
def documents(world: dict[str, Path]) -> dict[str, Any]:
    """The sound files."""
    return {name: json.loads((world[name] / file).read_text()) for name, (file, _) in READERS.items()}


FOUND: list[tuple[str, list[Change]]] = [
    ("manifest", [(("totals", "entropy_sum"), 1e300)]),
    ("record", [(("finished_at",), "0001-01-01")]),
    ("result", [(("key", "metrics"), [[1]]), (("task",), "mine")]),
    ("result", [(("key", "model_hash"), [])]),
    ("result", [(("key", "task"), "\n")]),
    ("state", [(("log_history", 1, "train_seconds"), None)]),
    ("manifest", [(("shards", 1, "file"), "[" * 9999)]),
    ("result", [(("training", "history"), [{"step": 1e300, "seconds": -1}])]),
    ("state", [(("log_history",), [{"step": 1, "loss": "x", "train_seconds": 1}])]),
]


@pytest.mark.parametrize(("name", "changes"), FOUND, ids=[f"{name} {changes}" for name, changes in FOUND])
def test_what_the_search_has_found(
    world: dict[str, Path], documents: dict[str, Any], name: str, changes: list[Change]
) -> None:
    file, use = READERS[name]
    path, sound = world[name] / file, documents[name]
    use(world[name])
    try:
        path.write_text(json.dumps(changed(sound, changes)))
        read_or_refused(lambda: use(world[name]))
    finally:
        path.write_text(json.dumps(sound))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
def test_random_values(world: dict[str, Path], documents: dict[str, Any], name: str) -> None:
    file, use = READERS[name]
    path, sound = world[name] / file, documents[name]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
    @given(changes_of(sound))
    def search(changes: list[Change]) -> None:
        path.write_text(json.dumps(changed(sound, changes)), errors="surrogatepass")
        read_or_refused(lambda: use(world[name]))

    repeat(search, path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
def test_random_bytes(world: dict[str, Path], documents: dict[str, Any], name: str) -> None:
    file, use = READERS[name]
    path, sound = world[name] / file, json.dumps(documents[name]).encode()

    @settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
    @given(
        st.integers(0, len(sound)),
        st.integers(0, 20),
        st.binary(max_size=8) | st.sampled_from([b"[" * 9999, b"9" * 5000]),
    )
    def search(start: int, length: int, data: bytes) -> None:
        path.write_bytes(sound[:start] + data + sound[start + length :])
        read_or_refused(lambda: use(world[name]))

    repeat(search, path)
