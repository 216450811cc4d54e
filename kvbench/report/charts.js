"use strict";
// Small SVG charts.  Each is drawn for the width that it has, so that text keeps its size on a phone, and is drawn again
// when that changes.  Colours are CSS variables: one drawing serves light and dark.

const SHAPES = ["circle", "square", "triangle", "diamond"];

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function linear([from, to], [start, end]) {
  const scale = (value) => start + (value - from) / (to - from || 1) * (end - start);
  scale.ticks = (count) => {
    const rough = (to - from) / Math.max(count, 1) || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
    const ticks = [];
    for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9 * step; i++) ticks.push(i * step);
    return ticks;
  };
  return scale;
}

function logarithmic(domain, range, base = 10) {
  const log = (value) => Math.log(value) / Math.log(base);
  const scale = (value) => linear(domain.map(log), range)(log(value));
  scale.ticks = (count) => {
    const [from, to] = domain.map(log);
    const inside = (exponents, factors) => exponents.flatMap((e) => factors.map((f) => f * base ** e))
      .filter((tick) => tick >= domain[0] * (1 - 1e-9) && tick <= domain[1] * (1 + 1e-9));
    const all = Array.from({ length: Math.ceil(to) - Math.floor(from) + 1 }, (_, i) => Math.floor(from) + i);
    const every = Math.max(1, Math.ceil((to - from) / Math.max(count, 1)));
    const whole = inside(all.filter((e) => (e - Math.ceil(from)) % every === 0), [1]);
    return base === 10 && whole.length < 3 ? inside(all, [1, 2, 5]) : whole;
  };
  return scale;
}

const number = {
  tokens: (n) => n >= 1 << 20 && n % (1 << 20) === 0 ? `${n >> 20}M` : n >= 1024 && n % 1024 === 0 ? `${n / 1024}K` : `${n}`,
  bytes: (n) => { for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size)
    return `${+(n / size).toPrecision(3)} ${unit}`; return `${n} B`; },
  us: (n) => n >= 1e5 ? `${(n / 1e3).toFixed(0)} ms` : n >= 1e4 ? `${(n / 1e3).toFixed(1)} ms` : n >= 100 ? `${n.toFixed(0)} us`
    : `${n.toFixed(1)} us`,
  power: (n) => n >= 0.01 && n < 1e4 ? `${+n.toPrecision(3)}` : /^1e/.test(n.toExponential(0))
    ? `10${[...`${Math.round(Math.log10(n))}`].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("")}`
    : n.toExponential(0),
};

// A plot area with axes.  x, y: {domain, log: base or undefined, label, format, ticks: given ones or undefined}.
function frame(width, height, x, y, margin = { left: 46, right: 16, top: 22, bottom: 38 }) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": `${y.label}, by ${x.label}` });
  const scaled = (axis, range) => axis.log ? logarithmic(axis.domain, range, axis.log) : linear(axis.domain, range);
  const X = scaled(x, [margin.left, width - margin.right]), Y = scaled(y, [height - margin.bottom, margin.top]);
  for (const tick of y.ticks || Y.ticks(5)) {
    root.append(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: Y(tick), y2: Y(tick) }),
      svg("text", { x: margin.left - 7, y: Y(tick) + 4, "text-anchor": "end" }, y.format(tick)));
  }
  let clear = -Infinity;                         // a tick's label that would touch the one before is left out
  for (const tick of x.ticks || X.ticks(width / 90)) {
    root.append(svg("line", { class: "axis", x1: X(tick), x2: X(tick), y1: height - margin.bottom,
      y2: height - margin.bottom + 4 }));
    const text = x.format(tick), half = 3.4 * text.length;
    if (X(tick) - half < clear) continue;
    clear = X(tick) + half + 6;
    root.append(svg("text", { x: X(tick), y: height - margin.bottom + 17, "text-anchor": "middle" }, text));
  }
  root.append(svg("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: height - margin.bottom,
    y2: height - margin.bottom }),
    svg("text", { class: "title", x: width - margin.right, y: height - 4, "text-anchor": "end" }, x.label),
    svg("text", { class: "title", x: 2, y: 12 }, y.label));
  return { root, X, Y, width, height, margin };
}

