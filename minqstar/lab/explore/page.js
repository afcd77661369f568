// The page: what was exported is walked, coloured and replayed. Text from outside only ever becomes textContent.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const fixed = (v, sign = false) => {
  if (v === null || !isFinite(v)) return "–";
  const digits = Math.abs(v).toFixed(2);
  return (Number(digits) === 0 ? "" : v < 0 ? "−" : sign ? "+" : "") + digits;
};
const added = (first, ...others) => fixed(first) + others.map((v) => ` ${v < -0.005 ? "−" : "+"} ${fixed(Math.abs(v))}`).join("");
const text = (token) => (token === "" ? "∅" : token);

// An element with attributes (class, or on… for events) and children: elements and plain text.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "circle", "polyline", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Blue is paid, orange is charged, deeper for more: one diverging scale with its middle at 0, on both sides alike.
function ground(value, unit = 1) {
  const deep = (1 - Math.exp((-2 * Math.abs(value)) / unit)).toFixed(2);
  return `background-color: rgb(var(--${value > 0 ? "paid" : "charged"}) / ${deep})`;
}

// ---- Walk

const world = data.world;
let knobs = world && structuredClone(world.knobs);
let alpha = 1;
let exact = null; // of the knobs: table, V, Q, logPi, advantage
let route = []; // the arcs taken so far, as places in their states
const tree = world && children(world.learned);

function children(learned) {
  const of = learned.parent.map(() => ({}));
  const first = {}; // of each state the first prefix at which the networks were asked
  learned.parent.forEach((parent, n) => {
    if (parent >= 0) of[parent][learned.arc[n]] = n;
    first[learned.state[n]] ??= n;
  });
  return { of, first };
}

function statesOf(arcs) {
  const states = [0];
  for (const arc of arcs) states.push(world.next[states[states.length - 1]][arc]);
  return states;
}

// What the networks say where a route has led: at this very prefix, or at another way to the same state.
function learnedAt(arcs, state) {
  let node = 0;
  for (const arc of arcs) node = node === undefined ? undefined : tree.of[node][arc];
  const known = node !== undefined;
  if (!known) node = tree.first[state];
  if (node === undefined) return null;
  const [pi, ref] = [world.learned.pi[node], world.learned.ref[node]];
  return { known, pi, ref, mixed: mixed(pi, ref, alpha), reward: pi.map((v, a) => data.beta * (v - ref[a])) };
}

function solveAgain() {
  const table = tableOf(world, knobs);
  exact = { table, ...solve(table, knobs.beta) };
  showTour();
  showWalk();
  showCredit();
}

function go(arcs) {
  route = arcs;
  showWalk();
}

function back(t) {
  go(route.slice(0, t));
  at("path").lastElementChild.focus();
}

function showWalk() {
  const states = statesOf(route), s = states[states.length - 1], over = s === world.next.length;
  const { V, Q, logPi, advantage, table } = exact;
  const taken = route.map((arc, t) => ({
    arc, s: states[t], token: world.text[world.token[states[t]][arc]], r: table.reward[states[t]][arc],
    V: V[states[t]], after: V[states[t + 1]], A: advantage[states[t]][arc],
  }));
  at("path").replaceChildren(
    make("button", { onclick: () => go([]), "aria-label": "back to the start" }, "⟨start⟩"),
    ...taken.map((step, t) => make("button", { style: ground(step.A), onclick: () => back(t),
      title: `r ${fixed(step.r)}, A* ${fixed(step.A)}: stand before it again` }, text(step.token))),
  );
  at("here").replaceChildren(...sayHere(taken[taken.length - 1], s, over));
  showStep(s, over, Q, logPi, advantage, table);
  showSums(taken);
}

function sayHere(last, s, over) {
  const V = exact.V, said = [];
  if (last) {
    said.push(`“${last.token}” was paid r = ${fixed(last.r)}. V* went from ${fixed(last.V)} to ${fixed(last.after)}. `);
    said.push(`So A* = r + V*(s') − V*(s) = ${added(last.r, last.after, -last.V)} = ${fixed(last.A)}. `);
    if (last.r === 0 && last.A < -0.3) said.push("Nothing was paid yet, but what can still be expected fell: A* charges the token that decides, at once. ");
    if (last.r < -0.3 && Math.abs(last.A) < 0.05) said.push("The reward comes only now. V* knew it before, so A* is 0: this was charged already. ");
  }
  if (over) said.push("The summary is complete: V*(end) = 0.");
  else said.push(`You stand where V*(s) = ${fixed(V[s])}: so much can still be expected. ` +
    (exact.table.next[s].length === 1 ? "Here the grammar leaves one token only: nothing is decided." : ""));
  return said;
}

