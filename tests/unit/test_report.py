"""The report's values against oracles, and its page as a parser sees it; tests/e2e/test_report_browser.py has a browser."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.decode import printable
from embstore.core.density import mean_distance
from embstore.core.errors import ConfigError, CorruptStoreError, EmbstoreError, IncompleteStoreError, StoreExistsError
from embstore.core.prompts import parse_line
from embstore.storage.reader import open_store
from embstore.views.field_values import NO_VALUE
from embstore.views.report import clusters, layout
from embstore.views.report.charts import charts_of
from embstore.views.report.clusters import components, crowded_neighbourhoods, near_distance, near_duplicates
from embstore.views.report.data import one_line, read_report
from embstore.views.report.page import _plotly, _templates, embedded_json, render_page
from embstore.views.report.plots import render_picture
from embstore.views.report.write import write_report
from tests.support.reports import HOSTILE, enlarged, hostile_store
from tests.support.stores import build_small, with_weighting, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")


def partition(label_N: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(label_N == label).tolist()) for label in np.unique(label_N)}


@settings(deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_components_are_those_of_scipy(num_rows: int, edges: list[tuple[int, int]]) -> None:
    first, second = np.array([(a % num_rows, b % num_rows) for a, b in edges], dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(num_rows, num_rows))
    found = components(num_rows, lambda: [(first[:20], second[:20]), (first[20:], second[20:])])
    assert partition(found) == partition(connected_components(graph, directed=False)[1])
    assert all(found[row] == min(np.flatnonzero(found == found[row])) for row in range(num_rows))


def test_a_long_chain_is_one_part() -> None:
    order = np.random.default_rng(1).permutation(5000)
    assert set(components(5000, lambda: [(order[:-1], order[1:])]).tolist()) == {0}


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_principal_axes_are_those_of_scikit_learn(rank: int) -> None:
    random = np.random.default_rng(rank)
    coordinates = ((random.standard_normal((9000, rank)) * np.arange(1, rank + 1) + 5) / 50).astype(np.float32)
    rows = np.flatnonzero(random.random(9000) < 0.6)
    oracle = PCA(n_components=min(2, rank), svd_solver="full").fit(coordinates[rows].astype(np.float64))
    expected = oracle.transform(coordinates[rows].astype(np.float64))
    axes = layout.principal_axes(coordinates, rows, 2)
    found = layout.plane(layout.project(coordinates, rows, axes))
    for axis in range(min(2, rank)):
        sign = np.sign(found[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(found[:, axis], sign * expected[:, axis], atol=1e-8)
    assert axes.share == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-9)
    if rank == 1:
        assert not found[:, 1].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38])
def test_a_coordinate_that_no_unit_row_has_is_damage(value: float) -> None:
    coordinates = np.full((30, 4), 0.5, dtype=np.float32)
    coordinates[7, 2] = value
    with pytest.raises(CorruptStoreError, match=r"coordinates\.npy"):
        layout.principal_axes(coordinates, np.arange(30), 2)
    layout.principal_axes(coordinates, np.arange(8, 30), 2)  # rows that are not shown are not read


@pytest.mark.parametrize("block_rows", [32, 1000])
def test_groups_are_those_of_all_pairs(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of known size among far points, neighbours by brute force."""
    monkeypatch.setattr(clusters, "_BLOCK_ROWS", block_rows)
    random = np.random.default_rng(3)
    centres = random.standard_normal((3, 8)) * 3
    spread = random.standard_normal((200, 8)) * 3
    near = [centre + random.standard_normal((size, 8)) * 0.01 for centre, size in zip(centres, (9, 5, 4), strict=True)]
    points = np.concatenate([spread, *near])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    ids = np.argsort(distances, axis=1)[:, :32].astype(np.int32)
    nearest = np.take_along_axis(distances, ids, axis=1).astype(np.float32)
    own = np.arange(len(points), dtype=np.int32)

    limit = near_distance(nearest)
    assert limit == pytest.approx(0.1 * np.median(distances.min(axis=1)), rel=1e-6)
    graph = coo_array(distances <= limit)
    label = connected_components(graph, directed=False)[1]
    expected = {part for part in partition(label) if len(part) > 1}
    found = near_duplicates(ids, nearest, own, limit, most=100)
    assert {frozenset(part.tolist()) for part in found.largest} == expected
    assert (found.count, found.rows) == (len(expected), sum(map(len, expected)))
    assert [len(part) for part in found.largest] == sorted((len(part) for part in expected), reverse=True)
    assert frozenset(range(200, 209)) in expected
    fewer = near_duplicates(ids, nearest, own, limit, most=2)
    assert (fewer.count, fewer.rows) == (found.count, found.rows)
    assert [part.tolist() for part in fewer.largest] == [part.tolist() for part in found.largest[:2]]

    mean = mean_distance(nearest, 3)
    crowded = crowded_neighbourhoods(ids, own, mean, 3, most=100)
    few = np.flatnonzero(mean <= np.quantile(mean, 0.05))
    among = np.isin(own, few)
    rows, columns = np.repeat(few, 3), ids[few, :3].ravel()
    stays = among[columns]
    linked = coo_array((stays[stays], (rows[stays], columns[stays])), shape=distances.shape)
    label = connected_components(linked, directed=False)[1]
    parts = {part for part in partition(label) if len(part) > 1}
    assert {frozenset(part.tolist()) for part in crowded.largest} == parts
    assert (crowded.count, crowded.rows) == (len(parts), sum(map(len, parts)))


