// Runs before the first paint, so that no page flashes in the wrong light.
(() => {
  const stored = localStorage.getItem("sfumato-theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = localStorage.getItem("sfumato-theme") ?? (dark.matches ? "dark" : "light");
  };
  if (stored !== "light" && stored !== "dark") localStorage.removeItem("sfumato-theme");
  apply();
  dark.addEventListener("change", apply);
})();