const COLUMNS = ["next token", "", "π_ref", "π*", "π", "r", "V*(s')", "Q*", "A*", "learned"]; // the second holds bars
const extra = (i) => (i >= 2 && i <= 4 ? "extra" : undefined); // on a phone the bars say what these columns do

function showStep(s, over, Q, logPi, advantage, table) {
  if (over) {
    at("step").replaceChildren();
    at("bars").textContent = "";
    return;
  }
  const learned = learnedAt(route, s);
  const order = table.next[s].map((_, a) => a).sort((a, b) => logPi[s][b] - logPi[s][a]);
  const head = make("tr", {}, ...COLUMNS.map((name, i) => make("th", { scope: "col", class: extra(i) }, name)));
  const line = (a) => {
    const p = [Math.exp(table.logRef[s][a]), Math.exp(logPi[s][a]), learned ? Math.exp(learned.mixed[a]) : NaN];
    const bar = (v, of) => make("i", { style: `width: ${isFinite(v) ? (100 * v).toFixed(1) : 0}%; background: var(--${of})` });
    const figures = [table.reward[s][a], exact.V[table.next[s][a]], Q[s][a]].map((v) => fixed(v));
    const earned = [advantage[s][a], learned ? learned.reward[a] : NaN];
    return make("tr", {},
      make("td", {}, make("button", { class: "token", onclick: () => take(a) }, text(world.text[world.token[s][a]]))),
      make("td", { class: "bars" }, bar(p[0], "ref"), bar(p[1], "exact"), bar(p[2], "learned")),
      ...p.map((v) => make("td", { class: "num extra" }, isFinite(v) ? `${(100 * v).toFixed(0)}%` : "–")),
      ...figures.map((v) => make("td", { class: "num" }, v)),
      ...earned.map((v) => make("td", { class: "num", style: isFinite(v) ? ground(v) : "" }, fixed(v, true))));
  };
  at("step").replaceChildren(make("thead", {}, head), make("tbody", {}, ...order.map(line)));
  const key = (of, words) => [make("span", { class: "swatch", style: `background: var(--${of})` }), words];
  const off = learned ? 1 - learned.pi.reduce((sum, v) => sum + Math.exp(v), 0) : 0;
  at("bars").replaceChildren(...key("ref", "π_ref of the world"), ...key("exact", "π*, exact"),
    ...key("learned", alpha === 1 ? "π, learned" : `π_ref (π/π_ref)^α of the networks, α = ${fixed(alpha)}`),
    !learned ? ". The networks were not asked here." : (learned.known ? "" : ". The learned values are those at another prefix that leads to the same state") +
      (off > 0.005 ? `. ${(100 * off).toFixed(1)}% of π leaves the grammar` : ""));
}

function take(a) {
  const rows = at("step").contains(document.activeElement);
  go([...route, a]);
  if (rows) at("step").querySelector("button")?.focus();
}

function showSums(taken) {
  let paid = 0, earned = 0;
  const V0 = exact.V[0];
  const rows = taken.map((step) => {
    paid += step.r;
    earned += step.A;
    const cells = [step.r, step.V, step.after, step.A].map((v, i) => make("td", { class: i === 1 ? "num extra" : "num" }, fixed(v)));
    const closes = `${added(paid, step.after)} = ${added(V0, earned)}`;
    return make("tr", {}, make("td", {}, make("span", { class: "token" }, text(step.token))), ...cells, make("td", { class: "num" }, closes));
  });
  const names = ["token", "r", "V*(s)", "V*(s')", "A*", "Σr + V*(s') = V*(s_0) + ΣA*"];
  at("sums").replaceChildren(make("thead", {}, make("tr", {}, ...names.map((name, i) => make("th", { scope: "col", class: i === 2 ? "extra" : undefined }, name)))), make("tbody", {}, ...rows));
}