def test_rows_with_one_vector_are_near_duplicates_and_failed_rows_are_not() -> None:
    ids = np.array([[1], [0], [0], [-1]], dtype=np.int32)
    distances = np.array([[1.0], [1.0], [1.0], [np.inf]], dtype=np.float32)
    groups = np.array([0, 1, 0, -1], dtype=np.int32)
    found = near_duplicates(ids, distances, groups, 0.1, most=5)
    assert ([part.tolist() for part in found.largest], found.count, found.rows) == ([[0, 2]], 1, 2)


def test_data_are_what_the_store_holds(finished_store: Path) -> None:
    data, store = read_report(finished_store), open_store(finished_store)
    prompts = store.prompts.sample(range(70))
    assert data.length.tolist() == [len(prompt.rendered) for prompt in prompts]
    np.testing.assert_allclose(data.weight, np.asarray(store.weights, dtype=np.float64) * 70)
    assert data.source_field == "src"
    assert [data.source_values[code] for code in data.source] == [prompt.fields.get("src", NO_VALUE) for prompt in prompts]
    shares = {share.value: share for share in data.sources}
    assert sum(share.weight_share for share in shares.values()) == pytest.approx(1, abs=1e-6)
    assert shares["a"].weight_share == pytest.approx(float(np.asarray(store.weights)[0:60:2].sum()), rel=1e-6)
    assert shares["a"].ratio == pytest.approx(shares["a"].weight_share / (30 / 70))
    assert [share.ratio for share in data.sources] == sorted((share.ratio for share in data.sources), reverse=True)
    assert sorted(data.map.rows.tolist()) == list(range(70))
    assert np.all(np.diff(data.weight[data.map.rows]) >= 0)
    assert data.map.text == [one_line(prompts[row].rendered, data.map.characters) for row in data.map.rows]
    assert (data.map.is_sample, data.problems) == (False, [])
    assert [example.mean_distance for example in data.rarest] == sorted(data.mean_distance, reverse=True)[:15]
    assert all(example.text == prompts[example.row].rendered for example in data.rarest)
    assert data.duplicates[0].rows == 3
    assert data.duplicates[0].weight_share == pytest.approx(float(np.asarray(store.weights)[[66, 67, 68]].sum()), rel=1e-6)
    assert [(example.row, example.multiplicity) for example in data.repeated] == [(3, 3)]


def test_the_charts_count_every_prompt_once(finished_store: Path) -> None:
    data = enlarged(read_report(finished_store), 3000)
    charts = charts_of(data)
    for found, values in ((charts.weight, data.weight), (charts.mean_distance, data.mean_distance)):
        assert found is not None
        assert found.counts.sum() + found.above == 3000
        inside = values[values <= found.edges[-1]]
        np.testing.assert_array_equal(found.counts, np.histogram(inside, bins=found.edges)[0])
    by_length = charts.weight_by_length
    assert by_length.counts.sum() == 3000
    edges = by_length.length_edges
    for centre, low, median, high in zip(by_length.centre, by_length.low, by_length.median, by_length.high, strict=True):
        index = int(np.flatnonzero(edges <= centre)[-1])
        mine = data.weight[(data.length >= edges[index] * (1 - 1e-12)) & (data.length < edges[index + 1])]
        assert len(mine) >= 10
        np.testing.assert_allclose([low, median, high], np.quantile(mine, [0.25, 0.5, 0.75]))
    assert len(by_length.centre) >= 3


def test_a_field_is_chosen_and_an_unknown_one_refused(finished_store: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbstoreError, match="no prompt has a field 'colour'") as caught:
        read_report(finished_store, by="colour")
    assert caught.value.hint is not None
    assert "src" in caught.value.hint
    lines = [{"prompt": f"text {index}", "note": index, "kind": "xy"[index % 2]} for index in range(40)]
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "store", config=with_weighting(k=3))
    assert read_report(tmp_path / "store").source_field == "kind"  # a field that differs on each line cannot be the source
    assert len(read_report(tmp_path / "store", by="note").sources) == 40


