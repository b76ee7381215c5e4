// Tables whose heads sort them, by mouse and by keyboard: each head is a button.

/**
 * A table in a card. Columns are { name, value: row -> number, text or null, show: row -> text or element, kind }: kind
 * is "number" or "text"; without `show` the value is shown.
 */
function sortableTable({ title, columns, rows, long = false }) {
  const body = el("tbody");
  const heads = columns.map(({ name, kind }) => el("th", { scope: "col", class: kind ?? null }, sortButton(name)));
  const draw = (listed) => body.replaceChildren(...listed.map((row) => el("tr", {}, columns.map((c) => tableCell(c, row)))));
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    draw(sorted(rows, columns[i].value, order === "ascending" ? 1 : -1));
  }));
  draw(rows);
  const table = el("table", { "aria-label": title }, el("thead", {}, el("tr", {}, heads)), body);
  const scroll = el("div", { class: long ? "scroll long" : "scroll", tabindex: long ? "0" : null }, table);
  return el("div", { class: "card" }, title ? el("h3", {}, title) : null, scroll);
}

function sortButton(name) {
  return el("button", { type: "button", class: "sort" }, name);
}

function tableCell({ value, show, kind }, row) {
  return el("td", { class: kind ?? null }, (show ?? ((r) => value(r) ?? "\u2013"))(row));
}

/** What has no value stands last in either order; equals stay in theirs. */
function sorted(rows, value, sign) {
  const collator = new Intl.Collator("en", { numeric: true });
  const compared = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * compared(x, y);
  });
}
