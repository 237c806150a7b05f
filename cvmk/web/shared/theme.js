"use strict";
// Read before the page is drawn, so that it never shows in the other colours first.
{
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* no storage: the system's colours */ }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
