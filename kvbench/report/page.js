"use strict";
// What the reader chooses, and what follows from it: which rows of the table show, and what the charts draw.

const DATA = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const kernels = DATA.rows.filter((row) => !row.baseline);
const state = { text: "", place: null, shape: null, tokens: null, error: null, group: null, baselines: false, hidden: new Set() };

const placeOf = (row) => `${row.machine}, ${row.backend}`;
const methods = [...new Set(DATA.rows.filter((row) => !row.baseline || row.storage).map((row) => row.method))];
const styles = new Map(methods.map((method, i) => [method, {
  colour: `var(--c${i % 8})`, shape: SHAPES[Math.floor(i / 8) % SHAPES.length] }]));
const styleOf = (method) => styles.get(method) || { colour: "var(--soft)", shape: "circle" };
const textOf = (row) => [row.method, row.of, row.shape, row.tokens ? number.tokens(row.tokens) : "", row.tokens, row.backend,
  row.machine, row.best, ...row.remarks].join(" ").toLowerCase();
DATA.rows.forEach((row) => { row.text = textOf(row); });

const words = () => state.text.toLowerCase().split(/\s+/).filter(Boolean);
const here = (row) => (!state.place || placeOf(row) === state.place) && words().every((word) => row.text.includes(word))
  && !state.hidden.has(row.baseline && !row.storage ? row.of : row.method);

// ---- controls

function options(select, values, chosen, all) {
  select.replaceChildren(...(all ? [new Option(all, "")] : []), ...values.map((value) => new Option(value, value)));
  select.value = chosen ?? "";
  select.closest("label").hidden = values.length < 2;
}

function mostFrequent(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].toSorted((a, b) => b[1] - a[1])[0]?.[0] ?? null;
}

const shapesHere = () => [...new Set(kernels.filter((row) => row.speedup && placeOf(row) === state.place)
  .map((row) => row.shape))];

function setUp() {
  for (const part of document.querySelectorAll("[data-needs-rows]")) part.hidden = !kernels.length;
  const places = [...new Set(kernels.map(placeOf))];
  state.place = mostFrequent(kernels.filter((row) => row.cold_us).map(placeOf)) ?? places[0] ?? null;
  state.shape = mostFrequent(kernels.filter((row) => row.speedup && placeOf(row) === state.place).map((row) => row.shape));
  options(element("place"), places, state.place);
  options(element("shape"), shapesHere(), state.shape);
  element("place").addEventListener("change", (event) => {
    state.place = event.target.value;
    if (!shapesHere().includes(state.shape)) state.shape = shapesHere()[0] ?? null;
    options(element("shape"), shapesHere(), state.shape);
    show();
  });
  element("shape").addEventListener("change", (event) => { state.shape = event.target.value; show(); });
  element("filter").addEventListener("input", (event) => { state.text = event.target.value; show(); });
  element("baselines").addEventListener("change", (event) => { state.baselines = event.target.checked; show(); });
  element("legend").replaceChildren(...methods.map((method) => {
    const button = document.createElement("button"), { colour, shape } = styleOf(method);
    button.append(svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, marker(shape, 6, 6, 4.5, { fill: colour })), method);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!state.hidden.delete(method)) state.hidden.add(method);
      button.setAttribute("aria-pressed", String(!state.hidden.has(method)));
      show();
    });
    return button;
  }));
}

function pick(id, values, current, format, choose) {
  element(id).replaceChildren(...(values.length < 2 ? [] : values.map((value) => {
    const button = document.createElement("button");
    button.textContent = format(value);
    button.setAttribute("aria-pressed", String(value === current));
    button.addEventListener("click", () => { choose(value); show(); });
    return button;
  })));
}

// ---- charts

function draw(id, picture, reason) {
  const holder = element(id);
  const drawn = picture(Math.max(holder.clientWidth, 260));
  if (drawn) return holder.replaceChildren(drawn);
  const empty = document.createElement("div");
  empty.className = "empty";
  empty.textContent = reason;
  holder.replaceChildren(empty);
}

