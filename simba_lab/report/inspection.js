
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const format = new Intl.NumberFormat("en");
const runs = [];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Control characters and direction overrides become visible pictures that do nothing.
function inert(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, function (char) {
    const code = char.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "\u2421" : "\ufffd";
  });
}

// A name that a narrow column may break after its marks.
function breakable(name) {
  const made = element("bdi");
  for (const part of inert(name).split(/(?<=[:_@\/])/)) made.append(part, document.createElement("wbr"));
  return made;
}

function mean(values) {
  return values.reduce(function (sum, value) { return sum + value; }, 0) / values.length;
}

function depth(arm, token) {
  const dropped = arm.dropped_before[token];
  return dropped === null || dropped === undefined ? data.n_layer : dropped;
}

function colour(deep) {
  return "color-mix(in srgb, var(--shade) " + (60 * deep / data.n_layer).toFixed(1) + "%, transparent)";
}

function isContext(token) {
  return token < data.n_context;
}

// A run of several tokens shares its characters: one stripe for each of them.
function shade(span, arm, run, layer) {
  const stripes = [];
  for (let i = 0; i < run.count; i++) {
    const deep = isContext(run.first + i) ? depth(arm, run.first + i) : 0;
    stripes.push(deep > layer ? colour(deep) : "transparent");
  }
  if (run.count === 1) span.style.background = stripes[0];
  else span.style.background = "linear-gradient(90deg, " + stripes.map(function (stripe, i) {
    return stripe + " " + (100 * i / run.count) + "% " + (100 * (i + 1) / run.count) + "%";
  }).join(", ") + ")";
}

function deepest(arm, run) {
  let found = 0;
  for (let i = 0; i < run.count; i++) if (isContext(run.first + i)) found = Math.max(found, depth(arm, run.first + i));
  return found;
}

function fill(span, text) {
  const shown = inert(text);
  if (shown.indexOf("\n") < 0) {
    span.textContent = shown;
    return;
  }
  shown.split("\n").forEach(function (line, index) {
    if (index) span.append(element("span", "mark", "\u21b5"), "\n");
    span.append(line);
  });
}

function drawRun(arm, run, index) {
  const span = element("span", isContext(run.first) ? "t" : "t suffix");
  fill(span, run.text);
  span.dataset.run = index;
  if (isContext(run.first)) {
    if (deepest(arm, run) === data.n_layer) span.classList.add("whole");
    if (run.first <= data.n_context - 1 && data.n_context - 1 < run.first + run.count) span.classList.add("boundary");
  }
  return span;
}

function drawArm(arm, number) {
  const card = element("article", "arm");
  const title = element("h3");
  title.id = "arm-" + number;
  title.append(breakable(arm.name));
  const kept = arm.keep_counts.reduce(function (sum, count) { return sum + count; }, 0);
  const share = (100 * kept / (data.n_context * data.n_layer)).toFixed(1);
  const loss = mean(arm.suffix_nll) - mean(data.dense_suffix_nll);
  card.append(title, element("p", "made", "keeps " + share + " % over all layers \u00b7 " + arm.gflops + " GFLOPs \u00b7 suffix NLL " +
    mean(arm.suffix_nll).toFixed(3) + " nats/token (" + (loss < 0 ? "\u2212" : "+") + Math.abs(loss).toFixed(3) + " against dense)"));
  arm.counter = element("p", "made");
  arm.body = element("div", "text");
  arm.body.tabIndex = 0;
  arm.body.dir = "auto";
  arm.body.setAttribute("role", "group");
  arm.body.setAttribute("aria-labelledby", title.id);
  arm.body.setAttribute("aria-describedby", "text-title");
  arm.spans = [];
  runs.forEach(function (run, index) {
    if (!isContext(run.first) && (index === 0 || isContext(runs[index - 1].first))) {
      arm.body.append(element("div", "divide", "end of the context; the suffix is never pruned"));
    }
    const span = drawRun(arm, run, index);
    arm.spans.push(span);
    arm.body.append(span);
  });
  card.append(arm.counter, arm.body);
  document.getElementById("arms").append(card);
  listen(arm);
}

