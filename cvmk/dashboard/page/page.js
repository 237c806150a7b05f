// The page: asks the server what is new, once a second, and shows it.
import { Chart, element, swatch } from "./chart.js";
import { ago, clock, number, place } from "./format.js";
import { store, stored } from "./kept.js";
import { Series } from "./series.js";
import "./theme-button.js";

const $ = (id) => document.getElementById(id);
const POLL = 1000;
const HIDDEN_POLL = 5000;
const LOADING_POLL = 250;
const CHOSEN_AT_FIRST = 8;
const MARKS_LISTED = 200;
const NOT_SMOOTHED = new Set(["validation", "epoch"]);

const kept = (() => {
  try { return JSON.parse(stored("dashboard") ?? "{}") ?? {}; } catch { return {}; }
})();
const view = {
  axis: kept.axis === "time" ? "time" : "step",
  smoothing: typeof kept.smoothing === "number" ? kept.smoothing : 0,
  log: new Set(Array.isArray(kept.log) ? kept.log : []),
  choices: new Map(Array.isArray(kept.choices) ? kept.choices : []), // by folder, as they were clicked
  window: null,
};
const chosenAtFirst = new Map();
let answer = null;
let [asked, version] = ["", ""];
const charts = new Map();
const groups = new Map();

function keep() {
  store("dashboard", JSON.stringify({ axis: view.axis, smoothing: view.smoothing, log: [...view.log], choices: [...view.choices].slice(-500) }));
}

// -- the server -----------------------------------------------------------------------------------------------------------------------------
let timer = 0;
let asking = null;

async function ask() {
  clearTimeout(timer);
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  const timeout = setTimeout(() => mine.abort("late"), 15_000);
  let wait = document.hidden ? HIDDEN_POLL : POLL;
  try {
    const query = question();
    const since = query === asked ? `&since=${version}` : "";
    const response = await fetch(`data?${query}${since}`, { signal: mine.signal, cache: "no-store" });
    if (!response.ok) throw new Error(await response.text());
    const found = await response.json();
    state("open", `Connected, ${new Date().toLocaleTimeString()}`);
    if (found.runs) {
      if (found.version.split(".")[0] !== version.split(".")[0]) chosenAtFirst.clear(); // another server: other numbers of runs
      [answer, asked, version] = [found, query, found.version];
      show();
      if (question() !== query) wait = 0;
    } else {
      answer.now = found.now;
      showTimes();
    }
    if (Object.values(answer.runs).some((run) => run.progress < 1)) wait = Math.min(wait, LOADING_POLL);
  } catch (trouble) {
    if (mine !== asking) return; // another question took its place
    state("waiting", "The dashboard's server does not answer; trying again. What is shown is what was last known.");
    version = "";
  } finally {
    clearTimeout(timeout);
  }
  if (mine === asking) timer = setTimeout(ask, wait);
}

function question() {
  const query = new URLSearchParams({ axis: axis(), points: String(Math.min(800, Math.max(200, Math.round(innerWidth / 3)))) });
  if (view.window) {
    query.set("from", view.window[0]);
    query.set("to", view.window[1]);
  }
  if (answer) query.set("runs", runs().filter((run) => run.chosen).map((run) => run.key).join());
  return query.toString();
}

// Services have no iterations: alone they are shown over time.
function axis() {
  const chosen = answer ? runs().filter((run) => run.chosen) : [];
  return chosen.some((run) => run.extent.time) && !chosen.some((run) => run.extent.step) ? "time" : view.axis;
}

let lastAxis = view.axis;
function showAxis() {
  const now = axis();
  if (now !== lastAxis) view.window = null;
  lastAxis = now;
  for (const radio of document.querySelectorAll("[name=axis]")) {
    radio.checked = radio.value === now;
    radio.disabled = now !== view.axis && radio.value !== now;
  }
}

function state(name, words) {
  $("state").dataset.state = name;
  if ($("state").textContent !== words) {
    if (name === "open") $("state").removeAttribute("role"); // the time is not announced every second; that the server went, is
    else $("state").setAttribute("role", "status");
    $("state").textContent = words;
  }
  document.body.classList.toggle("stale", name !== "open");
}

// -- runs -----------------------------------------------------------------------------------------------------------------------------------
function runs() {
  const all = Object.entries(answer.runs).map(([key, run]) => ({ ...run, key, place: Number(key) }));
  const main = all.filter((run) => !run.nested);
  for (const run of all) {
    if (chosenAtFirst.has(run.folder)) continue;
    const hasMain = main.some((other) => other.extent.step);
    if (!run.nested) chosenAtFirst.set(run.folder, main.indexOf(run) < CHOSEN_AT_FIRST);
    else if (hasMain || run.extent.step) { // a teacher, while there is nothing else to see; trials of a search, which has no numbers of its own
      chosenAtFirst.set(run.folder, !hasMain && [...chosenAtFirst.values()].filter(Boolean).length < CHOSEN_AT_FIRST);
    }
  }
  return all.map((run) => ({ ...run, chosen: view.choices.get(run.folder) ?? chosenAtFirst.get(run.folder) ?? false }));
}

