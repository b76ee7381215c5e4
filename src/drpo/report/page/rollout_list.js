// The list of completions: which are shown, in which order, and their rows.

const ROWS = 60;
const SNIPPET = 160;

/** Makes an element: attributes by name, those that are null left out, then text, always as text, and elements. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** Three significant digits, without the zeros behind them; a dash for what there is not. */
function brief(value) {
  return value === null ? "\u2013" : String(Number(value.toPrecision(3))).replace(/^-/, "\u2212");
}

function count(n) {
  return n.toLocaleString("en-US");
}

/** A number with its noun. */
function counted(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

/** What the controls ask for; a bound that is not given is null. */
function wanted() {
  const bound = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const range = (name) => [bound(`${name}-low`), bound(`${name}-high`)];
  const [finish_reason, kind, sort] = ["finish_reason", "kind", "sort"].map((id) => byId(id).value);
  const text = byId("search").value.trim().toLowerCase();
  return { text, reward: range("reward"), step: range("step"), finish_reason, kind, sort, sign: byId("falling").checked ? -1 : 1 };
}

function within(value, [low, high]) {
  if (low === null && high === null) return true;
  return value !== null && (low === null || value >= low) && (high === null || value <= high);
}

function matches(rollouts, i, { text, reward, step, finish_reason, kind }) {
  const { table } = rollouts;
  const weights = rollouts.weights[i];
  const kinds = { "": true, trained: weights, out_of_region: weights?.out_of_region, masked: weights?.least <= 0 };
  return within(table.reward[i], reward) && within(table.step[i], step)
    && (finish_reason === "" || table.finish_reason[i] === finish_reason) && kinds[kind]
    && (text === "" || `${rollouts.question(i).prompt}\n${rollouts.text(i)}`.toLowerCase().includes(text));
}

/** What a completion is sorted by; those without it come last either way. */
function sortKey(rollouts, i, sort) {
  if (sort === "length") return rollouts.columns.length[i];
  return sort === "extreme" ? rollouts.weights[i]?.extreme ?? null : rollouts.table[sort][i];
}

function chosenAndOrdered(rollouts, want) {
  const keyed = [];
  for (let i = 0; i < rollouts.n; i++) if (matches(rollouts, i, want)) keyed.push([sortKey(rollouts, i, want.sort), i]);
  keyed.sort(([a, i], [b, k]) => (a === null) - (b === null) || want.sign * (a - b) || i - k);
  return keyed.map(([, i]) => i);
}

class RolloutList {
  /** `onChoose(i)` is called with the completion to show, or null where the list is empty. */
  constructor(rollouts, onChoose) {
    Object.assign(this, { rollouts, onChoose, shown: [], at: 0, host: byId("list") });
    this.host.addEventListener("scroll", () => {
      const { scrollTop, clientHeight, scrollHeight } = this.host;
      if (scrollTop + 2 * clientHeight > scrollHeight) this.show(this.host.children.length + ROWS);
    });
    this.host.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.choose(Number(row.dataset.place));
    });
  }

  /** Applies the controls and chooses the first that is left. */
  refresh() {
    const { n, table } = this.rollouts;
    this.shown = chosenAndOrdered(this.rollouts, wanted());
    this.host.replaceChildren(...(this.shown.length ? [] : [el("p", { class: "empty" }, "No completion matches.")]));
    this.host.scrollTop = 0;
    const share = table.n_all > n ? `; the run has ${count(table.n_all)}, and this file a share of its groups` : "";
    byId("tally").textContent = `${count(this.shown.length)} of ${count(n)} completions${share}`;
    this.choose(0);
  }

  choose(place) {
    if (this.shown.length === 0) return this.onChoose(null);
    this.host.children[this.at]?.setAttribute("aria-selected", "false");
    this.at = Math.min(Math.max(0, place), this.shown.length - 1);
    this.show(this.at + ROWS);
    const row = this.host.children[this.at];
    row.setAttribute("aria-selected", "true");
    this.host.setAttribute("aria-activedescendant", row.id);
    const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
    if (top < this.host.scrollTop) this.host.scrollTop = top;
    if (bottom > this.host.scrollTop + this.host.clientHeight) this.host.scrollTop = bottom - this.host.clientHeight;
    return this.onChoose(this.shown[this.at]);
  }

  /** Makes the rows up to the n-th, those that are not there yet. */
  show(n) {
    const last = Math.min(n, this.shown.length);
    for (let place = this.host.children.length; place < last; place++) this.host.append(this.row(place));
  }

  row(place) {
    const i = this.shown[place];
    const role = { role: "option", "aria-selected": "false", "aria-posinset": place + 1, "aria-setsize": this.shown.length };
    const snippet = visible(this.rollouts.text(i).slice(0, SNIPPET)).replace(/\s+/g, " ").trim() || "(nothing)";
    return el(
      "div",
      { class: "row", id: `row-${place}`, "data-place": place, "data-rollout": i, ...role },
      el("div", { class: "snippet" }, snippet),
      el("div", { class: "about" }, this.about(i).map((text) => el("span", {}, text))),
    );
  }

  about(i) {
    const { table, columns, weights } = this.rollouts;
    const said = [rewardText(table.reward[i]), `step ${table.step[i]}`];
    said.push(`${columns.length[i]} tokens${table.finish_reason[i] === "length" ? ", cut" : ""}`);
    if (table.conversation[i]) said.push(counted(table.conversation[i].turns.length, "turn"));
    if (weights[i]) said.push(`w ${brief(weights[i].least)} to ${brief(weights[i].greatest)}`);
    if (weights[i]?.out_of_region) said.push(`${weights[i].out_of_region} out of region`);
    return said;
  }
}

function rewardText(reward) {
  return reward === null ? "no reward" : `reward ${brief(reward)}`;
}