const KNOBS = [ // name, words, least, most, step, and where it stands
  ["beta", "β, the price of leaving π_ref", -2, 1, 0.05], ["right", "r of a right fact", -2, 2, 0.1], ["wrong", "r of a wrong fact", -3, 1, 0.1],
  ["clause", "r of an extra clause", -1, 1, 0.1], ["filler", "r of a filler (“Any advice?”)", -2, 1, 0.1],
  ["eps", "π_ref's chance of a wrong fact", 0.01, 0.9, 0.01], ["alpha", "α of π_ref (π/π_ref)^α, Eq. 14", 0, 3, 0.1],
];

function knobOf(name) {
  if (name === "alpha") return alpha;
  return name in knobs ? knobs[name] : knobs.paid[name];
}

function turn(name, value) {
  if (name === "alpha") alpha = value;
  else if (name in knobs) knobs[name] = value;
  else knobs.paid[name] = value;
  solveAgain();
}

function showKnobs() {
  const labels = KNOBS.map(([name, words, min, max, step]) => {
    const log = name === "beta"; // its slider moves in powers of ten
    const shown = make("output", {}, fixed(knobOf(name)));
    const slider = make("input", { type: "range", id: `knob-${name}`, min, max, step, value: log ? Math.log10(knobOf(name)) : knobOf(name),
      oninput: (event) => {
        turn(name, log ? 10 ** Number(event.target.value) : Number(event.target.value));
        shown.textContent = fixed(knobOf(name));
      } });
    return make("label", {}, words, shown, slider);
  });
  const reset = make("button", { onclick: () => {
    knobs = structuredClone(world.knobs);
    alpha = 1;
    showKnobs();
    solveAgain();
    at("knobs").lastElementChild.focus();
  } }, "reset the knobs");
  at("knobs").replaceChildren(...labels, reset);
}

// A place where a wrong fact is charged before its reward comes: on a response's way, the token that is charged most.
function lateReward() {
  const found = data.responses.flatMap((response) => {
    const { states, arcs } = walk(world, response.ids);
    return states.flatMap((s, t) => (world.kind[s] !== "fact" ? [] :
      exact.advantage[s].map((A, arc) => ({ A, arc, s, before: arcs.slice(0, t) })).filter(({ arc }) => exact.table.reward[s][arc] === 0)));
  });
  return found.filter(({ A }) => A < -0.1).sort((one, other) => one.A - other.A)[0];
}

function showTour() {
  const late = knobs.paid.wrong < knobs.paid.right ? lateReward() : null, ways = []; // else what is right is charged
  const onwards = (arcs) => { // the likeliest way of π* from there, while nothing is paid
    let s = statesOf(arcs).pop();
    while (s < world.next.length && exact.table.next[s].length === 1 && exact.table.reward[s][0] === 0) {
      arcs = [...arcs, 0];
      s = world.next[s][0];
    }
    return arcs;
  };
  const step = (words, arcs) => make("button", { onclick: () => go(arcs) }, words);
  if (late) {
    const wrong = world.text[world.token[late.s][late.arc]];
    const after = onwards([...late.before, late.arc]);
    ways.push("Why is a wrong number charged at its first digit? ",
      step("1. Stand before it", late.before), " ", step(`2. Take “${wrong}”: r is 0, A* is not`, [...late.before, late.arc]), " ");
    const end = statesOf(after).pop();
    if (end < world.next.length) {
      const worst = exact.table.reward[end].map((r, a) => [r, a]).sort((x, y) => x[0] - y[0])[0];
      if (worst[0] < 0) ways.push(step("3. Go on to where r comes: A* was there already", [...after, worst[1]]), " ");
    }
  }
  ways.push(...(late ? [make("br")] : []), "Or take a whole way: ",
    ...data.responses.flatMap((of) => [step(of.name, walk(world, of.ids).arcs), " "]),
    step("greedy π*", greedyWay()));
  at("tour").replaceChildren(...ways);
}

function greedyWay() {
  const arcs = [];
  for (let s = 0; s < world.next.length; s = world.next[s][arcs[arcs.length - 1]]) arcs.push(exact.logPi[s].indexOf(Math.max(...exact.logPi[s])));
  return arcs;
}

