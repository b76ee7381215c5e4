// Plots by plotly, which is unpacked once, when the first plot comes near the window. A plot is drawn again where the
// colour scheme changes.

const DARK = matchMedia("(prefers-color-scheme: dark)");
const NEAR = "200px";
// Blue and vermilion are too dark on a dark page: their lighter kin of the same palette stand in for them.
const IN_THE_DARK = [5, 4, 2, 3, 1, 0, 6];
const BLACK = 6;
const DASHES = ["solid", "dash", "dot", "dashdot"];
const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
};

let palette = [];
let plotlyReady = null;
let queue = Promise.resolve();
const drawings = new Map();

function loadPlotly() {
  plotlyReady ??= (async () => {
    // To read it takes long enough to be felt: what else there is to do comes first.
    await new Promise((resolve) => requestIdleCallback(resolve, { timeout: 1000 }));
    const [script, colors] = await Promise.all([payloadText("plotly"), payloadJSON("palette")]);
    palette = colors;
    document.head.append(Object.assign(document.createElement("script"), { textContent: script }));
    return window.Plotly;
  })();
  return plotlyReady;
}

/** A colour of the palette; its black is the page's ink, which is light in the dark. */
function seriesColor(i) {
  const at = DARK.matches ? IN_THE_DARK[i] : i;
  return at === BLACK ? cssColor("ink") : palette[at];
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Plotly reads some HTML in its texts: none of it is meant. */
function plotText(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** The layout that all plots share; `axes` and the rest of `own` are merged into it. */
function plotLayout({ xaxis = {}, yaxis = {}, ...own }) {
  const ink = cssColor("muted");
  const axis = {
    gridcolor: cssColor("grid"), zerolinecolor: cssColor("line"), linecolor: cssColor("line"), automargin: true,
    title: { standoff: 6 }, exponentformat: "power",
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    margin: { l: 44, r: 10, t: 8, b: 34 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    hoverlabel: { bgcolor: cssColor("surface"), bordercolor: cssColor("line"), font: { color: cssColor("ink") } },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...own,
  };
}

/** Draws `make()`, { data, layout }, into an element when it comes near the window, and again when `redraw` asks. */
function plot(host, make) {
  drawings.set(host, { make, drawn: false });
  nearby.observe(host);
}

/** Draws one plot after the other, with a breath between them, so that the page answers meanwhile. */
function draw(host) {
  const drawing = drawings.get(host);
  if (drawing.waiting) return queue;  // whoever asked first gets what is newest then
  drawing.waiting = true;
  queue = queue.then(() => drawNow(host)).then(() => new Promise((resolve) => setTimeout(resolve)));
  return queue;
}

async function drawNow(host) {
  const drawing = drawings.get(host);
  const plotly = await loadPlotly();
  drawing.waiting = false;
  const { data, layout } = drawing.make();
  drawing.drawn = true;
  await plotly.react(host, data, plotLayout(layout), CONFIG);
  host.dataset.drawn = "yes";
}

async function redraw(host) {
  if (drawings.get(host)?.drawn) await draw(host);
}

const nearby = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        nearby.unobserve(target);
        draw(target);
      }
    }
  },
  { rootMargin: NEAR },
);

DARK.addEventListener("change", () => drawings.forEach((_, host) => redraw(host)));
window.addEventListener("beforeprint", () => drawings.forEach((_, host) => draw(host)));

/** A figure with a title, a plot and a caption; `text` says for those who do not see the plot what it shows. */
function plotFigure({ title, caption, text, make }) {
  const host = el("div", { class: "plot", role: "img", "aria-label": text });
  plot(host, make);
  return el("figure", { class: "card" }, el("h3", {}, title), host, el("figcaption", {}, caption));
}

/** A panel of `panels.py`. */
function panelFigure(panel) {
  return plotFigure({ ...panel, make: () => ({ data: panelTraces(panel), layout: panelLayout(panel) }) });
}

function panelTraces(panel) {
  const lines = panel.series.map((series, i) => seriesTrace(series, i));
  const span = [Math.min(...panel.series.map((s) => s.x[0])), Math.max(...panel.series.map((s) => s.x.at(-1)))];
  const levels = panel.levels.map(({ name, y }) => ({
    x: span, y: [y, y], name: plotText(`${name}: ${brief(y)}`), mode: "lines", hoverinfo: "skip",
    line: { color: cssColor("muted"), width: 1.2, dash: "dot" },
  }));
  return [...lines, ...levels];
}

function seriesTrace({ name, x, y, color, low, high }, i) {
  const drawn = seriesColor(color);
  const interval = low && {
    type: "data", symmetric: false, thickness: 1.4, width: 4, color: drawn,
    array: y.map((value, k) => high[k] - value), arrayminus: y.map((value, k) => value - low[k]),
  };
  return {
    x, y, name: plotText(name), mode: low || x.length < 3 ? "lines+markers" : "lines", hovertemplate: "%{y:.4~g}",
    line: { color: drawn, width: 2, dash: DASHES[i % DASHES.length] }, marker: { size: 7 },
    ...(interval ? { error_y: interval } : {}),
  };
}

function panelLayout(panel) {
  return {
    hovermode: "x unified",
    showlegend: panel.series.length + panel.levels.length > 1,
    xaxis: { title: { text: "step", standoff: 4 }, tickformat: "d", nticks: 7 },
    yaxis: { title: { text: panel.unit, standoff: 6 }, ...(panel.log ? logAxis(panelValues(panel)) : { nticks: 6 }) },
  };
}

function panelValues(panel) {
  return [...panel.series.flatMap((series) => series.y), ...panel.levels.map(({ y }) => y)].filter((y) => y > 0);
}

/** A logarithmic axis around some numbers: labelled at 1, 2 and 5 of each power of ten where these are few, else at 1. */
function logAxis(values) {
  const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
  const margin = 0.08 * (high - low) + 0.03;
  const range = [low - margin, high + margin];
  const powers = Array.from({ length: Math.ceil(range[1]) - Math.floor(range[0]) + 1 }, (_, i) => Math.floor(range[0]) + i);
  const digits = range[1] - range[0] < 1.6 ? [1, 2, 5] : [1];
  const ticks = powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)));
  return { type: "log", range, tickvals: ticks, ticktext: ticks.map(brief) };
}
