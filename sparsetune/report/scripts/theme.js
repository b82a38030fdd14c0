// Light, dark, or what the system says; the choice is kept where the browser lets a page keep something.

const THEMES = ["auto", "light", "dark"];

function storedTheme() {
  try {
    const found = localStorage.getItem("sparsetune-theme");
    return THEMES.includes(found) ? found : "auto";
  } catch {
    return "auto"; // a sandboxed frame, such as MLflow's
  }
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = translate(`theme_${theme}`);
  byId("theme").dataset.value = theme;
}

function startTheme(repaint) {
  setTheme(storedTheme());
  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(byId("theme").dataset.value) + 1) % THEMES.length];
    setTheme(next);
    try {
      localStorage.setItem("sparsetune-theme", next);
    } catch {
      // Not kept, then.
    }
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
}
