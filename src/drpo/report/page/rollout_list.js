// The list of completions: which are shown, in which order, and the rows that are in sight.

const ROW_HEIGHT = 60;
const SPARE_ROWS = 8;
const SNIPPET = 160;
const FILTERS = ["search", "reward-low", "reward-high", "step-low", "step-high", "finish", "kind", "sort"];

/** What the controls ask for; a number that is not given is null. */
function wanted() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  return {
    text: byId("search").value.trim().toLowerCase(),
    reward: [number("reward-low"), number("reward-high")],
    step: [number("step-low"), number("step-high")],
    finish: byId("finish").value,
    kind: byId("kind").value,
    sort: byId("sort").value,
    falling: byId("direction").getAttribute("aria-pressed") === "true",
  };
}

function within(value, [low, high]) {
  if (low === null && high === null) return true;
  return value !== null && (low === null || value >= low) && (high === null || value <= high);
}

function matches(rollouts, i, want) {
  const { reward, step, finish } = rollouts.table;
  return within(reward[i], want.reward) && within(step[i], want.step)
    && (want.finish === "" || finish[i] === want.finish)
    && isOfKind(rollouts, i, want.kind)
    && (want.text === "" || rollouts.searched(i).includes(want.text));
}

function isOfKind(rollouts, i, kind) {
  if (kind === "trained") return rollouts.isTrained(i);
  if (kind === "outside") return rollouts.weights.outside[i] > 0;
  if (kind === "held") return rollouts.weights.least[i] <= 0;
  return true;
}

/** What a completion is sorted by; those without it come last either way. */
function sortKey(rollouts, sort) {
  if (sort === "length") return (i) => rollouts.length(i);
  if (sort === "extreme") return (i) => (rollouts.isTrained(i) ? rollouts.weights.extreme[i] : null);
  return (i) => rollouts.table[sort][i];
}

function ordered(rollouts, chosen, { sort, falling }) {
  const key = sortKey(rollouts, sort);
  const keyed = chosen.map((i) => [key(i), i]);
  const way = falling ? -1 : 1;
  keyed.sort(([a, i], [b, k]) => (a === null) - (b === null) || way * (a - b) || i - k);
  return keyed.map(([, i]) => i);
}

class RolloutList {
  /** `onChoose(i)` is called with the completion to show, or null where the list is empty. */
  constructor(rollouts, onChoose) {
    Object.assign(this, { rollouts, onChoose, shown: [], at: 0 });
    this.host = byId("list");
    this.spacer = el("div", { class: "spacer", role: "presentation" });
    this.host.append(this.spacer);
    this.host.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.host);
    this.spacer.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.choose(Number(row.dataset.place));
    });
  }

  /** Applies the controls and chooses the first that is left. */
  refresh() {
    const want = wanted();
    const all = Array.from({ length: this.rollouts.n }, (_, i) => i);
    this.shown = ordered(this.rollouts, all.filter((i) => matches(this.rollouts, i, want)), want);
    this.spacer.style.height = `${this.shown.length * ROW_HEIGHT}px`;
    byId("tally").textContent = this.tally();
    this.choose(0);
  }

  tally() {
    const { n, table } = this.rollouts;
    const left = table.n_all > n ? `; the run has ${count(table.n_all)}, and this file a share of its groups` : "";
    return `${count(this.shown.length)} of ${count(n)} completions${left}`;
  }

  choose(place) {
    this.at = Math.min(Math.max(0, place), Math.max(0, this.shown.length - 1));
    this.reveal();
    this.draw();
    this.onChoose(this.shown.length ? this.shown[this.at] : null);
  }

  move(by) {
    this.choose(this.at + by);
  }

  reveal() {
    const top = this.at * ROW_HEIGHT;
    const { scrollTop, clientHeight } = this.host;
    if (top < scrollTop) this.host.scrollTop = top;
    else if (top + ROW_HEIGHT > scrollTop + clientHeight) this.host.scrollTop = top + ROW_HEIGHT - clientHeight;
  }

  /** Makes the rows in sight, and a few more. */
  draw() {
    const first = Math.max(0, Math.floor(this.host.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const end = this.host.scrollTop + this.host.clientHeight;
    const last = Math.min(this.shown.length, Math.ceil(end / ROW_HEIGHT) + SPARE_ROWS);
    const rows = [];
    for (let place = first; place < last; place++) rows.push(this.row(place));
    this.spacer.replaceChildren(...(this.shown.length ? rows : [el("p", { class: "empty" }, "No completion matches.")]));
    this.host.setAttribute("aria-activedescendant", this.shown.length ? `row-${this.at}` : "");
  }

  row(place) {
    const i = this.shown[place];
    const chosen = String(place === this.at);
    const role = { role: "option", "aria-selected": chosen, "aria-posinset": place + 1, "aria-setsize": this.shown.length };
    const row = el(
      "div",
      { class: "row", id: `row-${place}`, "data-place": place, "data-rollout": i, ...role },
      el("div", { class: "snippet" }, oneLine(this.rollouts.text(i).slice(0, SNIPPET)) || "(nothing)"),
      el("div", { class: "about" }, this.about(i)),
    );
    row.style.top = `${place * ROW_HEIGHT}px`;
    return row;
  }

  about(i) {
    const { reward, step, finish } = this.rollouts.table;
    const { least, greatest, outside } = this.rollouts.weights;
    const said = [
      el("span", { class: reward[i] >= 1 ? "reward full" : "reward" }, rewardText(reward[i])),
      el("span", {}, `step ${step[i]}`),
      el("span", {}, `${this.rollouts.length(i)} tokens${finish[i] === "length" ? ", cut" : ""}`),
    ];
    if (this.rollouts.isTrained(i)) said.push(el("span", {}, `w ${brief(least[i])} to ${brief(greatest[i])}`));
    if (outside[i]) said.push(el("span", {}, `${outside[i]} outside`));
    return said;
  }
}

function rewardText(reward) {
  return reward === null ? "no reward" : `reward ${brief(reward)}`;
}

function oneLine(text) {
  return visible(text).replace(/\s+/g, " ").trim();
}
