// What a browser keeps for a page, where it keeps anything.
export function stored(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}
export function store(name, value) {
  try { localStorage.setItem(name, value); } catch { /* no storage: forgotten with the page */ }
}
