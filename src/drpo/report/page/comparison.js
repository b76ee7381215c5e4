// The report of a comparison: puts its parts together.

const MOST_CLAIMS = 4;
const off = new Set();

function shown({ objective }) {
  return !off.has(objective);
}

function showMasthead({ counts, cautions, facts, claims, conditions, cells, seeds }) {
  byId("title").textContent = document.title;
  showCaution(cautions.length ? `Mind: ${cautions.join(" ")}` : null);
  showFacts(facts);
  byId("results").textContent = `${counts.finished + counts.diverged} of ${cells.length + counts.missing}`;
  const said = Object.entries(counts).map(([name, n]) => el("li", {}, `${count(n)} ${name}`));
  byId("counts").append(...said);
  byId("seeds").textContent = seeds;
  const none = conditions.length ? "one objective alone: nothing to compare" : "no cell has come to its end yet";
  const lines = claims.length ? claims : [none];
  byId("claims").append(...lines.map((line) => el("li", {}, line)));
  byId("first-claims").append(...lines.slice(0, MOST_CLAIMS).map((line) => el("li", {}, line)));
  byId("more-claims").hidden = lines.length <= MOST_CLAIMS;
}

/** The legend of all plots: a button per objective. */
function showObjectives({ objectives }, refresh) {
  byId("objectives").append(...objectives.map((name, i) => {
    const button = el("button", { type: "button", "aria-pressed": "true" }, swatch(i), name);
    button.addEventListener("click", () => {
      if (!off.delete(i)) off.add(i);
      button.setAttribute("aria-pressed", String(!off.has(i)));
      refresh();
    });
    return button;
  }));
}

/** A plot per regime, of those of some rows that are in it and switched on. */
function regimeFigures({ regimes }, rowsOf, { caption, height = null, text, make }) {
  return regimes.flatMap((name, regime) => {
    const rows = () => rowsOf().filter((row) => row.regime === regime);
    if (rows().length === 0) return [];
    const figure = plotFigure({ title: name || "all cells", caption, text: "", make: () => make(rows().filter(shown)) });
    const host = figure.querySelector(".plot");
    host.describe = () => host.setAttribute("aria-label", `${name || "All cells"}. ${rows().filter(shown).map(text).join(" ")}`);
    host.describe();
    if (height) host.style.height = `${height(rows().length)}px`;
    return [figure];
  });
}

/** Draws again what stands in some sections, and says anew what it shows. */
function refreshPlots(...ids) {
  for (const host of ids.flatMap((id) => [...byId(id).querySelectorAll(".plot")])) {
    host.describe?.();
    redraw(host);
  }
}

function said([mean, low, high]) {
  return `${brief(mean)}${low === null ? ", one seed" : ` (${brief(low)} to ${brief(high)})`}`;
}

function clipper([low, high]) {
  return (y) => Math.min(high, Math.max(low, y));
}

function showReward(data) {
  const { curves, objectives, range } = data;
  const thinned = curves.find(({ step, of }) => step.length < of);
  byId("reward-note").textContent = [
    "Mean over seeds, each objective at its best learning rate. The band is Student's 95 % interval, cut at what a reward",
    "can be; steps that a diverged run did not live to see count 0.",
    ...(thinned ? [`Of ${count(thinned.of)} steps every ${thinned.step[1] - thinned.step[0]}th is drawn.`] : []),
  ].join(" ");
  const make = (rows) => ({
    data: curveTraces(rows, "reward", objectives, { bands: byId("bands").checked, seeds: byId("every-seed").checked, clip: clipper(range) }),
    layout: curveLayout("reward", axisAround(range, false)),
  });
  const text = (c) => `${objectives[c.objective]}: mean training reward ${brief(c.reward.mean[0])} at step ${c.step[0]}, ${brief(c.reward.mean.at(-1))} at step ${c.step.at(-1)}.`;
  byId("panels").append(...regimeFigures(data, () => curves, { caption: "", text, make }));
  for (const id of ["bands", "every-seed"]) byId(id).addEventListener("change", () => refreshPlots("panels"));
}

function rowHeight(n) {
  return 70 + 30 * n;
}