def test_a_large_store_shows_a_sample_and_says_so(finished_store: Path) -> None:
    data, again = read_report(finished_store, map_rows=20), read_report(finished_store, map_rows=20)
    assert data.map.is_sample
    assert len(data.map.text) == len(data.map.ids) == len(data.map.pca) == 20
    assert data.map.rows.tolist() == again.map.rows.tolist()
    assert len(data.weight) == 70
    page = render_page(data)
    assert "The map shows a sample: 20 of 70 prompts" in page
    assert "The map shows a sample" not in render_page(read_report(finished_store))


def test_a_store_that_lost_a_chunk_is_not_called_whole(store: Path) -> None:
    chunk = store / "embeddings.zarr" / "c.2.0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    (store / "embeddings.zarr" / "c.3.0").unlink()
    data = read_report(store)
    assert [problem.partition(" ")[0] for problem in data.problems] == ["embeddings.zarr/c.2.0", "embeddings.zarr/c.3.0"]
    page = render_page(data)
    assert "incomplete</span>" in page
    assert "embeddings.zarr/c.3.0 is missing" in page


def test_equal_stores_give_equal_reports(finished_store: Path) -> None:
    first, second = read_report(finished_store), read_report(finished_store)
    assert render_page(first) == render_page(second)
    assert render_picture(first) == render_picture(second)


class Parsed(HTMLParser):
    """What a parser makes of a page: elements with attributes, and the texts of scripts and of everything else."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_hostile_prompts_are_text_to_a_parser(tmp_path: Path) -> None:
    store = hostile_store(tmp_path)
    data = read_report(store)
    page = render_page(data)
    parsed, plain = Parsed(page), Parsed(render_page(read_report(build_plain(tmp_path))))
    assert len(parsed.scripts) == 3
    # the elements, and the attributes of each, are those of a page of harmless prompts
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in plain.elements} | {
        "details",
        "summary",
        "ul",
        "article",
    }
    attributes = {name for tag, each in parsed.elements for name in each}
    assert not [name for name in attributes if name.startswith("on")]
    assert not [
        each for tag, each in parsed.elements if tag != "meta" and ("src" in each or "href" in each) and tag != "link"
    ]
    values = json.loads(parsed.scripts[0])
    assert sorted(values["map"]["text"]) == sorted(data.map.text)
    shown = {text.split(" ", 1)[1] for text in values["map"]["text"] if text[0].isdigit()}
    assert shown == {one_line(f"0 {text}", data.map.characters)[2:] for text in HOSTILE}
    for text in HOSTILE:  # as text, letter by letter, among the sources
        assert printable(text)[:200] in parsed.text
    # nothing but line breaks acts on a terminal or turns the direction of a text
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", page.replace(page_scripts(page), "")
    )


def test_what_a_store_says_of_itself_is_text_too(finished_store: Path) -> None:
    """Messages, names and warnings are not prompts, but may quote a stranger's file."""
    data = read_report(finished_store)
    spec = {**(data.info.spec or {}), "model": {**(data.info.spec or {})["model"], "name": "m<i>\x1b[31m"}}
    info = dataclasses.replace(data.info, spec=spec)
    metadata = {**data.metadata, "warnings": ["w<u>\x07"]}
    page = render_page(
        dataclasses.replace(data, info=info, metadata=metadata, problems=["p<b>\u202e"], weights_name="n<s>\x7f")
    )
    parsed = Parsed(page)
    for shown in ("m<i>\\x1b[31m (Fake)", "w<u>\\x07", "p<b>\\u202e", "n<s>\\x7f"):
        assert shown in parsed.text
    assert not {"i", "u", "b", "s"} & {tag for tag, _ in parsed.elements}


def build_plain(folder: Path) -> Path:
    lines = [{"prompt": f"Plain prompt number {index}", "src": "ab"[index % 2]} for index in range(60)]
    lines += [{"prompt": f"same: vector {index}", "src": "a"} for index in range(3)]
    lines.append(lines[0])
    build_small(write_lines(folder / "plain.jsonl", lines), folder / "plain", config=with_weighting(k=5))
    return folder / "plain"


def page_scripts(page: str) -> str:
    """The plotting library, which has control characters of its own in its strings."""
    start = page.index("<script>")
    return page[start : page.index("</script>", start)]


def test_the_policy_names_the_two_scripts_and_no_address(finished_store: Path) -> None:
    parsed = Parsed(render_page(read_report(finished_store)))
    policy = next(each["content"] for tag, each in parsed.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == 2
    assert "http" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]


@settings(deadline=None)
@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_embedded_json_says_the_same_and_ends_no_element(value: object) -> None:
    found = embedded_json(value)
    assert json.loads(found) == value
    assert "<" not in found