function setLayer(layer) {
  document.getElementById("layer-shown").textContent = layer;
  for (const arm of data.arms) {
    const count = arm.keep_counts[layer];
    arm.counter.textContent = format.format(count) + " of " + format.format(data.n_context) + " tokens (" +
      (100 * count / data.n_context).toFixed(1) + " %) enter layer " + layer;
    arm.spans.forEach(function (span, index) {
      const run = runs[index];
      if (!isContext(run.first)) return;
      span.classList.toggle("gone", deepest(arm, run) <= layer);
      shade(span, arm, run, layer);
    });
  }
}

// Where a token stands among those scored with it: 1 is the highest score. A layer holds the tokens that entered it.
function standing(arm, layer, token) {
  const place = arm.places || (arm.places = {});
  if (!place[layer]) {
    const present = [];
    for (let t = 0; t < data.n_context; t++) if (depth(arm, t) > layer) present.push(t);
    const scores = arm.scores[layer];
    const order = present.map(function (_, i) { return i; });
    const value = function (i) { return scores[i] === null ? -Infinity : scores[i]; };
    order.sort(function (a, b) { return value(b) - value(a) || b - a; });
    place[layer] = { index: new Map(present.map(function (t, i) { return [t, i]; })), rank: [] };
    order.forEach(function (i, rank) { place[layer].rank[i] = rank + 1; });
  }
  const index = place[layer].index.get(token);
  if (index === undefined) return null;
  return { score: arm.scores[layer][index], rank: place[layer].rank[index], of: arm.scores[layer].length };
}

function describeContext(arm, token) {
  const parts = [];
  for (const other of data.arms) {
    const line = element("p");
    const deep = depth(other, token);
    const fate = deep === data.n_layer ? "enters every layer" : "dropped before layer " + deep;
    line.append(element(other === arm ? "b" : "span", "", inert(other.name)), ": " + fate);
    parts.push(line);
  }
  const list = element("ol");
  for (const layer of Object.keys(arm.scores)) {
    const found = standing(arm, layer, token);
    if (!found) continue;
    const item = element("li");
    const score = found.score === null ? "not finite" : String(found.score);
    item.append(element("span", "", "after " + layer), element("span", "", score), element("span", "", found.rank + ". of " + found.of));
    list.append(item);
  }
  if (list.children.length) parts.push(element("p", "soft", "Scores by layer and rank, of " + inert(arm.name) + ":"), list);
  return parts;
}

function describeSuffix(token) {
  const place = token - data.n_context;
  const parts = [element("p", "soft", "NLL in nats; dense " + data.dense_suffix_nll[place])];
  for (const arm of data.arms) parts.push(element("p", "", inert(arm.name) + ": " + arm.suffix_nll[place]));
  return parts;
}

function describe(arm, run) {
  tip.replaceChildren();
  for (let token = run.first; token < run.first + run.count; token++) {
    const where = isContext(token) ? "position " + token + " of " + data.n_context : "suffix token " + (token - data.n_context);
    const counts = isContext(token) ? ", " + format.format(data.tokens.count[token]) + "\u00d7 in the context" : "";
    const seen = data.tokens.training_count;
    const trained = seen ? ", " + format.format(seen[token]) + "\u00d7 in training" : "";
    const head = element("p");
    head.append(element("code", "", inert(run.text).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5")));
    if (run.count > 1) head.append(" (part " + (token - run.first + 1) + " of " + run.count + ")");
    tip.append(head, element("p", "soft", where + ", id " + data.tokens.id[token] + ", " + data.tokens.kind[token] + counts + trained));
    tip.append(...(isContext(token) ? describeContext(arm, token) : describeSuffix(token)));
  }
}

function placeTip(span) {
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8));
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = left + "px";
  tip.style.top = (box.bottom + tip.offsetHeight + 8 < window.innerHeight || above < 0 ? box.bottom + 8 : above) + "px";
}