function showEnds(data) {
  const { conditions, objectives, range, regimes } = data;
  const best = conditions.filter((c) => c.best);
  const several = new Set(conditions.map((c) => c.rate)).size > 1;
  const named = (c) => (several ? `${objectives[c.objective]}, ${rateText(c.rate)}` : objectives[c.objective]);
  const row = (c) => ({ objective: c.objective, name: named(c), interval: c.mean, dots: c.final });
  const make = (rows) => ({
    data: rowTraces(rows.map(row), clipper(range)),
    layout: rowLayout(rows.map(row), "end", axisAround(range, false).range),
  });
  const text = (c) => `${named(c)}: ${said(c.mean)}.`;
  byId("ends-plots").append(...regimeFigures(data, () => best, { caption: "", height: rowHeight, text, make }));
  byId("ends-tables").append(...regimes.flatMap((name, regime) => {
    const rows = conditions.filter((c) => c.regime === regime);
    return rows.length ? [sortableTable({ title: name || "All cells", columns: endColumns(data, rows), rows })] : [];
  }));
}

function endColumns({ objectives, threshold }, rows) {
  const chosen = rows.length > rows.filter((c) => c.best).length;
  const number = (name, value, show = (c) => fixed(value(c))) => ({ name, value, show, kind: "number" });
  const badge = (c) => (chosen && c.best ? [el("span", { class: "badge" }, "best rate")] : []);
  return [
    { name: "objective", value: (c) => objectives[c.objective], show: (c) => [swatch(c.objective), objectives[c.objective], ...badge(c)] },
    number("learning rate", (c) => c.rate, (c) => rateText(c.rate)),
    number("seeds", (c) => c.n, (c) => String(c.n)),
    number("end", (c) => c.mean[0]),
    number("95 % (t)", (c) => c.mean[1], (c) => bounds(c.mean)),
    number("iqm", (c) => c.iqm[0]),
    number("95 % (bootstrap)", (c) => c.iqm[1], (c) => bounds(c.iqm)),
    number("area", (c) => c.area[0]),
    number(`reached ${threshold}`, (c) => c.reached.n / c.n, (c) => c.reached.text),
    number("collapsed", (c) => c.collapse.share, (c) => c.collapse.text),
  ];
}

function fixed(value) {
  return value === null ? "\u2013" : value.toFixed(3).replace(/^-/, "\u2212");
}

function bounds([, low, high]) {
  return low === null ? "one seed" : `${fixed(low)} to ${fixed(high)}`;
}

function showDifferences(data) {
  const { differences, objectives } = data;
  const select = byId("reference");
  select.append(...objectives.map((name, i) => el("option", { value: i }, name)));
  const rows = () => differences.filter((d) => d.reference === Number(select.value));
  const reach = Math.max(0.01, ...differences.flatMap(({ difference }) => difference.filter((x) => x !== null).map(Math.abs)));
  const range = [-1.05, 1.05].map((side) => side * Math.min(reach, data.range[1] - data.range[0]));
  const row = (d) => ({ objective: d.objective, name: objectives[d.objective], interval: d.difference });
  const make = (found) => ({
    data: rowTraces(found.map(row), clipper(range)),
    layout: rowLayout(found.map(row), `end less that of ${plotText(objectives[select.value])}`, range, true),
  });
  const text = (d) => `${objectives[d.objective]} less ${objectives[d.reference]}: ${said(d.difference)}.`;
  const draw = () => {
    byId("differences-plots").replaceChildren(...regimeFigures(data, rows, { caption: "", height: rowHeight, text, make }));
    byId("differences-table").replaceChildren(differenceTable(data, rows(), objectives[select.value]));
  };
  select.addEventListener("change", draw);
  draw();
}

function differenceTable({ objectives, regimes }, rows, reference) {
  const number = (name, value, show = (d) => fixed(value(d))) => ({ name, value, show, kind: "number" });
  const columns = [
    ...(regimes.length > 1 ? [{ name: "regime", value: (d) => regimes[d.regime] }] : []),
    { name: "objective", value: (d) => objectives[d.objective], show: (d) => [swatch(d.objective), objectives[d.objective]] },
    number("difference", (d) => d.difference[0]),
    number("95 % (t)", (d) => d.difference[1], (d) => bounds(d.difference)),
    number("seeds of both", (d) => d.n, (d) => String(d.n)),
  ];
  return sortableTable({ title: `Ends less those of ${reference}`, columns, rows, long: rows.length > 16 });
}

