// Draws the charts and answers the search box. Texts of prompts reach the page as text nodes only, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.map;
  const size = points.text.length;
  const paper = matchMedia("print");
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const element = (id) => document.getElementById(id);

  // ---- colours: read from the style sheet, so that the two never differ
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const names = ["page", "panel", "ink", "muted", "line", "low", "high"];
    const found = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    found.middle = dark.matches && !paper.matches ? "#5c6672" : "#c3c9d0";
    return found;
  };
  const scale = (theme) => [[0, theme.low], [0.5, theme.middle], [1, theme.high]];
  const logOf = (weight) => Math.log2(Math.max(weight, 1e-6));

  const base = (theme) => ({
    paper_bgcolor: theme.page,
    plot_bgcolor: theme.page,
    font: { family: "system-ui, sans-serif", size: 13, color: theme.ink },
    showlegend: false,
    hovermode: "closest",
  });
  const axis = (theme, title, more = {}) => ({
    title: { text: title, font: { size: 13, color: theme.muted } },
    gridcolor: theme.line,
    linecolor: theme.line,
    tickcolor: theme.line,
    tickfont: { color: theme.muted },
    zeroline: false,
    automargin: true,
    fixedrange: true,
    ...more,
  });
  const hidden = { visible: false, zeroline: false, showgrid: false };
  const fixed = { displayModeBar: false, responsive: true };

  // ---- the map
  const canvas = document.createElement("canvas");
  const hasWebGL = Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  // without it each point is an element of its own, and a browser wants thousands of them, not tens of thousands
  const step = hasWebGL ? 1 : Math.ceil(size / 4000);
  const drawn = Array.from({ length: Math.ceil(size / step) }, (_, index) => index * step);
  if (step > 1) {
    element("no-webgl").textContent =
      `This browser has no WebGL: the map draws ${drawn.length.toLocaleString("en")} of ${size.toLocaleString("en")} points. ` +
      "Search still looks at all of them.";
    element("no-webgl").hidden = false;
  }
  const kind = hasWebGL ? "scattergl" : "scatter";
  let layout = points.umap ? "umap" : "pca";
  let matches = [];
  const pick = (column, rows) => rows.map((row) => column[row]);
  const logs = points.weight.map(logOf);

  const mapTraces = (theme) => {
    const [x, y] = points[layout];
    return [
      {
        type: kind, mode: "markers", hoverinfo: "none", customdata: drawn,
        x: pick(x, drawn), y: pick(y, drawn),
        marker: {
          size: size > 20000 ? 4 : size > 3000 ? 5 : 8,
          opacity: matches.length ? 0.18 : 0.8,
          color: pick(logs, drawn), colorscale: scale(theme), cmin: -data.reach, cmax: data.reach,
          colorbar: {
            title: { text: "weight", side: "right", font: { size: 13, color: theme.muted } },
            thickness: 12, len: 0.6, outlinewidth: 0,
            tickvals: data.ticks.map(logOf), ticktext: data.ticks.map((weight) => `${weight} ×`), tickfont: { color: theme.muted },
          },
          line: { width: 0 },
        },
      },
      {
        type: kind, mode: "markers", hoverinfo: "none", customdata: matches,
        x: pick(x, matches), y: pick(y, matches),
        marker: {
          size: matches.length > 500 ? 6 : 10, opacity: 1,
          color: pick(logs, matches), colorscale: scale(theme), cmin: -data.reach, cmax: data.reach,
          line: { width: matches.length > 500 ? 0.6 : 1.2, color: theme.ink },
        },
      },
    ];
  };
  const mapLayout = (theme) => ({
    ...base(theme),
    margin: { l: 10, r: 10, t: 10, b: 10 },
    xaxis: hidden, yaxis: { ...hidden, scaleanchor: "x" },
    dragmode: "zoom", uirevision: layout, hoverdistance: 12,
  });
  const mapOptions = {
    displaylogo: false, responsive: true,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], // none that would upload the chart
  };
  const drawMap = () => {
    const theme = colours();
    return Plotly.react("map", mapTraces(theme), mapLayout(theme), mapOptions);
  };

  // ---- the other charts
  const middles = (edges) => edges.slice(1).map((edge, index) => (edge + edges[index]) / 2);
  const bars = (histogram, more) => ({
    type: "bar", x: middles(histogram.edges), y: histogram.counts,
    width: histogram.edges[1] - histogram.edges[0], ...more,
  });
  const margin = { l: 56, r: 12, t: 8, b: 44 };
  const beyond = (histogram, theme) => (histogram.above ? [{
    text: `${histogram.above.toLocaleString("en")} more →`, showarrow: false, xref: "paper", yref: "paper",
    x: 1, y: 0.12, xanchor: "right", yanchor: "bottom", font: { size: 12, color: theme.muted },
  }] : []);

  const drawWeights = (theme) =>
    Plotly.react("weights", [bars(data.weights, {
      marker: {
        color: middles(data.weights.edges).map(logOf), colorscale: scale(theme), cmin: -data.reach, cmax: data.reach,
      },
      hovertemplate: "weight %{x:.2f}: %{y:,} prompts<extra></extra>",
    })], {
      ...base(theme), margin, bargap: 0.08,
      xaxis: axis(theme, "weight, in units of the mean"), yaxis: axis(theme, "prompts"),
      annotations: beyond(data.weights, theme),
      shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: theme.ink, width: 1, dash: "dot" } }],
    }, fixed);

  const drawDistances = (theme) =>
    Plotly.react("distances", [bars(data.distances, {
      marker: { color: theme.muted },
      hovertemplate: "distance %{x:.3g}: %{y:,} prompts<extra></extra>",
    })], {
      ...base(theme), margin, bargap: 0.08,
      xaxis: axis(theme, `mean distance to ${data.k} neighbours`), yaxis: axis(theme, "prompts"),
      annotations: beyond(data.distances, theme),
    }, fixed);

  const drawLengths = (theme) => {
    const found = data.lengths;
    const darkness = found.counts.map((row) => row.map((count) => (count ? Math.log10(count + 1) : null)));
    const line = { type: "scatter", mode: "lines", x: found.centre, hoverinfo: "skip" };
    return Plotly.react("lengths", [
      {
        type: "heatmap", x: found.x, y: found.y, z: darkness, customdata: found.counts, showscale: false,
        colorscale: [[0, theme.line], [1, theme.ink]],
        hovertemplate: "%{customdata:,} prompts of about %{x:.0f} characters<br>weight about %{y:.2f}<extra></extra>",
      },
      { ...line, y: found.low, line: { width: 1, color: theme.high, dash: "dot" } },
      { ...line, y: found.high, line: { width: 1, color: theme.high, dash: "dot" } },
      { ...line, y: found.median, line: { width: 3, color: theme.high } },
    ], {
      ...base(theme), margin,
      xaxis: axis(theme, "characters", { type: "log", showgrid: false, dtick: 1 }),
      yaxis: axis(theme, "weight, in units of the mean", { showgrid: false }),
    }, fixed);
  };

  const drawAll = () => {
    const theme = colours();
    const charts = [drawMap(), drawWeights(theme), drawLengths(theme)];
    if (data.distances) charts.push(drawDistances(theme));
    return Promise.all(charts);
  };

  // ---- a prompt as elements
  const made = (tag, className, text) => {
    const found = document.createElement(tag);
    if (className) found.className = className;
    if (text !== undefined) found.textContent = text;
    return found;
  };
  const facts = (row) => {
    const distance = points.distance[row] === null ? "" : `, distance ${Number(points.distance[row].toPrecision(3))}`;
    const source = data.field === null ? "" : `, ${data.sources[points.source[row]]}`;
    return `weight ${points.weight[row].toFixed(2)} ×${distance}, ${points.length[row].toLocaleString("en")} characters${source}, id ${points.id[row]}`;
  };
  const describe = (parent, row, text) => {
    const prompt = made("bdi", "prompt");
    prompt.append(...text);
    parent.append(prompt, made("div", "muted small", facts(row)));
  };

  // ---- hover
  const tooltip = element("tooltip");
  const showTooltip = (event) => {
    const point = event.points[0];
    if (!point || !event.event) return;
    tooltip.replaceChildren();
    describe(tooltip, point.customdata, [points.text[point.customdata]]);
    tooltip.hidden = false;
    const box = tooltip.getBoundingClientRect();
    const { clientX: x, clientY: y } = event.event;
    tooltip.style.left = `${Math.max(8, x + 16 + box.width < innerWidth ? x + 16 : x - 16 - box.width)}px`;
    tooltip.style.top = `${Math.max(8, Math.min(y + 16, innerHeight - box.height - 8))}px`;
  };
  const hideTooltip = () => { tooltip.hidden = true; };

  // ---- search
  const LISTED = 10;
  let lowered = null;
  const haystack = () => {
    lowered ??= points.text.map((text, row) =>
      `${text}\n${points.id[row]}\n${data.field === null ? "" : data.sources[points.source[row]]}`.toLowerCase());
    return lowered;
  };
  const marked = (text, wanted) => {
    const lower = text.toLowerCase();
    const parts = [];
    let from = 0;
    // a letter that changes its length in lower case would shift the marks
    for (let at = lower.indexOf(wanted); lower.length === text.length && at >= 0; at = lower.indexOf(wanted, from)) {
      parts.push(text.slice(from, at), made("mark", "", text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    return [...parts, text.slice(from)];
  };
  const search = async (typed) => {
    const wanted = typed.trim().toLowerCase();
    matches = [];
    if (wanted) haystack().forEach((text, row) => { if (text.includes(wanted)) matches.push(row); });
    const found = element("found");
    found.textContent = wanted
      ? `${matches.length.toLocaleString("en")} of ${size.toLocaleString("en")} prompts` +
        (matches.length > LISTED ? `; the ${LISTED} heaviest are listed below the map` : "")
      : "";
    element("matches").replaceChildren(...matches.slice(-LISTED).reverse().map((row) => {
      const item = made("li");
      describe(item, row, marked(points.text[row], wanted));
      return item;
    }));
    await drawMap();
    found.dataset.shown = typed; // what the map shows now
  };

  let waiting = 0;
  element("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search(event.target.value), 120);
  });
  document.querySelectorAll("[data-layout]").forEach((button) => button.addEventListener("click", () => {
    layout = button.dataset.layout;
    document.querySelectorAll("[data-layout]").forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    drawMap();
  }));
  dark.addEventListener("change", drawAll);
  paper.addEventListener("change", drawAll);
  addEventListener("scroll", hideTooltip, { passive: true });

  drawAll().then(() => {
    element("map").on("plotly_hover", showTooltip);
    element("map").on("plotly_unhover", hideTooltip);
    document.body.dataset.state = "drawn";
  });
})();
