"""The written parts of the page: what the store is, what its audit and weights say, and tables of prompts, as HTML.

Every text that comes from a store goes through ``_text``: controls spelt out, then escaped, and inside ``<bdi>`` where it is
a prompt's, so that a text in another direction turns nothing but itself.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

import numpy as np

from embstore.core.config import format_bytes, pooling_rule
from embstore.core.decode import printable
from embstore.core.diagnostics import MILD_ESS_SHARE
from embstore.core.format import FORMAT_VERSION
from embstore.views.report.crowds import CROWDED_SHARE
from embstore.views.report.data import Example, Group, ReportData, SourceShare

_SOURCES_SHOWN = 24
_ENDS = 10
_ENOUGH_ROWS = 20


def header(data: ReportData) -> str:
    """Name, state and the figures that matter most."""
    info, metadata = data.info, data.metadata
    audit = metadata["neighbors"]["audit"]
    weighting = "" if data.weights_name == "default" else f", weights “{_text(data.weights_name)}”"
    state = '<span class="badge good">complete</span>' if not data.problems else '<span class="badge bad">not whole</span>'
    tiles = [
        (f"{info.total_rows:,}", "prompts", f"from {info.lines:,} lines"),
        (_percent(metadata["ess_share"]), "effective sample size", f"{metadata['ess']:,.0f} prompts’ worth"),
        (f"{metadata['max_over_mean']:.1f} ×", "largest weight", "in units of the mean"),
    ]
    if audit is not None:
        tiles.append((_percent(audit["recall"], digits=2), f"recall of {audit['k']} neighbours", "checked exactly"))
    tiles.append((f"{data.duplicate_rows:,}", "near-duplicates", f"in {data.duplicate_groups:,} groups"))
    shown = "".join(
        f'<div class="tile"><div class="figure">{figure}</div><div>{title}</div><div class="muted">{note}</div></div>'
        for figure, title, note in tiles
    )
    return (
        f'<header><p class="kicker">embstore report</p><h1>{_text(data.name)}{weighting} {state}</h1>'
        f'<div class="tiles">{shown}</div></header>'
    )


def summary(data: ReportData) -> str:
    """Is it whole, can it be trusted, what do the weights do: three short answers."""
    answers = [
        ("Is the store whole?", _whole(data)),
        ("Are the neighbours right?", _audit(data)),
        ("What do the weights do?", _weights(data)),
    ]
    cards = "".join(f'<div class="card"><h3>{title}</h3>{body}</div>' for title, body in answers)
    return f'<section id="summary" class="cards">{cards}</section>'


def map_section(data: ReportData) -> str:
    """The map with its search box; the script fills it."""
    shown, total = len(data.map.rows), data.info.total_rows - data.info.failed_rows
    sample = (
        f"<strong>The map shows a sample: {shown:,} of {total:,} prompts, drawn evenly at random.</strong> "
        "Everything else on this page counts all of them. "
        if data.map.is_sample
        else ""
    )
    share = _percent(data.map.pca_share)
    placed = (
        f"One point a prompt, placed by its embedding along the two directions of largest variance (PCA). They carry "
        f"{share} of the variance: points that touch here may still be far apart."
    )
    switch = ""
    if data.map.umap is not None:
        placed = (
            "One point a prompt, placed by its embedding. UMAP keeps neighbours together and says little about far "
            f"distances; PCA shows the two directions of largest variance, which carry {share} of it."
        )
        switch = (
            '<span class="switch" role="group" aria-label="Layout of the map">'
            '<button type="button" data-layout="umap" aria-pressed="true">UMAP</button>'
            '<button type="button" data-layout="pca" aria-pressed="false">PCA</button></span>'
        )
    return f"""<section id="map-section"><h2>Map of the prompts</h2>