def test_a_page_of_28k_prompts_is_under_15_mb(finished_store: Path) -> None:
    data = read_report(finished_store)
    assert len(render_page(enlarged(data, 28_000)).encode()) < 15e6


def test_letters_of_many_bytes_are_cut_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embstore.views.report.data._TEXT_BYTES", 20_000)
    lines = [{"prompt": f"{index} " + "\u6f22" * 400} for index in range(100)]
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "store", config=with_weighting(k=3))
    texts = read_report(tmp_path / "store").map.text
    assert sum(len(text.encode()) for text in texts) <= 30_000
    assert all(len(text) >= 20 for text in texts)


@pytest.mark.parametrize(
    "lines",
    [
        [{"prompt": "alone"}],
        [{"prompt": f"same: {index}"} for index in range(12)],
        [{"prompt": f"FAIL {index}"} for index in range(2)] + [{"prompt": f"fine {index}"} for index in range(30)],
    ],
    ids=["one", "one vector", "failed rows"],
)
def test_odd_stores_have_a_report(lines: list[dict[str, str]], tmp_path: Path) -> None:
    config = dataclasses.replace(with_weighting(k=3), on_error="quarantine")
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "$\\frac$", config=config)
    written = write_report(tmp_path / "$\\frac$", html=tmp_path / "r.html", png=tmp_path / "r.png")
    assert [each.bytes for each in written] == [(tmp_path / name).stat().st_size for name in ("r.html", "r.png")]
    values = json.loads(Parsed((tmp_path / "r.html").read_text(encoding="utf-8")).scripts[0])
    with_vector = [line["prompt"] for line in lines if "FAIL" not in line["prompt"]]
    assert sorted(values["map"]["text"]) == sorted(with_vector)


def test_the_picture_shows_the_map(finished_store: Path) -> None:
    data = read_report(finished_store)
    pictures = []
    for name, content in (("a", render_picture(data)), ("b", render_picture(enlarged(data, 500)))):
        assert content.startswith(b"\x89PNG")
        pictures.append(imread(io.BytesIO(content)))
        assert pictures[-1].shape == (1152, 1600, 4), name
    # more points, more ink, in the half that holds the map
    ink = [(picture[:, :800, :3].min(axis=2) < 0.9).sum() for picture in pictures]
    assert ink[1] > 2 * ink[0] > 1000


def test_files_that_are_no_reports_stay(store: Path, tmp_path: Path, unfinished: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("my notes")
    for file, error in ((mine, StoreExistsError), (tmp_path, StoreExistsError), (store / "report.html", ConfigError)):
        with pytest.raises(error):
            write_report(store, html=file)
    assert mine.read_text() == "my notes"
    assert not (store / "report.html").exists()
    with pytest.raises(IncompleteStoreError, match="32 of 70 rows"):
        write_report(unfinished, html=tmp_path / "r.html")
    write_report(store, html=tmp_path / "r.html")
    before = (tmp_path / "r.html").read_bytes()
    write_report(store, html=tmp_path / "r.html", by="src", name="default")
    assert (tmp_path / "r.html").read_bytes() == before


@pytest.mark.parametrize(("option", "library"), [("html", "jinja2"), ("html", "plotly"), ("png", "matplotlib")])
def test_without_the_extra_the_command_to_install_it_is_named(
    option: str, library: str, finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in (_plotly, _templates):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"--{option} needs {library}") as caught:
        write_report(finished_store, **{option: tmp_path / "file"})
    assert caught.value.hint == "pip install 'embstore[report]'"
    assert not (tmp_path / "file").exists()


def test_the_command_writes_both_and_says_where(finished_store: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "r.html", tmp_path / "r.png"
    arguments = ["inspect", str(finished_store), "--html", str(page), "--png", str(picture), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == [
        {"path": str(page), "bytes": page.stat().st_size},
        {"path": str(picture), "bytes": picture.stat().st_size},
    ]
    told = CliRunner().invoke(app, arguments[:4])
    assert told.stdout.startswith(str(page))
    refused = CliRunner().invoke(app, [*arguments[:2], "--html", str(finished_store / "x.html")])
    assert refused.exit_code == 2


def test_umap_places_every_prompt_the_same_way_twice(finished_store: Path) -> None:
    if not layout.has_umap():
        pytest.skip("umap-learn is not installed (the extra embstore[umap])")
    store = open_store(finished_store)
    first, second = (layout.umap_plane(store.coordinates, np.arange(70)) for _ in range(2))
    assert first is not None
    assert first.shape == (70, 2)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def test_a_hostile_line_is_still_a_prompt() -> None:
    assert all(not hasattr(parse_line(json.dumps({"prompt": text}).encode()), "reason") for text in HOSTILE)
