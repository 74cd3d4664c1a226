"""Reports and stores on a terminal: results, which go to stdout. ``progress`` shows what a build does meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embstore.core.config import format_bytes
from embstore.core.decode import printable
from embstore.core.diagnostics import MILD_ESS_SHARE
from embstore.core.format import JsonObject, is_superseded_name
from embstore.flow.build import BuildReport
from embstore.flow.stored_weights import StoredWeights
from embstore.storage.journal import NO_FOLDER_SYNC
from embstore.storage.verify import ONLY_A_NEW_BUILD, VerifyReport
from embstore.views.comparison import Comparison
from embstore.views.field_values import OtherValues, Share
from embstore.views.info import NeighborInfo, PromptInfo, StoreInfo

_BLOCKS = " ▏▎▍▌▋▊▉█"
_HISTOGRAM_WIDTH = 40
_SHOWN_GROUPS = 10
_SHOWN_RANGES = 5


def results() -> Console:
    """The console for results: stdout, without line wrapping if it is not a terminal."""
    return Console(soft_wrap=not sys.stdout.isatty(), emoji=False)


def plain(text: str) -> str:
    """Text from a store or a prompts file, escaped so that it cannot change styles or move the cursor."""
    return escape(printable(text))


def print_report(console: Console, report: BuildReport, info: StoreInfo) -> None:
    """The end of a build: what was done, how accurate it is, and the weights."""
    seconds = report.seconds.get("embed", 0.0)
    console.print(
        f"[bold green]complete[/bold green] {escape(str(report.store))}: {report.num_rows:,} rows", highlight=False
    )
    for line in report.pool.lines_of_text():
        console.print(f"  {plain(line)}", highlight=False)
    if report.reused_rows or report.dropped_rows:
        console.print(
            f"  reused {report.reused_rows:,} rows, computed {report.embedded_rows:,}, "
            f"dropped {report.dropped_rows:,} old rows",
            highlight=False,
        )
    if report.embedded_rows and seconds:
        tokens = f"{report.embedded_tokens / seconds:,.0f} tokens/s, " if report.embedded_tokens else ""
        console.print(
            f"  embedded {report.embedded_rows:,} rows in {seconds:.1f} s: {report.embedded_rows / seconds:,.0f} rows/s, "
            f"{tokens}{format_bytes(report.stored_bytes / seconds)}/s written",
            highlight=False,
        )
    if report.peak_anonymous_bytes is not None:
        workers = f", {format_bytes(report.worker_peak_bytes)} in a worker" if report.worker_peak_bytes else ""
        model = f", and {format_bytes(report.model_peak_bytes)} to load the model" if report.model_peak_bytes else ""
        console.print(f"  peak memory {format_bytes(report.peak_anonymous_bytes)}{model}{workers}", highlight=False)
    _print_density(console, report.metadata)
    _print_prompts(console, "rarest", info.rarest)
    _print_prompts(console, "most crowded", info.most_crowded)
    console.print(
        f"  training: [bold]load_weights({escape(repr(str(report.store)))}).for_dataset(dataset)[/bold]", highlight=False
    )


def print_info(console: Console, info: StoreInfo) -> None:
    """What ``embstore inspect`` shows."""
    state = "[green]complete[/green]" if info.is_complete else f"[yellow]unfinished[/yellow] ({info.stage})"
    console.print(f"[bold]{plain(info.path)}[/bold]  {state}", highlight=False)
    console.print(
        f"  rows {info.committed_rows:,}/{info.total_rows:,} committed, "
        f"windows {info.committed_windows}/{info.total_windows}, {format_bytes(info.stored_bytes)} of rows",
        highlight=False,
    )
    console.print(
        f"  from {info.lines:,} lines: {info.repeated_lines:,} repeats, {info.quarantined_lines:,} quarantined; "
        f"{info.failed_rows:,} failed rows"
        + (f"; {info.reused_rows:,} copied from other stores" if info.reused_rows else ""),
        highlight=False,
    )
    if not info.survives_power_cuts:
        console.print(f"  [yellow]note[/yellow]: it was written on a file system that {NO_FOLDER_SYNC}", highlight=False)
    if info.spec is not None:
        _print_spec(console, info.spec)
    if info.metadata is None:
        if not info.is_complete:
            console.print("  no weights yet: run [bold]embstore build --resume[/bold]", highlight=False)
        return
    _print_density(console, info.metadata)
    _print_names(console, info)
    _print_histogram(console, info.weights_histogram, info.histogram_edges)
    _print_prompts(console, "rarest", info.rarest)
    _print_prompts(console, "most crowded", info.most_crowded)
    if info.shares:
        table = Table("value", "rows", "share of rows", "share of weight", "ratio", box=None, pad_edge=False)
        for share in info.shares:
            _add_share(table, plain(share.value), share)
        if info.other_values is not None:
            _add_share(table, f"and {info.other_values.values:,} other values", info.other_values)
        console.print(table)


def _add_share(table: Table, title: str, share: Share | OtherValues) -> None:
    ratio = share.weight_share / share.row_share
    table.add_row(title, f"{share.rows:,}", f"{share.row_share:.2%}", f"{share.weight_share:.2%}", f"{ratio:.2f}")


def print_weightings(console: Console, weightings: Sequence[StoredWeights]) -> None:
    """The weights of a store, as ``embstore weights --list`` shows them."""
    width = max(len(plain(each.name)) for each in weightings)
    for each in weightings:
        console.print(
            f"{plain(each.name):<{width}}  {each.digest}  {plain(each.weighting)}, k {each.k}, gamma {each.gamma:.3g}, "
            f"effective sample size {each.ess_share:.1%}, {format_bytes(each.bytes)}",
            highlight=False,
        )


def print_neighbors(console: Console, prompt_id: str, neighbors: Sequence[NeighborInfo]) -> None:
    """Nearest distinct prompts of one prompt."""
    console.print(f"nearest distinct prompts of [bold]{plain(prompt_id)}[/bold]", highlight=False)
    for neighbor in neighbors:
        console.print(f"  {neighbor.distance:.5f}  {plain(neighbor.id)}  {plain(neighbor.text)}", highlight=False)


def print_comparison(console: Console, found: Comparison) -> None:
    """What ``embstore compare`` found."""
    for title, side in (("left", found.left), ("right", found.right)):
        gamma = side.weighting.get("gamma")
        shown_gamma = f", gamma {gamma:.3g}" if isinstance(gamma, float) else ""
        alone = f"; {side.alone:,} rows ({side.alone_weight:.2%} of the weight) only here" if side.alone else ""
        console.print(
            f"[bold]{title:<6}[/bold] {plain(side.store)}:{plain(side.name)}  {plain(str(side.weighting['weighting']))}, "
            f"k {side.weighting['k']}{shown_gamma}, effective sample size {side.ess_share:.1%}{alone}",
            highlight=False,
        )
    rank = "undefined (one side is uniform)" if found.spearman is None else f"{found.spearman:.4f}"
    console.print(
        f"  {found.common:,} common prompts: {found.tv:.2%} of the draws would differ (TV), rank correlation {rank}",
        highlight=False,
    )
    if found.differing_texts:
        console.print(f"  [yellow]note[/yellow]: {found.differing_texts:,} of them have different texts", highlight=False)
    for title, prompts in (("rose", found.rose), ("fell", found.fell)):
        for prompt in prompts:
            console.print(
                f"  {title} {prompt.left:7.2f} -> {prompt.right:<7.2f} [dim]{plain(prompt.id)}[/dim]  {plain(prompt.text)}",
                highlight=False,
                no_wrap=True,
                overflow="ellipsis" if console.is_terminal else "ignore",
                crop=console.is_terminal,
            )


def print_verify(console: Console, report: VerifyReport, *, repaired: bool) -> None:
    """What ``embstore verify`` found."""
    for finding in report.findings:
        window = f" (window {finding.window})" if finding.window is not None else ""
        console.print(f"[red]damaged[/red] {plain(finding.path)}: {plain(finding.message)}{window}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/yellow]: {plain(note)}", highlight=False)
    checked = f"{report.files:,} files, {format_bytes(report.bytes)}, {report.committed_rows:,}/{report.total_rows:,} rows"
    if report.reused:
        ranges = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in report.reused[:_SHOWN_RANGES])
        more = f" and {len(report.reused) - _SHOWN_RANGES:,} more ranges" if len(report.reused) > _SHOWN_RANGES else ""
        reused = sum(stop - start for start, stop in report.reused)
        console.print(f"  {reused:,} rows were copied from other stores: rows {ranges}{more}", highlight=False)
    if report.findings:
        windows = {finding.window for finding in report.findings if finding.window is not None}
        console.print(f"[red]damaged[/red]: {len(report.findings)} findings in {checked}", highlight=False)
        if repaired and all(finding.path in ONLY_A_NEW_BUILD for finding in report.findings):
            console.print("  nothing was changed: these files need a new build into another --out", highlight=False)
        elif report.dropped:
            console.print(
                f"  dropped weights: {plain(', '.join(report.dropped))}; nothing else was damaged", highlight=False
            )
        elif repaired:
            console.print(
                f"  {len(windows)} windows demoted: run embstore build --resume to compute them again", highlight=False
            )
    elif report.is_complete:
        console.print(f"[green]ok[/green]: {checked}", highlight=False)
    else:
        console.print(f"[yellow]unfinished, undamaged[/yellow]: {checked}; run embstore build --resume", highlight=False)


def _print_spec(console: Console, spec: JsonObject) -> None:
    model, embedding = spec["model"], spec["embedding"]
    console.print(
        f"  model {plain(model['name'])} ({plain(model['architecture'])}), weights {plain(model['weights_sha256'][:12])}, "
        f"tokenizer {plain(model['tokenizer_sha256'][:12])}, prompts {plain(spec['prompts_fingerprint'][:12])}",
        highlight=False,
    )
    if embedding["head"]["kind"] == "imported":
        console.print(
            f"  {embedding['dimension']:,} columns in {embedding['rank']} coordinates, imported from "
            f"{plain(embedding['dtype'])} rows ({plain(embedding['capability'])}, {embedding['threads']} threads)",
            highlight=False,
        )
        _print_versions(console, embedding["versions"])
        return
    dated = "date not recorded" if embedding["chat_date"] is None else f"chats dated {plain(embedding['chat_date'])}"
    console.print(
        f"  {embedding['dimension']:,} columns in {embedding['rank']} coordinates, {plain(embedding['head']['kind'])} head, "
        f"{plain(embedding['dtype'])} on {plain(embedding['device'])} "
        f"({plain(embedding['capability'])}, {embedding['threads']} threads), "
        f"at most {embedding['max_tokens']} tokens, {dated}",
        highlight=False,
    )
    _print_versions(console, embedding["versions"])


def _print_versions(console: Console, versions: JsonObject | None) -> None:
    """What made the rows, apart from the model and the hardware."""
    if versions is None:
        console.print("  versions not recorded", highlight=False)
        return
    made = ", ".join(f"{name} {plain(version)}" for name, version in versions.items() if version is not None)
    console.print(f"  made with {made}", highlight=False)


def _print_density(console: Console, metadata: JsonObject) -> None:
    neighbors, weighting = metadata["neighbors"], metadata["weighting"]
    audit = neighbors["audit"]
    if audit is not None:
        verdict = "[green]meets its target[/green]" if neighbors["meets_target"] else "[red]BELOW its target[/red]"
        console.print(
            f"  recall@{audit['k']} {audit['recall']:.5f} (at least {audit['recall_lower']:.5f} with 95 % confidence, "
            f"{audit['num_rows']:,} rows checked exactly), weights TV {audit['tv']:.1e}: {verdict}",
            highlight=False,
        )
    _print_rerank(console, neighbors.get("rerank"))
    gamma = f", gamma {weighting['gamma']:.3g}" if weighting["weighting"] == "inverse-density" else ""
    centred = ", rows centred" if neighbors.get("center") is True else ""
    console.print(
        f"  weights {plain(weighting['weighting'])}, k {weighting['k']}{gamma}{centred}: "
        f"effective sample size {metadata['ess']:,.0f} ({metadata['ess_share']:.1%}), "
        f"largest {metadata['max_over_mean']:.1f} x the mean",
        highlight=False,
    )
    if metadata["ess_share"] > MILD_ESS_SHARE and weighting["weighting"] != "uniform":
        console.print(
            "  the weighting is mild: sampling is close to uniform; [bold]--target-ess 0.5[/bold] makes it stronger"
        )
    if "factors" in metadata:
        _print_factors(console, metadata["factors"])
    groups = metadata["vector_groups"]
    if groups["rows"]:
        console.print(
            f"  {groups['rows']:,} rows share their vector with other rows, in {groups['groups']:,} "
            f"group{'s' if groups['groups'] != 1 else ''}",
            highlight=False,
        )
    if metadata["byte_identity_voided"]:
        console.print(
            "  [yellow]note[/yellow]: rows are not bit-reproducible, because of hardware drift or split batches",
            highlight=False,
        )
    for warning in metadata["warnings"]:
        console.print(f"  [yellow]note[/yellow]: {plain(warning)}", highlight=False)


def _print_factors(console: Console, factors: JsonObject) -> None:
    """Scores, shares, and what each part of the weights does."""
    if "score" in factors:
        score, factor = factors["score"], factors["score"]["factor"]
        origin = f"field {score['field']}" if "field" in score else "a file"
        console.print(
            f"  score from {plain(origin)}, {plain(score['rule'])}: factors {factor['min']:.3g} to {factor['max']:.3g}, "
            f"median {factor['median']:.3g}; never drawn: {score['never_drawn']:,}",
            highlight=False,
        )
    if "shares" in factors:
        shares = factors["shares"]
        named = [
            f"{group['name']} {group['share']:.1%} ({group['rows']:,} rows)" for group in shares["groups"][:_SHOWN_GROUPS]
        ]
        more = f", and {shares['all_groups'] - len(named):,} more" if shares["all_groups"] > len(named) else ""
        console.print(f"  shares by {plain(shares['by'])}: {plain(', '.join(named))}{more}", highlight=False)
    for effect in factors["parts"]:
        without = (
            "" if effect["tv_without"] is None else f"; without it, {effect['tv_without']:.1%} of the draws would differ"
        )
        console.print(f"    after {effect['part']:<8} effective sample size {effect['ess']:,.0f}{without}", highlight=False)


def _print_names(console: Console, info: StoreInfo) -> None:
    """Which weights the store has, if it has more than one weighting."""
    given = [name for name in sorted(info.names) if not is_superseded_name(name)]
    replaced = len(info.names) - len(given)
    if len(info.names) > 1:
        more = f"; {replaced} that were replaced, see embstore weights {plain(info.path)} --list" if replaced else ""
        console.print(f"  weights in this store: {plain(', '.join(given))}{more}", highlight=False)


def _print_rerank(console: Console, rerank: JsonObject | None) -> None:
    """How many rows were ranked by stored rows, where coordinates are not the whole row; stores before this do not say."""
    if rerank is None or not rerank["off_basis_rows"]:
        return
    console.print(
        f"  {rerank['reranked_rows']:,} rows leave the basis or have a neighbour that does: their neighbours are ranked by "
        f"stored rows; {rerank['uncertain_rows']:,} of them may miss one of their {rerank['k']} nearest",
        highlight=False,
    )


def _print_histogram(console: Console, counts: Sequence[int], edges: Sequence[float]) -> None:
    most = max(counts, default=0)
    if not most:
        return
    console.print("  weight, in units of the mean:", highlight=False)
    full = "█" if console.encoding.startswith("utf") else "#"
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        eighths = round(count / most * _HISTOGRAM_WIDTH * 8)
        bar = full * (eighths // 8) + (_BLOCKS[eighths % 8].strip() if full == "█" else "")
        console.print(f"  {low:5.2f} to {high:5.2f} {count:>9,} [cyan]{bar}[/cyan]", highlight=False)


def _print_prompts(console: Console, title: str, prompts: Sequence[PromptInfo]) -> None:
    for prompt in prompts:
        console.print(
            f"  {title:<12} weight {prompt.weight:5.2f}  distance {prompt.mean_distance:.4f}  "
            f"[dim]{plain(prompt.id)}[/dim]  {plain(prompt.text)}",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis" if console.is_terminal else "ignore",  # a file or a pipe gets the whole excerpt
            crop=console.is_terminal,
        )