<p class="muted">{sample}{placed}
Colour is the weight: <span class="low">drawn less</span> or <span class="high">drawn more</span> than evenly.
Drag to zoom, double-click to go back.</p>
<div class="tools"><input id="search" type="search" autocomplete="off" spellcheck="false"
 placeholder="Search text, id or source" aria-label="Search the prompts on the map">
{switch}<span id="found" role="status" aria-live="polite"></span></div>
<div id="map" class="plot" role="img" aria-label="Map of the prompts, coloured by weight"></div>
<p id="no-webgl" class="note" hidden></p>
<ol id="matches" class="prompts"></ol>
<p class="muted small">Hover shows the first {data.map.characters} characters of a prompt; search looks at these, at ids
and at sources.</p></section>"""


def distributions(data: ReportData, *, has_distances: bool) -> str:
    """Three charts; the script draws them."""
    k = data.metadata["weighting"]["k"]
    figures = [
        (
            "weights",
            "Weights",
            "How often prompts are drawn, in units of even sampling: at 2 a prompt is drawn twice as often.",
        ),
    ]
    if has_distances:
        figures.append(
            (
                "distances",
                "Distances",
                f"Mean distance of each prompt to its {k} nearest others. Far right: rare. Far left: near-copies.",
            )
        )
    figures.append(
        (
            "lengths",
            "Weight against length",
            "More ink, more prompts. The line is the median, the dotted ones hold the middle half. A slope: the weights "
            "also prefer long or short prompts.",
        )
    )
    shown = "".join(
        f'<figure><figcaption><h3>{title}</h3><p class="muted">{text}</p></figcaption>'
        f'<div id="{name}" class="plot" role="img" aria-label="{title}"></div></figure>'
        for name, title, text in figures
    )
    return f'<section id="distributions"><h2>Distributions</h2><div class="figures">{shown}</div></section>'


def sources(data: ReportData) -> str:
    """Share of weight by source: all of them, or the ends of a long list."""
    if data.source_field is None:
        return ""
    shares, note = data.sources, ""
    if len(shares) > _SOURCES_SHOWN:
        enough = [share for share in shares if share.rows >= _ENOUGH_ROWS] or shares
        shares = enough if len(enough) <= 2 * _ENDS else enough[:_ENDS] + enough[-_ENDS:]
        largest = max(data.sources, key=lambda share: share.rows)
        if largest not in shares:
            shares = sorted([*shares, largest], key=lambda share: -share.ratio)
        note = (
            f" Of {len(data.sources):,} values: the {_ENDS} that gain most, the {_ENDS} that lose most (of those with at "
            f"least {_ENOUGH_ROWS} prompts), and the largest."
        )
    reach = max(0.1, *(abs(share.ratio - 1) for share in shares))
    rows = "".join(_source_row(share, reach) for share in shares)
    field = _text(data.source_field)
    return f"""<section id="sources"><h2>Share of draws by {field}</h2>