function marker(shape, x, y, size, attributes) {
  const s = size;
  const path = { circle: `M${x - s} ${y}a${s} ${s} 0 1 0 ${2 * s} 0a${s} ${s} 0 1 0 ${-2 * s} 0`,
    square: `M${x - s} ${y - s}h${2 * s}v${2 * s}h${-2 * s}z`,
    triangle: `M${x} ${y - 1.2 * s}L${x + 1.15 * s} ${y + 0.9 * s}H${x - 1.15 * s}z`,
    diamond: `M${x} ${y - 1.3 * s}L${x + 1.3 * s} ${y}L${x} ${y + 1.3 * s}L${x - 1.3 * s} ${y}z` }[shape];
  return svg("path", { d: path, class: "mark", ...attributes });
}

// Puts short labels next to points so that none covers another or a point; one that finds no place is left out.
// beside: only to the right of its point, where a line ends.
function placeLabels(plot, points, beside = false) {
  const taken = points.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  for (const { x, y, text, strong } of points.filter((point) => point.text)) {
    const w = 6.6 * text.length + 2, places = [[x + 9, y + 4], [x - 9 - w, y + 4], [x - w / 2, y - 10], [x - w / 2, y + 20],
      [x + 7, y - 9], [x + 7, y + 18], [x - 7 - w, y - 9], [x - 7 - w, y + 18]].filter(([left]) => !beside || left > x);
    const free = places.find(([left, base]) => left >= 2 && left + w <= plot.width - 2 && base >= 12
      && base <= plot.height - plot.margin.bottom + 2
      && !taken.some(([a, b, c, d]) => left < c && left + w > a && base - 11 < d && base + 3 > b));
    if (!free) continue;
    taken.push([free[0], free[1] - 11, free[0] + w, free[1] + 3]);
    plot.root.append(svg("text", { class: strong ? "strong halo" : "halo", x: free[0], y: free[1] }, text));
  }
}

function withTip(element, text) {
  element.dataset.tip = text;
  element.setAttribute("tabindex", "0");
  element.setAttribute("aria-label", text.replaceAll("\n", ", "));
  return element;
}

const spread = (values, factor) => [Math.min(...values) / factor, Math.max(...values) * factor];

// Speed-up over the best exact attention against tokens, a line per method.
function drawSpeedup(width, rows, style) {
  const tokens = [...new Set(rows.map((row) => row.tokens))].sort((a, b) => a - b);
  const top = Math.max(1.25, ...rows.map((row) => row.speedup)) * 1.08;
  const plot = frame(width, 330, { domain: tokens.length > 1 ? [tokens[0] / 1.25, tokens.at(-1) * 1.45]
    : [tokens[0] / 2, tokens[0] * 2], log: 2, label: "tokens in the cache", format: number.tokens, ticks: tokens },
    { domain: [0, top], label: "times as fast as the best exact attention", format: (n) => `${+n.toFixed(2)}` });
  plot.root.append(svg("line", { x1: plot.margin.left, x2: width - plot.margin.right, y1: plot.Y(1), y2: plot.Y(1),
    stroke: "var(--soft)", "stroke-dasharray": "5 4" }));
  const labels = [];
  for (const [method, own] of groups(rows, (row) => row.method)) {
    const { colour, shape } = style(method), line = own.sort((a, b) => a.tokens - b.tokens);
    plot.root.append(svg("polyline", { fill: "none", stroke: colour, "stroke-width": 2, points: line.map((row) =>
      `${plot.X(row.tokens)},${plot.Y(row.speedup)}`).join(" ") }));
    line.forEach((row, i) => {
      const x = plot.X(row.tokens), y = plot.Y(row.speedup);
      labels.push({ x, y, text: i === line.length - 1 ? row.speedup.toFixed(2) : "", strong: true });
      plot.root.append(withTip(marker(shape, x, y, 4.5, { fill: colour }),
        `${method}\n${number.tokens(row.tokens)} tokens: ${number.us(row.cold_us)}, ${row.speedup.toFixed(2)} times as fast as `
        + `${row.best}`));
    });
  }
  placeLabels(plot, labels, true);
  return plot.root;
}