function drawAll() {
  const rows = DATA.rows.filter((row) => (!row.baseline || row.storage) && row.cold_us && here(row));
  const compared = rows.filter((row) => row.speedup && row.tokens && row.shape === state.shape);
  draw("speedup", (width) => compared.length ? drawSpeedup(width, compared, styleOf) : null,
    "No method here was timed next to exact attention of the same shape.");

  const measured = rows.filter((row) => row.gbps && row.percent);
  const run = DATA.runs[measured[0]?.run];
  draw("roofline", (width) => run ? drawRoofline(width, measured, run, styleOf) : null, "Nothing timed is shown.");

  const tokens = [...new Set(compared.map((row) => row.tokens))].sort((a, b) => a - b);
  if (!tokens.includes(state.tokens)) state.tokens = tokens.at(-1) ?? null;
  pick("pick-tokens", tokens, state.tokens, (value) => `${number.tokens(value)} tokens`, (value) => { state.tokens = value; });
  draw("breakdown", (width) => {
    const chosen = [...groups(compared.filter((row) => row.tokens === state.tokens && row.bytes), (row) => row.method).values()]
      .map((own) => own.toSorted((a, b) => a.cold_us - b.cold_us)[0]);
    const best = DATA.rows.filter((row) => row.baseline && row.cold_us && row.shape === state.shape && placeOf(row) === state.place
      && row.tokens === state.tokens && !row.storage && compared.some((other) => other.best === row.method))
      .toSorted((a, b) => a.cold_us - b.cold_us)[0];
    const bars = chosen.map(timeParts).concat(best ? [{ label: `${best.method} (best exact)`, total: best.cold_us, parts:
      [{ value: best.cold_us, colour: "var(--line)" }], tip: `${best.method}: ${number.us(best.cold_us)}` }] : []);
    return chosen.length ? drawBars(width, bars.toSorted((a, b) => a.total - b.total), number.us) : null;
  }, "No method of this shape is shown.");

  const sets = [...new Set(DATA.points.filter((point) => Object.values(point.errors).some((error) => error > 0))
    .map((point) => point.group))];
  if (!sets.includes(state.group)) state.group = sets[0] ?? null;
  pick("pick-group", sets, state.group, (group) => group, (group) => { state.group = group; });
  const points = DATA.points.filter((point) => point.group === state.group);
  const errors = Object.keys(DATA.errors).filter((error) => points.some((point) => point.errors[error] > 0));
  if (!errors.includes(state.error)) state.error = errors.includes("logit_error") ? "logit_error" : errors[0];
  pick("pick-error", errors, state.error, (error) => DATA.errors[error], (error) => { state.error = error; });
  draw("pareto", (width) => errors.length ? drawPareto(width, points, state.error, DATA.errors[state.error]) : null,
    "Errors come from kvbench demo --json or kvbench eval --json: give such a file to kvbench report, too.");
  const steps = DATA.points.filter((point) => point.parts.attend);
  element("steps").closest("figure").hidden = !steps.length;
  draw("steps", (width) => steps.length ? drawBars(width, steps.map((point) => ({ label: point.preset,
    total: point.parts.append + point.parts.attend, parts: [{ value: point.parts.append, colour: "var(--rest)" },
      { value: point.parts.attend, colour: "var(--move)" }],
    tip: `${point.preset}\nappend ${number.us(point.parts.append)}, attend ${number.us(point.parts.attend)}` }))
    .toSorted((a, b) => a.total - b.total), number.us) : null, "");
}

// A call lasts at least as long as an empty kernel, and as its bytes take at the measured rate: the longer of both is the
// roofline, and what it does not explain is the rest.
function timeParts(row) {
  const moving = Math.min(row.attainable_us, row.cold_us), floor = Math.min(row.floor_us, moving);
  const parts = [{ value: floor, colour: "var(--floor)" }, { value: moving - floor, colour: "var(--move)" },
    { value: row.cold_us - moving, colour: "var(--rest)" }];
  return { label: row.method, total: row.cold_us, parts, tip: `${row.method}\n${number.us(row.cold_us)}: launch `
    + `${number.us(floor)}, further moving bytes ${number.us(moving - floor)}, the rest ${number.us(row.cold_us - moving)}` };
}

// ---- tables

function filterTable() {
  let shown = 0, of = 0;
  for (const line of document.querySelectorAll("#cases tbody tr")) {
    const row = DATA.rows[line.dataset.row];
    const possible = !row.baseline || state.baselines;
    line.hidden = !(possible && here(row));
    shown += !line.hidden;
    of += possible;
  }
  element("count").textContent = `${shown} of ${of} rows`;
}

function sortBy(table, column, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  const value = (line) => line.cells[column].dataset.value ?? line.cells[column].textContent;
  const numeric = header.classList.contains("n"), body = table.tBodies[0];
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");          // what was not measured stays below
    return (numeric ? x - y : x.localeCompare(y)) * (descending ? -1 : 1);
  };
  body.append(...[...body.rows].toSorted(compare));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) =>
    header.querySelector("button")?.addEventListener("click", () => sortBy(table, column, header)));
}

// ---- theme and tips

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  element("theme").textContent = `theme: ${theme}`;
  try { localStorage.setItem("kvbench-theme", theme); } catch { /* a page from a file may have no storage */ }
}
let stored = null;
try { stored = localStorage.getItem("kvbench-theme"); } catch { /* likewise */ }
setTheme(THEMES.includes(stored) ? stored : "auto");
element("theme").addEventListener("click", () =>
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % THEMES.length]));

function tip(target) {
  const box = element("tip"), marked = target?.closest?.("[data-tip]");
  box.classList.toggle("on", Boolean(marked));
  if (!marked) return;
  box.textContent = marked.dataset.tip;
  const { left, right, top, bottom } = marked.getBoundingClientRect();
  const x = Math.min(Math.max((left + right) / 2 - box.offsetWidth / 2, 6), innerWidth - box.offsetWidth - 6);
  box.style.transform = `translate(${x}px, ${top - box.offsetHeight - 8 > 0 ? top - box.offsetHeight - 8 : bottom + 8}px)`;
}
for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, (event) => tip(event.target));

function show() {
  filterTable();
  drawAll();
}
setUp();
show();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
