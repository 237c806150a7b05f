// The button #theme: colours as the system has them, until others are chosen.
import { store } from "./kept.js";

const button = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
function showTheme() {
  const isDark = (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  button.setAttribute("aria-pressed", String(isDark));
}
button.addEventListener("click", () => {
  const chosen = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  store("theme", chosen);
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();
