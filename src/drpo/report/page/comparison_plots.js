// The plots of a comparison. An objective has one colour, dash and symbol in all of them.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross"];
const STROKES = { solid: "none", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" };

/** Seven colours and four dashes: no two of 28 objectives look alike. */
function lookOf(objective) {
  const color = seriesColor(objective % 7);
  return { color, dash: DASHES[objective % DASHES.length], symbol: SYMBOLS[objective % 7] };
}

/** A learning rate as one writes it: 2e-5. */
function rateText(rate) {
  return rate < 0.01 ? rate.toExponential() : String(rate);
}

function swatch(objective) {
  const svg = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const drawn = svg("svg", { class: "swatch", viewBox: "0 0 30 12", "aria-hidden": "true" });
  const line = svg("line", { x1: 0, x2: 30, y1: 6, y2: 6, "stroke-width": 3 });
  const paint = () => {
    const { color, dash } = lookOf(objective);
    line.setAttribute("stroke", color);
    line.setAttribute("stroke-dasharray", STROKES[dash]);
  };
  paint();
  DARK.addEventListener("change", paint);
  drawn.append(line);
  return drawn;
}

/** Curves { objective, step, of, [key]: { mean, low, high, seeds } } of one regime, with their bands. */
function curveTraces(curves, key, names, { bands = true, seeds = false, clip = (y) => y } = {}) {
  const opacity = 0.22 / Math.sqrt(Math.max(1, curves.length));  // many bands on one another are mud
  const shades = (bands ? curves : []).map((c) => bandTrace(c.step, c[key], lookOf(c.objective).color + alpha(opacity), clip));
  const thin = (seeds ? curves : []).flatMap((c) => c[key].seeds.map((y) => thinTrace(c, y)));
  const means = curves.map((c) => {
    const { color, dash } = lookOf(c.objective);
    const name = plotText(names[c.objective]);
    return { x: c.step, y: c[key].mean, name, mode: "lines", line: { color, dash, width: 2.2 }, hovertemplate: "%{y:.3~g}" };
  });
  return [...shades, ...thin, ...means];
}

/** An opacity as the last two digits of a colour. */
function alpha(opacity) {
  return Math.round(255 * opacity).toString(16).padStart(2, "0");
}

function bandTrace(step, { low, high }, fillcolor, clip) {
  const at = [...step.keys()].filter((i) => low[i] !== null);
  const [below, above] = [at.map((i) => clip(low[i])), at.map((i) => clip(high[i]))];
  const x = at.map((i) => step[i]);
  return {
    x: [...x, ...x.toReversed()], y: [...above, ...below.toReversed()], mode: "lines", line: { width: 0 },
    fill: "toself", fillcolor, hoverinfo: "skip",
  };
}

function thinTrace({ step, objective }, y) {
  return { x: step, y, mode: "lines", line: { color: lookOf(objective).color, width: 0.8 }, opacity: 0.6, hoverinfo: "skip" };
}

function curveLayout(unit, yaxis) {
  return {
    hovermode: "x unified", showlegend: false, margin: WIDE,
    xaxis: { title: { text: "step" }, tickformat: "d", nticks: 8 }, yaxis: { title: { text: unit }, ...yaxis },
  };
}

const WIDE = { l: 50, r: 12, t: 8, b: 40 };

/** The range of an axis around some numbers, with a little air; logarithmic where all that is to be seen is above 0. */
function axisAround(numbers, log) {
  const seen = numbers.filter((y) => y !== null && (!log || y > 0));
  if (seen.length === 0) return {};
  if (log) return logAxis(seen);
  const [low, high] = [Math.min(...seen), Math.max(...seen)];
  const air = 0.05 * (high - low || 1);
  return { range: [low - air, high + air] };
}

const ABOVE = 0.27;  // of its row, where the seeds stand: on the line they would hide each other

/** Rows { objective, name, interval: [mean, low, high], dots: [[seed, value], ...] }, one below the other. */
function rowTraces(rows, clip) {
  return rows.flatMap(({ objective, name, interval, dots = [] }, y) => {
    const { color, symbol } = lookOf(objective);
    const [mean, low, high] = interval;
    const known = low !== null && { error_x: {
      type: "data", symmetric: false, array: [clip(high) - mean], arrayminus: [mean - clip(low)], color, thickness: 3, width: 0,
    } };
    const range = low === null ? "" : `<br>${brief(low)} to ${brief(high)}`;
    const middle = {
      x: [mean], y: [y], name: plotText(name), mode: "markers", hovertemplate: `mean %{x:.3~f}${range}`, ...known,
      marker: { color, symbol: "line-ns", size: 15, line: { color, width: 3 } },
    };
    const seeds = {
      x: dots.map(([, value]) => value), y: dots.map(() => y - ABOVE), text: dots.map(([seed]) => `seed ${seed}`), mode: "markers",
      name: plotText(name), hovertemplate: "%{text}: %{x:.3~f}",
      marker: { color, symbol, size: 8, opacity: 0.85 },
    };
    return dots.length ? [middle, seeds] : [middle];
  });
}

function rowLayout(rows, title, range, zero = false) {
  const line = { type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: cssColor("muted"), width: 1.4, dash: "dot" } };
  return {
    showlegend: false, hovermode: "closest", margin: WIDE, shapes: zero ? [line] : [],
    xaxis: { title: { text: title }, range, zeroline: false, nticks: 7 },
    yaxis: {
      tickvals: rows.map((_, i) => i), ticktext: rows.map(({ name }) => plotText(name)), range: [rows.length - 0.5, -0.65],
      zeroline: false, showgrid: false, tickfont: { color: cssColor("ink") },
    },
  };
}

