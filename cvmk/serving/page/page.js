// The page: what is typed goes to a live stream, and what that says is shown.
import { Live } from "./live.js";
import { store, stored } from "./kept.js";
import "./theme-button.js";

const $ = (id) => document.getElementById(id);
const [text, source, target, committed, tentative] = ["text", "source", "target", "committed", "tentative"].map($);
const AUTO = "auto";
let languages = [];

const url = new URL("stream", location.href);
url.protocol = url.protocol.replace("http", "ws");
const live = new Live(url, { shown, state, opened, detected, error, latency });

// -- what the stream says -----------------------------------------------------------------------------------------------------------------
// Final sentences are elements that stay as they are, so that a screen reader reads each once.
function shown(sentences, begun, rest) {
  const parts = begun ? [...sentences, begun] : sentences;
  while (committed.childElementCount > parts.length) committed.lastElementChild.remove();
  parts.forEach((part, place) => {
    const there = committed.children[place];
    if (there?.textContent === part) return;
    const made = document.createElement("span");
    made.textContent = part;
    if (there) there.replaceWith(made);
    else committed.append(made);
  });
  const output = $("output");
  const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  tentative.textContent = text.value.trim() ? rest : "";
  if (atEnd) output.scrollTop = output.scrollHeight;
}

const STATES = {
  connecting: "Connecting…",
  open: "Connected",
  waiting: "Connection lost, trying again. Your text is kept.",
  resting: "Resting; type to go on",
  failed: "Stopped",
};
function state(name) {
  $("state").dataset.state = name;
  $("state").textContent = STATES[name];
  $("output").classList.toggle("stale", name !== "open");
}

function opened({ model, target: to }) {
  $("model").textContent = model || "–";
  if (to) $("output").lang = to;
}

function detected(code) {
  $("detected").textContent = source.value === AUTO && code ? nameOf(code) : "";
  text.lang = code;
}

function error(failure) {
  const isKey = failure !== null && ["UNAUTHENTICATED", "PERMISSION_DENIED"].includes(failure.status);
  const wasHidden = $("key-form").hidden;
  $("key-form").hidden = !isKey;
  if (isKey && wasHidden) $("key").focus();
  const words = failure === null || (isKey && failure.status === "UNAUTHENTICATED") ? "" : sentence(failure);
  if (words !== $("error-text").textContent) $("error-text").textContent = words;
  $("error").hidden = !words;
}

function sentence({ status, message }) {
  const begin = {
    RESOURCE_EXHAUSTED: "The server is busy",
    UNAVAILABLE: "The server is not available",
    INTERNAL: "The server had a problem",
    PERMISSION_DENIED: "The key was not accepted",
  }[status] ?? "The server refused this";
  return `${begin}: ${message}.`;
}

function latency(ms) {
  $("latency").textContent = ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}

// -- languages ----------------------------------------------------------------------------------------------------------------------------
const names = new Intl.DisplayNames(["en"], { type: "language" });
function nameOf(code) {
  const served = languages.find((language) => language.code === code)?.name;
  try {
    return served ?? names.of(code) ?? code;
  } catch {
    return code;
  }
}

async function load() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
    try {
      const response = await fetch("languages");
      if (!response.ok) throw new Error((await response.json()).error);
      languages = await response.json();
      error(null);
      break;
    } catch (trouble) {
      state("waiting");
      if (trouble instanceof Error && !(trouble instanceof TypeError)) error({ status: "UNAVAILABLE", message: trouble.message });
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  const options = languages.map(({ code, name }) => new Option(name, code));
  if (languages.length > 1) options.unshift(new Option("Detect language", AUTO));
  source.replaceChildren(...options);
  restore();
  choose();
}

function restore() {
  const [from, to] = (stored("languages") ?? "").split(">");
  if ([...source.options].some((option) => option.value === from)) source.value = from;
  offerTargets(to);
}

function offerTargets(wanted) {
  const able = languages.filter(({ code }) => source.value === AUTO || code === source.value);
  const codes = [...new Set(able.flatMap(({ targets }) => targets))];
  target.replaceChildren(...codes.map((code) => new Option(nameOf(code), code)));
  if (codes.includes(wanted)) target.value = wanted;
  const back = languages.find(({ code }) => code === target.value);
  $("swap").hidden = source.value === AUTO || !back?.targets.includes(source.value);
}

function choose() {
  store("languages", `${source.value}>${target.value}`);
  text.lang = source.value === AUTO ? "" : source.value;
  $("output").lang = target.value;
  $("detected").textContent = "";
  if (target.value) live.start(source.value, target.value, written());
  else error({ status: "NOT_FOUND", message: "it serves no language" });
}

source.addEventListener("change", () => { offerTargets(target.value); choose(); });
target.addEventListener("change", () => { offerTargets(target.value); choose(); });
$("swap").addEventListener("click", () => {
  const [from, to, translation] = [source.value, target.value, $("output").innerText.trim()];
  source.value = to;
  offerTargets(from);
  text.value = translation;
  choose();
  text.focus();
});

// -- text ---------------------------------------------------------------------------------------------------------------------------------
let composing = false; // by an input method: what is not chosen yet is not translated
function written() {
  const whole = text.value.replaceAll("\0", "");
  return whole.toWellFormed ? whole.toWellFormed() : whole;
}
function write() {
  if (!composing) live.write(written());
}
text.addEventListener("compositionstart", () => { composing = true; });
text.addEventListener("compositionend", () => { composing = false; write(); });
text.addEventListener("input", write);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    live.end();
  }
});
$("clear").addEventListener("click", () => { text.value = ""; live.write(""); text.focus(); });
$("copy").addEventListener("click", async () => {
  const copy = $("copy");
  try {
    await navigator.clipboard.writeText($("output").innerText.trim());
    copy.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("output")); // an insecure page may not write there: the user can
    copy.textContent = "Press Ctrl+C";
  }
  setTimeout(() => { copy.textContent = "Copy"; }, 1500);
});

// -- the rest -----------------------------------------------------------------------------------------------------------------------------
$("retry").addEventListener("click", () => { error(null); live.retry(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  live.token = $("key").value.trim();
  $("key").value = "";
  text.focus();
});
addEventListener("online", () => live.retry());
addEventListener("pagehide", () => live.rest()); // a page that may be come back to holds no place at the server
addEventListener("pageshow", (event) => { if (event.persisted) live.retry(); });

load().then(() => { if (text.value) write(); });