function choose(chosen, on) {
  for (const run of chosen) view.choices.set(run.folder, on);
  keep();
  show();
  ask();
}

function showRuns(all) {
  const rows = new Map([...$("runs").children].map((row) => [row.dataset.key, row]));
  for (const run of all) {
    let row = rows.get(run.key);
    if (row?.dataset.folder !== run.folder) {
      row?.remove();
      const box = element("input", { type: "checkbox" });
      box.addEventListener("change", () => choose(runs().filter((other) => other.folder === run.folder), box.checked));
      row = element("tr", { "data-key": run.key, "data-folder": run.folder },
        element("th", { scope: "row" }, element("label", { title: run.folder }, box, swatch(run), element("span", { class: "name" }))),
        ...["brief", "number", "number", "number", "number", "brief"].map((name) => element("td", { class: name })));
      $("runs").append(row);
    }
    rows.delete(run.key);
    row.classList.toggle("off", !run.chosen);
    row.querySelector("input").checked = run.chosen;
    fill(row, run);
  }
  for (const row of rows.values()) row.remove();
  const count = all.filter((run) => run.chosen).length;
  $("all").checked = count === all.length;
  $("all").indeterminate = count > 0 && count < all.length;
  document.title = all.length === 1 ? `${all[0].name} – run` : `${all.length} runs`;
}

const STATES = { waiting: "no events yet", running: "running" };
function fill(row, run) {
  const age = run.time === null ? null : Math.max(0, answer.now - run.time);
  const stateOf = run.state === "running" && age > 300 ? `silent for ${ago(age).replace(" ago", "")}` : STATES[run.state] ?? run.state;
  const cells = [
    run.progress < 1 ? `reading, ${Math.floor(100 * run.progress)} %` : stateOf,
    run.extent.step ? number(run.step) + (run.iterations ? ` of ${number(run.iterations)}` : "") : "–",
    number(run.last.loss),
    run.best ? `${run.best.metric} ${number(run.best.value)}` : "–",
    number(run.last.tokens_per_second === undefined ? undefined : Math.round(run.last.tokens_per_second)),
    age === null ? "–" : ago(age),
  ];
  row.querySelector(".name").textContent = run.name;
  cells.forEach((text, at) => { if (row.cells[at + 1].textContent !== text) row.cells[at + 1].textContent = text; });
}

function showTimes() {
  for (const run of runs()) {
    const row = [...$("runs").children].find((one) => one.dataset.key === run.key);
    if (row) fill(row, run);
  }
}

$("all").addEventListener("change", () => choose(runs(), $("all").checked));