/** End against learning rate, a line per objective; side by side where they would hide each other. */
function sweepTraces(byObjective, names, clip) {
  return byObjective.map(({ objective, conditions }, i) => {
    const { color, dash, symbol } = lookOf(objective);
    const aside = 10 ** (0.014 * (i - (byObjective.length - 1) / 2));
    const [mean, low, high] = [0, 1, 2].map((k) => conditions.map((c) => c.mean[k]));
    return {
      x: conditions.map((c) => c.rate * aside), y: mean, name: plotText(names[objective]), mode: "lines+markers",
      customdata: conditions.map((c) => rateText(c.rate)), hovertemplate: "at %{customdata}: %{y:.3~f}",
      line: { color, dash, width: 2 }, marker: { color, symbol, size: conditions.map((c) => (c.best ? 12 : 7)) },
      error_y: {
        type: "data", symmetric: false, color, thickness: 1.3, width: 3,
        array: mean.map((y, k) => (high[k] === null ? 0 : clip(high[k]) - y)),
        arrayminus: mean.map((y, k) => (low[k] === null ? 0 : y - clip(low[k]))),
      },
    };
  });
}

function sweepLayout(rates, range) {
  const [low, high] = [Math.log10(rates[0]), Math.log10(rates.at(-1))];
  return {
    showlegend: false, hovermode: "closest", margin: WIDE,
    xaxis: {
      type: "log", title: { text: "learning rate" }, tickvals: rates, ticktext: rates.map(rateText), range: [low - 0.12, high + 0.12],
    },
    yaxis: { title: { text: "end" }, range },
  };
}

function mapTraces({ rates, updates, end, text }, [low, high]) {
  return [{
    type: "heatmap", x: rates.map(rateText), y: updates.map(String), z: end, zmin: low, zmax: high, colorscale: "Cividis",
    text: text.map((row) => row.map((said) => said.replace(", ", "<br>"))), texttemplate: "%{text}", xgap: 2, ygap: 2,
    hovertemplate: "learning rate %{x}, updates %{y}: %{z:.3~f}<extra></extra>", colorbar: { thickness: 8, outlinewidth: 0 },
  }];
}

function mapLayout() {
  const axis = (text) => ({ type: "category", title: { text }, showgrid: false });
  return { margin: WIDE, xaxis: axis("learning rate"), yaxis: axis("updates per rollout") };
}
