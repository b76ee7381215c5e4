// The larger plots of a run: tokens in the plane of mu and pi, the histogram of weights, the seconds of each phase.

const WIDE_MARGIN = { l: 54, r: 12, t: 8, b: 42 };

/** The signs are drawn in turns, so that neither hides the other. */
const TURNS = 6;
const SIGNS = [
  { sign: 1, name: "A > 0", color: 0, symbol: "circle" },
  { sign: -1, name: "A < 0", color: 1, symbol: "diamond" },
];

function showScatter({ scatter, regions, caution }) {
  const host = byId("scatter-plot");
  const choice = byId("region-choice");
  const boxes = regions.map((region) => regionBox(region));
  choice.append(...boxes.map(({ label }) => label));
  const chosen = () => regions.filter((region, i) => boxes[i].input.checked);
  for (const control of [byId("axes"), choice]) control.addEventListener("change", () => redraw(host));
  byId("scatter-caption").textContent = scatterCaption(scatter, caution);
  host.setAttribute("aria-label", scatterCaption(scatter, caution));
  plot(host, () => ({ data: scatterTraces(scatter, chosen()), layout: scatterLayout(byId("axes").value) }));
}

function regionBox(region) {
  const input = el("input", { type: "checkbox", checked: region.reachable, disabled: !region.reachable });
  const text = [region.name, region.own ? ", this run's" : "", region.reachable ? "" : " (no token can reach it)"].join("");
  return { input, label: el("label", { class: "check" }, input, text) };
}

function scatterCaption({ mu, n, sign }, caution) {
  const up = sign.filter((s) => s > 0).length;
  const some = `${count(mu.length)} of the ${count(n)} trained tokens, drawn at random with the run's seed`;
  const which = mu.length < n ? some : `All ${count(n)} trained tokens`;
  const better = `${count(up)} of completions better than their group (circles)`;
  const worse = `${count(mu.length - up)} of worse ones (diamonds)`;
  return `${which}: ${better}, ${worse}.${caution ? ` Mind: ${caution}.` : ""}`;
}

function scatterTraces({ mu, pi, weight, sign }, chosen) {
  const turn = (k) => SIGNS.map(({ sign: wanted, name, color, symbol }) => {
    const at = [...sign.keys()].filter((i) => sign[i] === wanted && i % TURNS === k);
    return {
      x: at.map((i) => mu[i]), y: at.map((i) => pi[i]), customdata: at.map((i) => brief(weight[i])),
      name, mode: "markers", legendgroup: name, showlegend: k === 0,
      marker: { color: seriesColor(color), size: 5, opacity: 0.5, symbol, line: { width: 0 } },
      hovertemplate: "\u03bc %{x:.3~g}<br>\u03c0 %{y:.3~g}<br>w %{customdata}<extra></extra>",
    };
  });
  const points = Array.from({ length: TURNS }, (_, k) => turn(k)).flat();
  return [diagonal(), ...points, ...chosen.flatMap((region, i) => boundaryTraces(region, i))];
}

function diagonal() {
  const line = { color: cssColor("line"), width: 1.5 };
  return { x: [1e-8, 1], y: [1e-8, 1], mode: "lines", name: "\u03c0 = \u03bc", hoverinfo: "skip", line };
}

function boundaryTraces({ name, own, mu, low, high }, i) {
  const ofOthers = { color: seriesColor([2, 3, 4, 5][i % 4]), width: 1.8, dash: DASHES[1 + (i % 3)] };
  const line = own ? { color: cssColor("ink"), width: 2.6, dash: "solid" } : ofOthers;
  const shared = { x: mu, mode: "lines", name: plotText(name), legendgroup: name, line, hoverinfo: "skip" };
  return [{ ...shared, y: high }, { ...shared, y: low, showlegend: false }];
}