// -- charts ---------------------------------------------------------------------------------------------------------------------------------
function whole(chosen) {
  const ends = chosen.map((run) => run.extent[answer.axis]).filter(Boolean);
  if (!ends.length) return [0, 1];
  const [low, high] = [Math.min(...ends.map(([first]) => first)), Math.max(...ends.map(([, last]) => last))];
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

const page = {
  zoom(window) {
    const [low, high] = whole(runs().filter((run) => run.chosen));
    const wide = window && [Math.max(low, window[0]), Math.min(high, window[1])];
    view.window = wide && wide[0] < wide[1] && (wide[0] > low || wide[1] < high) ? wide : null;
    show();
    ask();
  },
  pan(share) {
    if (!view.window) return;
    const [low, high] = whole(runs().filter((run) => run.chosen));
    const by = Math.min(high - view.window[1], Math.max(low - view.window[0], share * (view.window[1] - view.window[0])));
    page.zoom(view.window.map((end) => end + by));
  },
  point(x, chart) {
    for (const one of charts.values()) one.point(x, one === chart);
  },
  toggleLog(key) {
    if (!view.log.delete(key)) view.log.add(key);
    keep();
    show();
  },
};

function show() {
  if (!answer) return;
  const all = runs();
  const chosen = all.filter((run) => run.chosen);
  showAxis();
  showRuns(all);
  showProblems(all);
  const window = view.window ?? whole(chosen);
  const marks = chosen.flatMap((run) => (answer.marks[run.key] ?? []).map((mark) => ({ run, mark })));
  let shown = 0;
  for (const spec of answer.charts) {
    const series = chosen.flatMap((run) => {
      const columns = answer.shown[run.key]?.[spec.table];
      return columns?.fields[spec.key] ? [new Series(run, columns, spec.key)] : [];
    });
    const isUsed = series.length > 0 && !(spec.is_part && series.every((one) => one.mean.every((value) => !value)));
    if (isUsed) {
      const smoothing = NOT_SMOOTHED.has(spec.table) ? 0 : view.smoothing;
      const own = marks.filter(({ mark }) => !mark.chart || mark.chart === spec.key);
      chartOf(spec).show(series, { axis: answer.axis, window, log: view.log.has(spec.key), smoothing, marks: own });
    }
    if (charts.has(spec.key)) charts.get(spec.key).figure.hidden = !isUsed;
    shown += isUsed;
  }
  for (const [key, chart] of charts) if (!answer.charts.some((spec) => spec.key === key)) chart.figure.hidden = true;
  for (const group of groups.values()) group.hidden = ![...group.querySelectorAll("figure")].some((figure) => !figure.hidden);
  $("nothing").hidden = shown > 0;
  $("nothing").textContent = chosen.length ? "No numbers yet: charts appear with the first iterations that the run logs." : "No run is chosen.";
  $("reset").disabled = view.window === null;
  $("shown").textContent = view.window ? `${place(window[0], answer.axis)} to ${place(window[1], answer.axis)}` : "";
  showMarks(marks);
  showSamples(chosen);
}

function chartOf(spec) {
  if (!charts.has(spec.key)) {
    const chart = new Chart(spec, page);
    charts.set(spec.key, chart);
    if (!groups.has(spec.group)) {
      const made = element("section", { class: "group", "aria-label": spec.group }, element("h2", {}, spec.group), element("div", { class: "grid" }));
      made.dataset.order = answer.groups.indexOf(spec.group);
      groups.set(spec.group, made);
      const after = [...$("charts").children].find((other) => Number(other.dataset.order) > Number(made.dataset.order));
      $("charts").insertBefore(made, after ?? null);
    }
    groups.get(spec.group).querySelector(".grid").append(chart.figure);
  }
  return charts.get(spec.key);
}

// -- what is beside the charts --------------------------------------------------------------------------------------------------------------
function showProblems(all) {
  const problems = all.flatMap((run) => run.problems.map((problem) => `${run.name}: ${problem}`));
  if (answer.left_out) problems.push(`${answer.left_out} more runs are left out: name fewer folders`);
  const words = problems.join("\n");
  if ($("problems").dataset.words !== words) {
    $("problems").dataset.words = words;
    $("problems").replaceChildren(...problems.map((problem) => element("li", {}, problem)));
  }
  $("problems").hidden = !problems.length;
}

let [lastMarks, lastSamples] = ["", ""];
function showMarks(marks) {
  const listed = marks.toSorted((a, b) => b.mark.time - a.mark.time).slice(0, MARKS_LISTED);
  const now = JSON.stringify(listed.map(({ run, mark }) => [run.key, mark.time, mark.step, mark.text]));
  $("happened").hidden = !listed.length;
  if (now === lastMarks) return;
  lastMarks = now;
  $("marks").replaceChildren(...listed.map(({ run, mark }) => element("tr", {},
    element("td", { class: "brief" }, clock(mark.time)), element("td", {}, run.name), element("td", { class: "number" }, number(mark.step)),
    element("td", { class: mark.trouble ? "bad" : "" }, mark.text))));
}

// Runs that translated the same sentence stand below each other.
function showSamples(chosen) {
  const bySource = new Map();
  for (const run of chosen) {
    for (const { source = "", reference = "", hypothesis = "" } of answer.samples[run.key]?.samples ?? []) {
      const key = `${source}\n${reference}`;
      if (!bySource.has(key)) bySource.set(key, { source, reference, said: [] });
      bySource.get(key).said.push({ run, hypothesis, step: answer.samples[run.key].step });
    }
  }
  const now = JSON.stringify([...bySource].map(([key, { said }]) => [key, said.map(({ run, hypothesis, step }) => [run.key, run.name, hypothesis, step])]));
  $("samples").hidden = !bySource.size;
  if (now === lastSamples) return;
  lastSamples = now;
  const row = (term, text) => [element("dt", {}, ...term), element("dd", { dir: "auto" }, text)];
  $("sample-list").replaceChildren(...[...bySource.values()].slice(0, 40).map(({ source, reference, said }) => element("div", { class: "sample" }, element("dl", {},
    ...row(["Source"], source), ...row(["Reference"], reference),
    ...said.flatMap(({ run, hypothesis, step }) => row([swatch(run), `${run.name}, ${number(step)}`], hypothesis))))));
}

// -- controls -------------------------------------------------------------------------------------------------------------------------------
for (const radio of document.querySelectorAll("[name=axis]")) {
  radio.checked = radio.value === view.axis;
  radio.addEventListener("change", () => {
    [view.axis, view.window, lastAxis] = [radio.value, null, radio.value];
    keep();
    page.point(null, null);
    ask();
  });
}
function showSmoothing() {
  $("smoothing").value = view.smoothing;
  $("smoothing-value").textContent = view.smoothing ? view.smoothing.toFixed(2) : "off";
}
$("smoothing").addEventListener("input", () => {
  view.smoothing = Number($("smoothing").value);
  showSmoothing();
  keep();
  show();
});
$("reset").addEventListener("click", () => page.zoom(null));
$("controls").addEventListener("submit", (event) => event.preventDefault());
showSmoothing();

const redraw = () => { for (const chart of charts.values()) chart.draw(); };
new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
addEventListener("online", ask);
ask();