<p class="muted">1.00 × is even sampling: right of the line a prompt of this source is drawn more often, left of it
less.{note}</p>
<div class="wide"><table><thead><tr><th>{field}</th><th class="num">prompts</th><th class="num">of prompts</th>
<th class="num">of draws</th><th class="num">ratio</th><th class="ratio" aria-hidden="true"></th></tr></thead>
<tbody>{rows}</tbody></table></div></section>"""


def crowded(data: ReportData) -> str:
    """The most crowded neighbourhoods."""
    share = _percent(CROWDED_SHARE)
    intro = (
        f"The {share} of prompts with the nearest neighbours, joined where one is among the other’s "
        f"{data.metadata['weighting']['k']} nearest. A large group is one template, or one topic, many times over."
    )
    return _group_section("crowded", "Most crowded neighbourhoods", intro, data.crowded, "No group: no crowds in this pool.")


def rarest(data: ReportData) -> str:
    """The prompts farthest from all others."""
    intro = (
        "Farthest from their nearest neighbours: often the gems, and often the garbage. Read them before training on them."
    )
    items = "".join(_prompt(example, has_source=data.source_field is not None) for example in data.rarest)
    body = f'<ol class="prompts">{items}</ol>' if items else '<p class="muted">Too few prompts to tell.</p>'
    return f'<section id="rarest"><h2>Rarest prompts</h2><p class="muted">{intro}</p>{body}</section>'


def duplicates(data: ReportData) -> str:
    """Near-duplicates, and prompts that the input repeats word for word."""
    intro = (
        f"Joined in steps of at most {data.near_distance:.2g}, a tenth of the typical distance to the nearest other prompt. "
        f"{data.duplicate_rows:,} prompts in {data.duplicate_groups:,} groups"
        + (f"; the {len(data.duplicates)} largest:" if data.duplicate_groups > len(data.duplicates) else ".")
    )
    section = _group_section("duplicates", "Near-duplicates", intro, data.duplicates, "None found.")
    repeated = "".join(
        f"<li><strong>{example.multiplicity:,} lines</strong> {_prompt_text(example)}</li>" for example in data.repeated
    )
    if repeated:
        section += (
            '<section id="repeated"><h2>Repeated word for word</h2><p class="muted">Lines that hold the same prompt are one '
            f'row and share its weight.</p><ol class="prompts">{repeated}</ol></section>'
        )
    return section


def origin(data: ReportData) -> str:
    """What the store was made from."""
    spec = data.info.spec or {}
    model, embedding, neighbors = spec["model"], spec["embedding"], data.metadata["neighbors"]
    rule = pooling_rule(embedding["space"], embedding["pooling"])
    search = "exact scan" if neighbors.get("knn") == "exact" else f"HNSW in {_text(neighbors.get('shards'))} shards"
    facts = [
        ("Model", f"{_text(model['name'])} ({_text(model['architecture'])})"),
        ("Fingerprints", f"weights {_code(model['weights_sha256'])}, tokenizer {_code(model['tokenizer_sha256'])}, "
                         f"prompts {_code(spec['prompts_fingerprint'])}"),
        ("Rows", f"{embedding['dimension']:,} columns in {embedding['rank']:,} coordinates, {_text(rule)}"),
        ("Computed", f"{_text(embedding['dtype'])} on {_text(embedding['device'])} ({_text(embedding['capability'])}), "
                     f"at most {embedding['max_tokens']:,} tokens a prompt"),
        ("Neighbours", f"{search}, {_text(neighbors.get('distinct_vectors'))} distinct vectors"),
        ("Format", f"version {FORMAT_VERSION}"),
    ]  # fmt: skip
    rows = "".join(f"<dt>{title}</dt><dd>{value}</dd>" for title, value in facts)
    return f'<section id="origin"><h2>What it was made from</h2><dl>{rows}</dl></section>'


def _whole(data: ReportData) -> str:
    info = data.info
    if data.problems:
        found = "".join(f"<li>{_text(problem)}</li>" for problem in data.problems[:10])
        more = f"<li>and {len(data.problems) - 10:,} more</li>" if len(data.problems) > 10 else ""
        return f'<p class="warn">No: something is missing.</p><ul>{found}{more}</ul><p>Run <code>embstore verify</code>.</p>'
    lost = [f"{info.quarantined_lines:,} lines held no prompt and were set aside"] if info.quarantined_lines else []
    lost += [f"{info.repeated_lines:,} lines repeated a prompt"] if info.repeated_lines else []
    lost += [f"{info.failed_rows:,} prompts failed in the model and have weight 0"] if info.failed_rows else []
    return (
        f"<p>Yes. All {info.total_rows:,} rows are committed, and each of the {data.chunks:,} chunks "
        f"({format_bytes(info.stored_bytes)}) is there at its size. Prompts, neighbours, coordinates and weights match "
        f"their checksums.</p><p>{_sentence(lost) or 'Every input line became a row.'}</p>"
        '<p class="muted">The rows inside the chunks were not read back for this page: <code>embstore verify</code> '
        "does.</p>"
    )


def _audit(data: ReportData) -> str:
    neighbors = data.metadata["neighbors"]
    audit = neighbors["audit"]
    if audit is None:
        return "<p>There are too few distinct prompts to have neighbours.</p>"
    if neighbors.get("knn") == "exact":
        first = (
            f"<p>Yes: they were found by an exact scan. {audit['num_rows']:,} prompts were checked again all the same.</p>"
        )
    elif neighbors["meets_target"]:
        first = f"<p>Yes. For {audit['num_rows']:,} prompts the search was repeated exactly.</p>"
    else:
        first = (
            '<p class="warn">Not as right as asked for: build with <code>--knn exact</code>, or take the figures below as '
            f"they are.</p><p>For {audit['num_rows']:,} prompts the search was repeated exactly.</p>"
        )
    misplaced = audit["tv"] * 100_000
    moved = f"about {misplaced:,.0f}" if misplaced >= 1 else "less than one"
    return (
        f"{first}<p>Of their {audit['k']} true nearest neighbours {_percent(audit['recall'], digits=2)} had been found; "
        f"over all prompts it is at least {_percent(audit['recall_lower'], digits=2)}, with 95 % confidence.</p>"
        f"<p>What was missed moves {moved} of 100,000 draws to another prompt.</p>"
    )


def _weights(data: ReportData) -> str:
    metadata = data.metadata
    weighting = metadata["weighting"]
    finite = np.sort(data.weight[np.isfinite(data.weight)])[::-1]
    tenth = finite[: max(1, len(finite) // 10)].sum() / (finite.sum() or 1.0)
    how = {
        "uniform": "Every vector is drawn equally often.",
        "legacy-inverse": "The original formula, 1 / distance: it favours crowds. For comparison only.",
        "inverse-density": f"A prompt’s weight is its mean distance to its {weighting['k']} nearest others"
        + ("." if weighting["gamma"] == 1 else f", to the power {weighting['gamma']:.3g}."),
    }.get(weighting["weighting"], f"A weighting called {_text(weighting['weighting'])}.")
    mix = weighting.get("uniform_mix")
    mixed = f" {_percent(mix)} even sampling is mixed in." if isinstance(mix, int | float) and mix else ""
    text = (
        f"<p>{how}{mixed}</p><p>The heaviest tenth of the prompts gets {_percent(tenth)} of the draws. Drawing by these "
        f"weights is like drawing evenly from {metadata['ess']:,.0f} prompts ({_percent(metadata['ess_share'])}).</p>"
    )
    if metadata["ess_share"] > MILD_ESS_SHARE and weighting["weighting"] == "inverse-density":
        text += '<p class="muted">That is mild. <code>embstore weights --target-ess 0.5</code> makes it matter.</p>'
    notes = list(metadata["warnings"])
    if metadata["byte_identity_voided"]:
        notes.append("hardware changed, or memory ran out, during the build: its rows are not bit-reproducible")
    return text + "".join(f'<p class="warn">{_text(note)}</p>' for note in notes)


def _source_row(share: SourceShare, reach: float) -> str:
    width = 50 * abs(share.ratio - 1) / reach
    side = f"left:50%;width:{width:.1f}%" if share.ratio >= 1 else f"right:50%;width:{width:.1f}%"
    kind = "more" if share.ratio >= 1 else "less"
    return (
        f'<tr><td class="value"><bdi>{_text(share.value)}</bdi></td><td class="num">{share.rows:,}</td>'
        f'<td class="num">{_percent(share.row_share, digits=2)}</td>'
        f'<td class="num">{_percent(share.weight_share, digits=2)}</td><td class="num">{share.ratio:.2f} ×</td>'
        f'<td class="ratio"><span class="bar {kind}" style="{side}"></span></td></tr>'
    )


def _group_section(name: str, title: str, intro: str, found: Iterable[Group], empty: str) -> str:
    items = "".join(_group(group) for group in found)
    body = f'<div class="groups">{items}</div>' if items else f'<p class="muted">{empty}</p>'
    return f'<section id="{name}"><h2>{title}</h2><p class="muted">{intro}</p>{body}</section>'


def _group(group: Group) -> str:
    first, *others = group.examples
    source = f", {_percent(group.source_share)} from <bdi>{_text(group.source)}</bdi>" if group.source else ""
    more = "".join(f"<li>{_prompt_text(example)}</li>" for example in others)
    details = f"<details><summary>{len(others)} more of them</summary><ul>{more}</ul></details>" if more else ""
    return (
        f'<article class="group"><h3>{group.rows:,} prompts</h3>'
        f'<p class="muted">{_percent(group.row_share, digits=2)} of prompts, {_percent(group.weight_share, digits=2)} of '
        f"draws, median distance {group.median_distance:.3g}{source}</p>"
        f"<blockquote>{_prompt_text(first)}</blockquote>{details}</article>"
    )


def _prompt(example: Example, *, has_source: bool) -> str:
    source = f", <bdi>{_text(example.source)}</bdi>" if has_source else ""
    return (
        f"<li>{_prompt_text(example)}<div class='muted small'>weight {example.weight:.2f} ×, distance "
        f"{example.mean_distance:.3g}{source}, id <bdi>{_text(example.id)}</bdi></div></li>"
    )


def _prompt_text(example: Example) -> str:
    return f'<bdi class="prompt">{_text(example.text)}</bdi>'


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _code(digest: str) -> str:
    return f"<code>{_text(digest[:12])}</code>"


def _percent(share: float, *, digits: int = 0) -> str:
    """A share in percent; never 100 where something is missing, never 0 where something is there."""
    shown = f"{share:.{digits}%}"
    if share < 1 and shown == f"{1:.{digits}%}":
        shown = f"{share:.{digits + 2}%}"
        return shown if shown != f"{1:.{digits + 2}%}" else "just under 100 %"
    if share > 0 and shown == f"{0:.{digits}%}":
        return f"under {10.0**-digits:g} %"
    return shown.replace("%", " %")


def _sentence(parts: list[str]) -> str:
    return "; ".join(parts) + "." if parts else ""