function scatterLayout(axes) {
  const span = axes === "log" ? { range: [-5, 0.06], dtick: 1 } : { range: [-0.02, 1.02] };
  const axis = (text) => ({ title: { text }, type: axes, ...span });
  return {
    xaxis: axis("\u03bc, the sampler's probability"), yaxis: axis("\u03c0, the policy's"),
    hovermode: "closest", margin: WIDE_MARGIN,
  };
}

function showHistogram({ histogram }) {
  const host = byId("histogram-plot");
  const select = byId("histogram-steps");
  const names = histogram.counts.map(({ steps }, i) => `${steps.join(" to ")}${i === 0 ? ", the whole run" : ""}`);
  select.append(...names.map((name, i) => el("option", { value: i }, name)));
  const chosen = () => histogram.counts[select.value];
  const describe = () => {
    byId("histogram-caption").textContent = histogramCaption(histogram, chosen());
    host.setAttribute("aria-label", histogramCaption(histogram, chosen()));
  };
  select.addEventListener("change", () => { describe(); redraw(host); });
  describe();
  plot(host, () => ({ data: histogramTraces(histogram.edges, chosen()), layout: histogramLayout() }));
}

function histogramCaption({ edges, least, greatest }, { positive, negative }) {
  const total = [...positive, ...negative].reduce((a, b) => a + b, 0);
  return [
    `${count(total)} trained tokens, on a logarithmic scale.`,
    `Weights of the whole run go from ${brief(least)} to ${brief(greatest)};`,
    `the outermost bins, at ${brief(edges[0])} and ${brief(edges.at(-1))}, count all beyond.`,
    "Left of the dotted line at 0 tokens are pulled back.",
  ].join(" ");
}

function histogramTraces(edges, counts) {
  const width = edges[1] - edges[0];
  return SIGNS.map(({ sign, name, color }) => ({
    type: "bar", x: edges.slice(0, -1), offset: 0, width, y: sign > 0 ? counts.positive : counts.negative, name,
    marker: { color: seriesColor(color), opacity: 0.6, pattern: { shape: sign > 0 ? "" : "/", size: 6, solidity: 0.25 } },
    hovertemplate: "w from %{x:.3~g}: %{y} tokens",
  }));
}

function histogramLayout() {
  const line = { color: cssColor("muted"), width: 1.2 };
  const upright = (x, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { ...line, dash } });
  return {
    barmode: "overlay", hovermode: "x unified", shapes: [upright(0, "dot"), upright(1, "solid")],
    xaxis: { title: { text: "gradient weight w" }, zeroline: false }, yaxis: { title: { text: "tokens" }, type: "log", dtick: 1 },
    margin: WIDE_MARGIN,
  };
}

function showTimeline({ timeline: { step, phases } }) {
  const host = byId("timeline-plot");
  const total = (seconds) => brief(seconds.reduce((a, b) => a + b, 0));
  const totals = Object.entries(phases).map(([name, seconds]) => `${name} ${total(seconds)} s`);
  host.setAttribute("aria-label", `Seconds of each phase over the run: ${totals.join(", ")}.`);
  host.after(el("p", { class: "caption" }, `In all: ${totals.join(", ")}.`));
  const shapes = ["", "/", "x", "-", "\\", ".", "+"];
  const hatch = (i) => ({ shape: shapes[i % 7], fillmode: "overlay", fgcolor: cssColor("surface"), fgopacity: 0.45, size: 7, solidity: 0.2 });
  plot(host, () => ({
    data: Object.entries(phases).map(([name, seconds], i) => ({
      type: "bar", x: step, y: seconds, name: plotText(name), hovertemplate: "%{y:.3~g} s",
      marker: { color: seriesColor([3, 0, 4, 2, 1, 5][i % 6]), pattern: hatch(i) },
    })),
    layout: {
      barmode: "stack", hovermode: "x unified", xaxis: { title: { text: "step" }, tickformat: "d" },
      yaxis: { title: { text: "seconds" } }, margin: WIDE_MARGIN,
    },
  }));
}
