"use strict";
(() => {
  // The figures: charts are laid out side by side where there is room.
  const narrow = window.innerWidth < 900;
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const actions = { export: true, source: false, compiled: false, editor: false };
  for (const [name, spec] of Object.entries(specs)) {
    if (narrow) spec.columns = 1;
    vegaEmbed(`#figure-${name}`, spec, { renderer: "svg", actions }).catch((error) => console.error(name, error));
  }

  // The joined table. Its state lives in the address, so that a view can be linked to.
  const table = document.getElementById("joined");
  const form = document.getElementById("filters");
  const count = document.getElementById("count");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.querySelectorAll("th[data-column]"));
  let sorted = { column: "", direction: "ascending" };

  const value = (row, index) => {
    const cell = row.cells[index];
    if (cell.classList.contains("missing")) return null;
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));

  function sort(column, direction) {
    const index = heads.findIndex((head) => head.dataset.column === column);
    if (index < 0) return;
    sorted = { column, direction };
    const sign = direction === "descending" ? -1 : 1;
    const keyed = rows.map((row, place) => ({ row, place, key: value(row, index) }));
    // Missing values stay last in both directions, equal ones keep the order of params.yaml.
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
      return sign * compare(a.key, b.key) || a.place - b.place;
    });
    body.append(...keyed.map((entry) => entry.row));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[index].setAttribute("aria-sort", direction);
  }

  function filter() {
    const needle = form.text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = ["family", "task", "budget"].every((name) => !form[name].value || row.dataset[name] === form[name].value);
      row.hidden = !(fits && (!needle || row.textContent.toLowerCase().includes(needle)));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }

  function widen() {
    table.classList.toggle("core", !form.all.checked);
    for (const head of table.querySelectorAll("th[data-core]")) {
      const columns = Number(form.all.checked ? head.dataset.all : head.dataset.core);
      head.hidden = columns === 0;
      head.colSpan = Math.max(columns, 1);
    }
  }

  function remember() {
    const state = new URLSearchParams();
    for (const name of ["family", "task", "budget", "text"]) if (form[name].value) state.set(name, form[name].value);
    if (form.all.checked) state.set("all", "1");
    if (sorted.column) {
      state.set("sort", sorted.column);
      state.set("direction", sorted.direction);
    }
    history.replaceState(null, "", `#${state}`);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of ["family", "task", "budget", "text"]) if (state.has(name)) form[name].value = state.get(name);
    form.all.checked = state.get("all") === "1";
    if (state.has("sort")) sort(state.get("sort"), state.get("direction") === "descending" ? "descending" : "ascending");
  }

  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const again = sorted.column === head.dataset.column && sorted.direction === "ascending";
      sort(head.dataset.column, again ? "descending" : "ascending");
      remember();
    });
  }
  form.addEventListener("input", () => {
    filter();
    widen();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    // The fields are emptied only after this event.
    setTimeout(() => {
      filter();
      widen();
      remember();
    });
  });
  recall();
  filter();
  widen();
})();
