// Runs before the first paint, so that a chosen theme does not flash. Without a choice the system's holds.
"use strict";
(() => {
  const themes = ["auto", "light", "dark"];
  const read = () => {
    try {
      return localStorage.getItem("amoe-theme");
    } catch {
      return null; // a browser may forbid it
    }
  };
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `theme: ${theme}`;
    document.dispatchEvent(new Event("themechange"));
  };
  const stored = read();
  apply(themes.includes(stored) ? stored : "auto");
  document.addEventListener("DOMContentLoaded", () => {
    apply(document.documentElement.dataset.theme);
    document.getElementById("theme").addEventListener("click", () => {
      const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
      try {
        localStorage.setItem("amoe-theme", next);
      } catch {
        // The choice lasts as long as the page.
      }
      apply(next);
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    document.dispatchEvent(new Event("themechange"));
  });
})();
