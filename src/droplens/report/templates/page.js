"use strict";
(() => {
  const root = document.documentElement;
  const button = document.querySelector("button.theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  // Storage may be refused to pages opened from disk; the page then forgets the choice.
  const remembered = () => {
    try { return localStorage.getItem("droplens-theme"); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem("droplens-theme", theme); } catch { /* forgotten */ }
  };
  const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  const label = () => {
    const next = current() === "dark" ? "light" : "dark";
    button.querySelector(".theme-name").textContent = next === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Switch to the ${next} theme`);
  };

  const stored = remembered();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = current() === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  label();

  // Charts wait until they come near the window: a long page opens at once.
  const draw = (figure) => {
    const specification = JSON.parse(figure.querySelector(".specification").textContent);
    figure.classList.add("live");
    return window
      .vegaEmbed(figure.querySelector(".interactive"), specification, {
        renderer: "svg",
        actions: false,
        ast: true,
        tooltip: { disableDefaultStyle: true },
      })
      .catch((error) => {
        figure.classList.remove("live"); // the static picture stays
        console.error(error);
      });
  };
  const waiting = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((one) => one.isIntersecting)) {
        waiting.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  for (const figure of document.querySelectorAll("figure.chart")) waiting.observe(figure);
})();