// ---- Credit

const CHANNELS = { // each: a response's values, one a token (null: none), whether their sum means something, and whether it is pay
  "learned reward β log(π/π_ref)": { of: learnedReward, sums: true, paid: true },
  "exact A*": { of: (of) => exactOf(of, (s, a) => exact.advantage[s][a]), sums: true, paid: true, world: true },
  "true reward r": { of: (of) => exactOf(of, (s, a) => exact.table.reward[s][a]), sums: true, paid: true, world: true },
  "log π, nats": { of: (of) => of.logp, sums: true },
  "log π_ref, nats": { of: (of) => of.ref, sums: true },
  "entropy of π at the state, nats": { of: (of) => of.entropy },
  "KL(π_ref‖π) at the state, nats": { of: (of) => of.kl },
};
const shown = { channel: Object.keys(CHANNELS)[0], by: "token", unit: 1, pair: [0, Math.min(1, data.responses.length - 1)], seen: null };

function learnedReward(of) {
  return of.logp.map((v, t) => data.beta * (v - of.ref[t]));
}

// Where a response goes in the world of the page: nowhere, if it was typed to another prompt.
const walked = (of) => walk(world, (of.prompt ?? data.typed) === data.typed ? of.ids : []);

function exactOf(of, value) {
  const { states, arcs } = walked(of);
  return of.ids.map((_, t) => (t < states.length ? value(states[t], arcs[t]) : null));
}

// The values of the colour that is chosen; of tokens that somebody else wrote, none.
const valuesOf = (of) => CHANNELS[shown.channel].of(of).map((v, t) => (of.given.includes(t) ? null : v));

// What is one unit of colour: of all responses' values some of the largest, so that both sides have one scale.
function unitOf() {
  const sizes = data.responses.flatMap(valuesOf).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const large = sizes[Math.floor(0.98 * sizes.length)] ?? 1;
  return [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5].find((unit) => unit >= large / 2) ?? 10;
}

// Runs of tokens [start, stop): single ones, words, or sentences. A sum over them is the return of that part.
function parts(tokens, by, from) {
  const starts = [];
  for (let t = from; t < tokens.length; t++) {
    const word = /^\s/.test(tokens[t]) || t === tokens.length - 1;
    const sentence = word && t > 0 && /[.!?]$/.test(tokens[t - 1]);
    if (t === from || by === "token" || (by === "word" && word) || (by === "sentence" && sentence)) starts.push(t);
  }
  return starts.map((start, i) => [start, starts[i + 1] ?? tokens.length]);
}

function spans(side, of, from, stop) {
  const values = valuesOf(of), { sums } = CHANNELS[shown.channel], unit = shown.unit;
  return parts(of.tokens.slice(0, stop), shown.by, from).map(([start, end]) => {
    const here = values.slice(start, end).filter((v) => v !== null);
    const total = here.reduce((sum, v) => sum + v, 0) / (sums ? 1 : Math.max(1, here.length));
    const words = of.tokens.slice(start, end).join("");
    if (!here.length) return make("span", { class: "given", title: "no value here" }, words);
    const seen = shown.seen && shown.seen.side === side && shown.seen.t >= start && shown.seen.t < end;
    return make("button", { style: ground(total, unit), class: seen ? "seen" : "", title: `${words}: ${fixed(total, true)}`,
      onclick: () => { shown.seen = { side, t: start }; showCredit(); at("texts").querySelector(".seen").focus(); } }, words);
  });
}

