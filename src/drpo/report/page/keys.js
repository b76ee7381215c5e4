// Puts the browser of completions together, and says what each key does.

function onKey(event, list, view) {
  const typing = event.target.closest("input, select, textarea") !== null;
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
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
    const { top, bottom } = list.host.getBoundingClientRect();
    if (bottom <= 0 || top >= innerHeight) byId("rollouts").scrollIntoView();
  };
  const anywhere = {
    j: go(() => list.choose(list.at + 1)), k: go(() => list.choose(list.at - 1)),
    "/": () => byId("search").focus(),
  };
  const inBrowser = {
    ArrowDown: anywhere.j, ArrowUp: anywhere.k,
    ArrowRight: () => view.moveToken(1), ArrowLeft: () => view.moveToken(-1),
    Home: () => list.choose(0), End: () => list.choose(list.shown.length - 1),
  };
  return anywhere[event.key] ?? (event.target.closest(".browser") ? inBrowser[event.key] : undefined);
}

async function showRollouts() {
  const columns = {};
  for (const name of COLUMNS) if (byId(`payload-${name}`)) columns[name] = await readColumn(name);
  const rollouts = new Rollouts(JSON.parse(await payloadText("rollouts")), columns);
  const view = new RolloutView(rollouts);
  const list = new RolloutList(rollouts, (i) => view.show(i));
  const form = byId("filters");
  if (columns.weight.length) showLegend(rollouts);
  form.addEventListener("input", () => list.refresh());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => list.refresh()));
  document.addEventListener("keydown", (event) => onKey(event, list, view));
  list.refresh();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

await showRollouts();
