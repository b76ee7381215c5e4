// The report of one run: puts its parts together.

function showHeader(run) {
  byId("title").textContent = document.title;
  showCaution(run.caution && `Mind: ${run.caution}.`);
  showFacts(run.facts);
  byId("accuracy").append(el("h2", {}, "Held-out accuracy"), ...accuracyParts(run.accuracy));
}

function accuracyParts(evaluations) {
  if (evaluations.length === 0) return [note("The run was not evaluated.")];
  const figures = evaluations.map(meanScore);
  const others = figures.slice(1).flatMap((text) => [el("span", { class: "to" }, " \u2192 "), text]);
  return [el("p", { class: "figures" }, figures[0], others), ...evaluations.map(intervalBar)];
}

/** Scores that leave [0, 1] have no interval, and their mean is no share. */
function meanScore({ accuracy, low }) {
  return low === null ? String(Number(accuracy.toPrecision(4))) : percent(accuracy);
}

/** The paired difference from step 0, where it is known: points of scores in [0, 1]. */
function pairedChange({ low, difference, difference_low, difference_high }) {
  if (typeof difference !== "number") return "";
  const points = low !== null;
  const signed = (x) => (x < 0 ? "" : "+") + (points ? (100 * x).toFixed(1) : String(Number(x.toPrecision(4))));
  const known = typeof difference_low === "number" && typeof difference_high === "number";
  const range = known ? ` (paired, 95 % interval ${signed(difference_low)} to ${signed(difference_high)})` : "";
  return `; ${signed(difference)}${points ? " points" : ""} from step 0${range}`;
}

/** Accuracy on a scale from 0 to 1, with its interval. */
function intervalBar({ step, accuracy, low, high, n_problems, n_samples, ...paired }) {
  const known = low !== null;
  const when = step === 0 ? "before training" : `after step ${step}`;
  const range = known ? `, 95 % interval ${percent(low)} to ${percent(high)}` : "";
  const track = el("div", { class: "track", "aria-hidden": "true" });
  const part = (name, style) => Object.assign(track.appendChild(el("div", { class: name })).style, style);
  if (known) part("range", { left: `${100 * low}%`, width: `${100 * (high - low)}%` });
  part("mean", { left: `${100 * Math.min(1, Math.max(0, accuracy))}%` });
  const mean = meanScore({ accuracy, low });
  const change = pairedChange({ low, ...paired });
  const text = `${when}: ${mean}${range} (${count(n_problems)} problems, avg@${n_samples})${change}`;
  return el("div", { class: "interval" }, text, known ? track : "");
}

/** Rows of the table are [field, value, the recipe's value or null, the default]. */
function showConfiguration({ configuration: { recipe, rows } }) {
  const base = recipe ? `the recipe ${recipe}` : "the defaults";
  byId("configuration-note").textContent = `Every field of the run. \u2260 marks what differs from ${base}.`;
  const differs = ([, value, ofRecipe, byDefault]) => value !== (recipe ? ofRecipe : byDefault);
  const cells = (row) => row.filter((text) => text !== null).map((text) => el("td", {}, text));
  const columns = ["field", "this run", ...(recipe ? [`recipe ${recipe}`] : []), "default"];
  const body = el("tbody");
  const draw = () => {
    const listed = byId("differing").checked ? rows.filter(differs) : rows;
    const none = el("tr", {}, el("td", { colspan: columns.length }, `Nothing differs from ${base}.`));
    const drawn = listed.map((row) => el("tr", { class: differs(row) ? "differs" : null }, cells(row)));
    body.replaceChildren(...(drawn.length ? drawn : [none]));
  };
  byId("differing").addEventListener("change", draw);
  const head = el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)));
  byId("configuration-table").append(el("thead", {}, head), body);
  draw();
}

/** Plots of tokens, or why there are none. */
function showTokenPlots(run) {
  const old = "This run does not say what its updates saw: an older version wrote it. Train again to see this.";
  const missing = run.recorded ? "No token was trained on." : old;
  if (run.histogram === null) {
    byId("scatter").replaceChildren(note(missing));
    byId("histogram").replaceChildren(note(missing));
    return;
  }
  showScatter(run);
  showHistogram(run);
}

function showRollouts(rollouts) {
  const view = new RolloutView(rollouts);
  const list = new RolloutList(rollouts, (i) => view.show(i));
  const refresh = () => list.refresh();
  if (rollouts.columns.weight.length) showLegend(rollouts);
  else byId("legend").replaceChildren("No token has a gradient weight to be shaded by.");
  for (const id of FILTERS) byId(id).addEventListener("input", refresh);
  byId("direction").addEventListener("click", () => {
    const falling = byId("direction").getAttribute("aria-pressed") !== "true";
    setDirection(falling);
    refresh();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => { setDirection(true); setTimeout(refresh); });
  document.addEventListener("keydown", (event) => onKey(event, list, view));
  refresh();
}

function setDirection(falling) {
  byId("direction").setAttribute("aria-pressed", String(falling));
  byId("direction").textContent = falling ? "descending" : "ascending";
}

function onKey(event, list, view) {
  const typing = event.target.closest("input, select, textarea") !== null;
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const act = keyAction(event, list, view);
  if (act) {
    event.preventDefault();
    act();
  }
}

/** What a key does, or undefined; arrows move in the browser only where it has the focus. */
function keyAction(event, list, view) {
  const go = (move) => () => {
    move();
    if (!inSight(byId("list"))) byId("rollouts").scrollIntoView();
  };
  const anywhere = {
    j: go(() => list.move(1)), k: go(() => list.move(-1)),
    "/": () => byId("search").focus(), "?": () => byId("keys").showModal(),
  };
  const inBrowser = {
    ArrowDown: go(() => list.move(1)), ArrowUp: go(() => list.move(-1)),
    ArrowRight: () => view.moveToken(1), ArrowLeft: () => view.moveToken(-1),
    Home: () => list.choose(0), End: () => list.choose(list.shown.length - 1),
  };
  return anywhere[event.key] ?? (event.target.closest(".browser") ? inBrowser[event.key] : undefined);
}

function inSight(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < innerHeight;
}

async function main() {
  const [run, table, columns] = await Promise.all([payloadJSON("run"), payloadJSON("rollouts"), payloadColumns("tokens")]);
  showHeader(run);
  showConfiguration(run);
  showRollouts(new Rollouts(table, columns));
  await painted();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
  byId("panels").append(...run.panels.map(panelFigure));
  showTokenPlots(run);
  showTimeline(run);
}

await main();