function showCredit() {
  shown.unit = unitOf();
  const two = shown.pair.map((i) => data.responses[i]), [one, other] = two;
  const single = shown.pair[0] === shown.pair[1];
  let common = 0;
  if (!single) while (common < Math.min(one.ids.length, other.ids.length) - 1 && one.ids[common] === other.ids[common]) common++;
  const total = (of) => valuesOf(of).reduce((sum, v) => sum + (v ?? 0), 0);
  const sums = CHANNELS[shown.channel].sums;
  const column = (of, side) => make("div", {}, make("p", { class: "of" }, of.name + (sums ? `: ${fixed(total(of), true)}` : "")),
    make("p", { class: "line", dir: "auto" }, ...spans(side, of, common, of.tokens.length)));
  at("texts").replaceChildren(
    ...(common ? [make("div", { style: "grid-column: 1 / -1" }, make("p", { class: "of" }, "what both begin with"),
      make("p", { class: "line", dir: "auto" }, ...spans(0, one, 0, common)))] : []),
    ...(single ? [column(one, 0)] : two.map(column)));
  const unit = shown.unit;
  at("scale").replaceChildren(...[-2, -1, -0.5, 0, 0.5, 1, 2].map((v) =>
    make("span", { style: ground(v * unit, unit) }, ` ${v > 0 ? "+" : ""}${(v * unit).toLocaleString("en")} `.replace("-", "−"))),
    CHANNELS[shown.channel].paid ? " blue is paid, orange is charged" : " blue is above 0, orange below");
  showCurve(single ? [one] : two, total);
  showContrast();
}