let current = null;
let pointed = null;

function point(arm, index) {
  leave();
  current = index;
  pointed = arm.spans[index];
  for (const other of data.arms) other.spans[index].classList.add(other === arm ? "here" : "same");
  describe(arm, runs[index]);
  placeTip(pointed);
}

function leave() {
  tip.hidden = true;
  pointed = null;
  if (current !== null) for (const arm of data.arms) arm.spans[current].classList.remove("here", "same");
}

function move(arm, event) {
  const from = current === null ? 0 : current;
  const targets = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: runs.length - 1 };
  if (event.key === "Escape") leave();
  if (!(event.key in targets)) return;
  event.preventDefault();
  const index = current === null ? 0 : Math.max(0, Math.min(runs.length - 1, targets[event.key]));
  arm.spans[index].scrollIntoView({ block: "nearest", behavior: "instant" });
  point(arm, index);
}

function listen(arm) {
  const under = function (event) {
    const span = event.target.closest(".t");
    if (span) point(arm, Number(span.dataset.run));
  };
  arm.body.addEventListener("pointerover", under);
  arm.body.addEventListener("click", under);
  arm.body.addEventListener("pointerleave", leave);
  arm.body.addEventListener("keydown", function (event) { move(arm, event); });
  arm.body.addEventListener("blur", leave);
}

function bar(share) {
  const cell = element("td");
  const box = element("div", "bar");
  box.style.setProperty("--share", share === null ? 0 : share);
  box.append(element("i"), element("span", "", share === null ? "\u2014" : (100 * share).toFixed(0) + " %"));
  cell.append(box);
  return cell;
}

function drawGroups(layer) {
  document.getElementById("depth-shown").textContent = layer;
  const cards = data.views.map(function (view) {
    const card = element("article", "group");
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const name of ["group", "tokens"].concat(data.arms.map(function (arm) { return breakable(arm.name); }))) {
      const cell = element("th");
      cell.append(name);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    view.labels.forEach(function (label, group) {
      const row = body.insertRow();
      const cell = element("th", "", label);
      cell.scope = "row";
      row.append(cell, element("td", "faint", format.format(view.sizes[group])));
      for (const arm of data.arms) row.append(bar(arm.kept[view.key][group][layer]));
    });
    card.append(element("h3", "", view.title.charAt(0).toUpperCase() + view.title.slice(1)), table);
    return card;
  });
  document.getElementById("groups").replaceChildren(...cards);
}

function drawLegend() {
  const legend = document.getElementById("legend");
  const scale = element("span", "scale");
  const steps = Math.min(data.n_layer, 12);
  for (let i = 1; i <= steps; i++) {
    const swatch = element("i", i === steps ? "whole" : "");
    swatch.style.setProperty("--deep", i / steps);
    scale.append(swatch);
  }
  legend.setAttribute("aria-label", "shading, from dropped before layer 1 to enters every layer");
  legend.append("dropped early", scale, "enters every layer");
}

function drawAll() {
  let first = 0;
  data.tokens.text.forEach(function (text, index) {
    runs.push({ first: first, count: data.tokens.run[index], text: text });
    first += data.tokens.run[index];
  });
  data.arms.forEach(drawArm);
  drawLegend();
  setLayer(0);
  drawGroups(data.n_layer - 1);
  window.addEventListener("scroll", function () { if (pointed) placeTip(pointed); }, { passive: true });
  document.getElementById("layer").addEventListener("input", function (event) { setLayer(Number(event.target.value)); });
  document.getElementById("depth").addEventListener("input", function (event) { drawGroups(Number(event.target.value)); });
}

drawAll();