// Bytes that must move against the rate that was reached, under what launch and memory allow.
function drawRoofline(width, rows, run, style) {
  const bytes = spread(rows.map((row) => row.bytes), 2);
  const limit = (moved) => moved / Math.max(run.floor_us, moved / run.gbps / 1e3) / 1e3;
  const top = Math.max(run.gbps, ...rows.map((row) => row.gbps)) * 1.12;
  const plot = frame(width, 330, { domain: bytes, log: 10, label: "bytes that must move", format: number.bytes },
    { domain: [0, top], label: "GB/s, caches flushed", format: (n) => `${n}` });
  const knee = run.floor_us * run.gbps * 1e3;             // the bytes that take as long as a launch
  const ends = Array.from({ length: 61 }, (_, i) => bytes[0] * (bytes[1] / bytes[0]) ** (i / 60))
    .concat(knee > bytes[0] && knee < bytes[1] ? [knee] : []).sort((a, b) => a - b);
  plot.root.append(svg("polyline", { fill: "none", stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": "5 4",
    points: ends.map((moved) => `${plot.X(moved)},${plot.Y(limit(moved))}`).join(" ") }));
  for (const row of rows) {
    const { colour, shape } = style(row.method), x = plot.X(row.bytes), y = plot.Y(row.gbps);
    plot.root.append(withTip(marker(shape, x, y, 4.5, { fill: colour, "fill-opacity": 0.85 }),
      `${row.method}\n${row.shape}${row.tokens ? `, ${number.tokens(row.tokens)} tokens` : ""}\n${number.bytes(row.bytes)} in `
      + `${number.us(row.cold_us)}: ${row.gbps.toFixed(0)} GB/s, ${row.percent.toFixed(0)} % of the roofline`));
  }
  plot.root.append(svg("text", { x: width - plot.margin.right, y: plot.Y(run.gbps) - 7, "text-anchor": "end" },
    `roofline: ${run.gbps.toFixed(0)} GB/s`));
  return plot.root;
}

// Bytes per token against an error: lower left is better, and the line joins those that nothing beats in both.
function drawPareto(width, points, error, label) {
  const shown = points.filter((point) => point.errors[error] > 0);
  const plot = frame(width, 370, { domain: spread(shown.map((point) => point.bytes_per_token), 1.45), log: 2,
    label: "bytes held per token", format: (n) => `${n}` }, { domain: spread(shown.map((point) => point.errors[error]), 2.5),
    log: 10, label, format: number.power });
  const front = shown.toSorted((a, b) => a.bytes_per_token - b.bytes_per_token || a.errors[error] - b.errors[error])
    .reduce((kept, point) => kept.length && kept.at(-1).errors[error] <= point.errors[error] ? kept : [...kept, point], []);
  plot.root.append(svg("polyline", { fill: "none", stroke: "var(--c0)", "stroke-opacity": 0.45, "stroke-width": 2,
    points: front.map((point) => `${plot.X(point.bytes_per_token)},${plot.Y(point.errors[error])}`).join(" ") }));
  const labels = shown.map((point) => {
    const x = plot.X(point.bytes_per_token), y = plot.Y(point.errors[error]);
    plot.root.append(withTip(marker("circle", x, y, 5, { fill: front.includes(point) ? "var(--c0)" : "var(--soft)" }),
      `${point.preset} (${point.group})\n${+point.bytes_per_token.toFixed(1)} bytes per token${point.bits ? `, ${point.bits.toFixed(2)} bits per `
      + "number" : ""}\n${label}: ${point.errors[error].toPrecision(2)}`));
    return { x, y, text: point.preset, strong: front.includes(point) };
  });
  placeLabels(plot, labels);
  return plot.root;
}

// Horizontal bars made of parts: rows of {label, parts: [{value, colour, name}], total, tip}.
function drawBars(width, bars, format) {
  const line = 42, left = 4, right = 66, height = bars.length * line + 8;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "times" });
  const X = linear([0, Math.max(...bars.map((bar) => bar.total))], [0, width - left - right]);
  bars.forEach((bar, i) => {
    const y = i * line, most = Math.floor((width - left) / 6.3);
    const name = bar.label.length > most ? `${bar.label.slice(0, most - 1)}…` : bar.label;
    const group = svg("g", { class: "mark" }, svg("text", { class: "strong", x: left, y: y + 13 }, name));
    let x = left;
    for (const { value, colour } of bar.parts) {
      group.append(svg("rect", { x, y: y + 18, width: Math.max(X(value), 0.5), height: 15, fill: colour }));
      x += X(value);
    }
    group.append(svg("text", { x: x + 6, y: y + 30 }, format(bar.total)));
    root.append(withTip(group, bar.tip));
  });
  return root;
}

function groups(rows, key) {
  const found = new Map();
  for (const row of rows) found.set(key(row), [...(found.get(key(row)) || []), row]);
  return found;
}