// The running sum over the tokens of each response; where the lines end, they are the margin apart.
function showCurve(responses, total) {
  const sums = CHANNELS[shown.channel].sums;
  at("curve").replaceChildren();
  at("curve").style.display = sums ? "" : "none";
  at("running").textContent = !sums ? "" : "The running sum, token by token." +
    (responses.length === 2 ? ` It ends in the margin ${added(total(responses[0]), -total(responses[1]))} = ${fixed(total(responses[0]) - total(responses[1]), true)}.` : "");
  if (!sums) return;
  const lines = responses.map((of) => valuesOf(of).reduce((line, v) => [...line, line[line.length - 1] + (v ?? 0)], [0]));
  const low = Math.min(0, ...lines.flat()), high = Math.max(0, ...lines.flat(), low + 1e-9), most = Math.max(...lines.map((line) => line.length - 1));
  const W = at("curve").clientWidth || 640, H = 130, x = (t) => 4 + (t / most) * (W - 124), y = (v) => 8 + ((high - v) / (high - low)) * (H - 16);
  const svg = at("curve");
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("aria-label", at("running").textContent);
  svg.append(make("line", { x1: 4, x2: W - 120, y1: y(0), y2: y(0), stroke: "var(--rule)" }));
  lines.forEach((line, i) => {
    const colour = i ? "var(--ref)" : "var(--learned)", end = line[line.length - 1];
    svg.append(make("polyline", { points: line.map((v, t) => `${x(t)},${y(v)}`).join(" "), fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": i ? "5 3" : undefined }));
    const apart = lines.length === 2 && Math.abs(y(lines[0].at(-1)) - y(lines[1].at(-1))) < 13 ? (end >= lines[1 - i].at(-1) ? -7 : 7) : 0;
    svg.append(make("text", { x: x(line.length - 1) + 5, y: y(end) + 4 + apart }, `${responses[i].name.slice(0, 12)} ${fixed(end)}`));
  });
}

// What could stand in a token's place, and what each would earn.
function showContrast() {
  if (!shown.seen || !data.responses[shown.pair[shown.seen.side]] || shown.seen.t >= data.responses[shown.pair[shown.seen.side]].ids.length) {
    at("contrast").replaceChildren(make("p", { class: "of" }, "Click a token to see what could stand in its place."));
    return;
  }
  const of = data.responses[shown.pair[shown.seen.side]], t = shown.seen.t;
  const where = world ? walked(of) : null;
  const inside = where && t < where.states.length ? where.states[t] : -1;
  const here = [of.ids[t], of.tokens[t], of.logp[t], of.ref[t]];
  const rivals = [here, ...of.rivals[t].filter(([id]) => id !== of.ids[t])];
  const row = ([id, token, pi, ref]) => {
    const arc = inside >= 0 ? world.token[inside].indexOf(id) : -1;
    const reward = ref === null || pi === null ? NaN : data.beta * (pi - ref), A = arc >= 0 ? exact.advantage[inside][arc] : NaN;
    return make("tr", {}, make("td", {}, make("span", { class: "token" }, text(token)), id === of.ids[t] ? " (taken)" : ""),
      make("td", { class: "num" }, fixed(pi)), make("td", { class: "num" }, fixed(ref)),
      make("td", { class: "num", style: isFinite(reward) ? ground(reward) : "" }, fixed(reward, true)),
      ...(world ? [make("td", { class: "num", style: isFinite(A) ? ground(A) : "" }, isFinite(A) ? fixed(A, true) : "not known")] : []));
  };
  const names = ["in its place", "log π", "log π_ref", "learned", ...(world ? ["exact A*"] : [])];
  at("contrast").replaceChildren(
    make("p", { class: "of" }, `In the place of “${of.tokens[t]}”, the policy's likeliest:`),
    make("div", { class: "wide" }, make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rivals.map(row)))));
}

function choice(label, options, now, change) {
  const select = make("select", { "aria-label": label, onchange: (event) => change(event.target.value) },
    ...options.map(([value, words]) => make("option", { value, selected: String(value) === String(now) }, words)));
  return make("label", { class: "of" }, `${label} `, select);
}

function showChoices() {
  const names = data.responses.map((of, i) => [i, of.name]);
  const channels = Object.entries(CHANNELS).filter(([, of]) => world || !of.world).map(([name]) => [name, name]);
  at("choices").replaceChildren(
    choice("colour", channels, shown.channel, (name) => { shown.channel = name; showCredit(); }),
    choice("by", ["token", "word", "sentence"].map((by) => [by, by]), shown.by, (by) => { shown.by = by; showCredit(); }),
    ...[0, 1].map((side) => choice(side ? "right" : "left", names, shown.pair[side], (i) => { shown.pair[side] = Number(i); shown.seen = null; showCredit(); })));
}

// ---- Search

const search = { name: Object.keys(data.search.runs).pop(), frame: 0, timer: 0 };

function layout({ parent }) {
  const below = parent.map(() => []), depth = parent.map(() => 0), row = parent.map(() => 0);
  parent.forEach((p, n) => { if (p >= 0) { below[p].push(n); depth[n] = depth[p] + 1; } });
  let rows = 0;
  const stack = [0];
  while (stack.length) { // a node's first child stands in its row, the others in new ones below
    const n = stack.pop(), p = parent[n];
    row[n] = p < 0 ? rows++ : below[p][0] === n ? row[p] : rows++;
    stack.push(...below[n].slice().reverse());
  }
  return { depth, row, rows };
}

const place = layout(data.search);
const drawn = { nodes: [], lines: [] };

function drawTree() {
  const { parent, text: tokens, logp } = data.search, x = (n) => 12 + 64 * place.depth[n], y = (n) => 18 + 26 * place.row[n];
  const svg = make("svg", { width: 12 + 64 * (Math.max(...place.depth) + 2), height: 18 + 26 * place.rows, role: "img", "aria-label": "the tree of prefixes" });
  parent.forEach((p, n) => {
    drawn.lines[n] = p < 0 ? null : make("line", { x1: x(p), y1: y(p), x2: x(n), y2: y(n) });
    if (drawn.lines[n]) svg.append(drawn.lines[n]);
  });
  parent.forEach((p, n) => {
    const words = tokens[n].length > 9 ? `${tokens[n].slice(0, 8)}…` : text(tokens[n]);
    drawn.nodes[n] = make("g", {}, make("title", {}, `${tokens[n]}: log π of the path ${fixed(logp[n])}`),
      make("circle", { cx: x(n), cy: y(n), r: 4 }), make("text", { x: x(n) + 6, y: y(n) - 6 }, n ? words : ""));
    svg.append(drawn.nodes[n]);
  });
  at("tree").replaceChildren(svg);
}

function showFrame() {
  const frames = data.search.runs[search.name], frame = frames[search.frame], last = search.frame === frames.length - 1;
  const met = new Set([0]), shut = new Set(), on = new Set(frame.on), best = new Set();
  for (const past of frames.slice(0, search.frame + 1)) {
    past.on.forEach((n) => met.add(n));
    past.shut.forEach((n) => shut.add(n));
  }
  for (let n = frame.best; n > 0; n = data.search.parent[n]) { best.add(n); met.add(n); }
  drawn.nodes.forEach((g, n) => g.setAttribute("class", [!met.has(n) && "off", on.has(n) && "on", shut.has(n) && "shut", best.has(n) && "best"].filter(Boolean).join(" ")));
  drawn.lines.forEach((line, n) => line?.setAttribute("class", !met.has(n) ? "off" : best.has(n) ? "best" : ""));
  const score = frame.best > 0 ? ` The best finished response has log π = ${fixed(data.search.logp[frame.best])}.` : " No response has ended yet.";
  const proof = !last ? "" : frame.proved ? " Every branch is closed: this is proved to be the likeliest response of all." :
    frame.proved === false ? " Some branches are still open: no proof." : " Nothing is proved: what it left behind was not looked at.";
  at("frame").textContent = `Step ${search.frame + 1} of ${frames.length}: ${met.size - 1} ${met.size === 2 ? "prefix" : "prefixes"} met${shut.size ? `, ${shut.size} closed` : ""}.${score}${proof}`;
}

function showSearches() {
  const frames = data.search.runs[search.name];
  const slider = make("input", { type: "range", min: 0, max: frames.length - 1, value: search.frame, "aria-label": "step",
    oninput: (event) => { stop(); search.frame = Number(event.target.value); showFrame(); } });
  const move = (by) => {
    search.frame = Math.min(frames.length - 1, Math.max(0, search.frame + by));
    slider.value = search.frame;
    showFrame();
  };
  const stop = () => {
    clearInterval(search.timer);
    search.timer = 0;
    play.textContent = "play";
  };
  const play = make("button", { onclick: () => {
    if (search.timer) return stop();
    if (search.frame === frames.length - 1) move(-frames.length);
    play.textContent = "stop";
    search.timer = setInterval(() => { move(1); if (search.frame === frames.length - 1) stop(); }, 250);
  } }, "play");
  at("searches").replaceChildren(
    choice("search", Object.keys(data.search.runs).map((name) => [name, name]), search.name, (name) => {
      stop();
      Object.assign(search, { name, frame: data.search.runs[name].length - 1 });
      showSearches();
      at("searches").querySelector("select").focus();
    }),
    play, make("button", { onclick: () => { stop(); move(-1); }, "aria-label": "a step back" }, "‹"), slider, make("button", { onclick: () => { stop(); move(1); }, "aria-label": "a step on" }, "›"));
  showFrame();
}

// ---- Your own text, where the page is served by a pair of models

function listen() {
  const box = ["prompt", "response"].map((name) => at(`own-${name}`));
  let timer = 0, asked = 0;
  const ask = async () => {
    const mine = ++asked, asking = { prompt: box[0].value, response: box[1].value };
    try {
      const answer = await fetch("/score", { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify(asking) });
      const found = await answer.json();
      found.prompt = asking.prompt;
      if (mine !== asked) return; // something newer is under way
      at("own-say").textContent = found.error ?? "";
      if (found.error) return;
      const known = data.responses.findIndex((of) => of.name === "yours");
      if (known < 0) data.responses.push(found);
      else data.responses[known] = found;
      shown.pair[1] = shown.pair[0] = data.responses.findIndex((of) => of.name === "yours");
      shown.seen = null;
      showChoices();
      showCredit();
    } catch (e) {
      at("own-say").textContent = "the server does not answer; is the command still running?";
    }
  };
  box[0].value = data.typed ?? "";
  for (const area of box) area.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(ask, 300); });
  at("own").hidden = false;
}

// ---- Begin

at("prompt").textContent = data.prompt;
at("intro").textContent = world
  ? "A language model is a Q-function: the text so far is a state s, and each token is an action that leads to a state s'. A token earns a reward r. V*(s) is what can still be earned from s. The advantage A* = r + V*(s') − V*(s) is what the token changed. This world is so small that all of them are known exactly. DPO saw only whole summaries, better and worse ones; what it learned for each token stands beside the truth. All values are in reward units, and rounded: the last digit of a sum may be off."
  : "Each token's implicit reward is β log(π/π_ref), of the policy π and its reference π_ref: what the policy's training made it worth. Nobody knows the exact Q* here.";
if (world) {
  at("walk").hidden = false;
  showKnobs();
  solveAgain();
} else showCredit();
showChoices();
drawTree();
search.frame = data.search.runs[search.name].length - 1;
showSearches();
addEventListener("resize", showCredit);
if (data.live) listen();