function showSweep(data) {
  const { conditions, objectives, range, maps } = data;
  const rates = [...new Set(conditions.map((c) => c.rate))].sort((a, b) => a - b);
  if (rates.length < 2) {
    byId("sweep-note").textContent = `All cells have the learning rate ${rates.map(rateText)[0] ?? "\u2013"}: no objective was tuned, which may suit one better than another.`;
    return;
  }
  byId("sweep-note").textContent = "Where each ends at every learning rate that it was tried at, with Student's 95 % interval; the large marker is its best. An objective whose best lies at an end of its line may do better beyond it.";
  const grouped = (rows) => Map.groupBy(rows, (c) => c.objective).entries();
  const make = (rows) => {
    const byObjective = [...grouped(rows)].map(([objective, found]) => ({ objective, conditions: sorted(found, (c) => c.rate, 1) }));
    return { data: sweepTraces(byObjective, objectives, clipper(range)), layout: sweepLayout(rates, axisAround(range, false).range) };
  };
  const text = (c) => `${objectives[c.objective]} at ${rateText(c.rate)}: ${said(c.mean)}.`;
  byId("sweep-plots").append(...regimeFigures(data, () => conditions, { caption: "", text, make }));
  byId("maps").append(...maps.map((map) => mapFigure(map, objectives, range)));
}

function mapFigure(map, objectives, range) {
  const cells = map.updates.flatMap((u, y) => map.rates.map((r, x) => `${u} updates, learning rate ${rateText(r)}: ${map.text[y][x] || "none"}.`));
  const title = [objectives[map.objective], map.where].filter(Boolean).join(", ");
  const figure = plotFigure({
    title, caption: "Mean end; below it how many seeds collapsed or diverged.", text: `${title}. ${cells.join(" ")}`,
    make: () => ({ data: mapTraces(map, range), layout: mapLayout() }),
  });
  figure.querySelector(".plot").describe = () => { figure.hidden = !shown(map); };
  return figure;
}

function showMetrics(data) {
  const { metrics, curves, objectives } = data;
  const select = byId("metric");
  const has = ({ name }) => curves.some((c) => c[name].mean.some((y) => y !== null));
  select.append(...metrics.filter(has).map(({ name, title }) => el("option", { value: name }, title)));
  const metric = () => metrics.find(({ name }) => name === select.value);
  const make = (rows) => {
    const { name, unit, log } = metric();
    const values = curves.flatMap((c) => [...c[name].low, ...c[name].high]);
    return { data: curveTraces(rows, name, objectives), layout: curveLayout(unit, axisAround(values, log)) };
  };
  const text = (c) => `${objectives[c.objective]}: ${metric().title} ${brief(c[select.value].mean[0])} at step ${c.step[0]}, ${brief(c[select.value].mean.at(-1))} at step ${c.step.at(-1)}.`;
  const describe = () => { byId("metric-caption").textContent = metric()?.caption ?? "No step has a metric."; };
  describe();
  if (metric()) byId("metrics-plots").append(...regimeFigures(data, () => curves, { caption: "", text, make }));
  select.addEventListener("change", () => { describe(); refreshPlots("metrics-plots"); });
}

function showCells({ cells, fields, shared, pages }) {
  const varied = fields.map((name, i) => ({ name: name.replaceAll("_", " "), value: ({ values }) => values[i] }));
  byId("cells-note").textContent = `${count(cells.length)} runs, and what they differ by. A cell's own report shows every token; where it is not written yet, the command writes it, given in the comparison's folder.`;
  const columns = [
    { name: "cell", value: ({ name }) => name },
    { name: "status", value: ({ status }) => status },
    { name: "steps", value: ({ steps }) => steps, kind: "number" },
    ...varied,
    { name: "report", value: ({ name }) => (pages[name].link ? 0 : 1), show: ({ name }) => pageOf(pages[name]) },
    ...(cells.some(({ reason }) => reason) ? [{ name: "reason", value: ({ reason }) => reason, kind: "text" }] : []),
  ];
  byId("cells-table").append(sortableTable({ title: "", columns, rows: cells, long: cells.length > 16 }));
  byId("shared").append(el("tbody", {}, shared.map((pair) => el("tr", {}, el("th", { scope: "row" }, pair[0]), el("td", {}, pair[1])))));
}

function pageOf({ link, command }) {
  if (link) return el("a", { href: link }, "open");
  return command ? el("code", {}, command) : "\u2013";
}

async function main() {
  const data = await payloadJSON("comparison");
  palette = await payloadJSON("palette");
  showMasthead(data);
  showObjectives(data, () => refreshPlots("panels", "ends-plots", "differences-plots", "sweep-plots", "maps", "metrics-plots"));
  showReward(data);
  showEnds(data);
  showDifferences(data);
  showSweep(data);
  showMetrics(data);
  showCells(data);
  await painted();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

await main();
