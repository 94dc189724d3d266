"use strict";
// Draws the figures of every section and connects them, and all elements with data-run, to its switches.

function connect(study) {
  const panel = study.querySelector(".switches");
  const runs = [...study.querySelectorAll("input[data-switch=run]")];
  const groups = [...study.querySelectorAll("input[data-switch=group]")];
  const views = [];

  const members = (group) => runs.filter((box) => box.dataset.group === group.value);
  const off = (boxes) => boxes.filter((box) => !box.checked).map((box) => Number(box.value));

  function apply() {
    for (const group of groups) {
      const own = members(group), on = own.filter((box) => box.checked).length;
      group.checked = on > 0;
      const count = group.closest("fieldset").querySelector("summary");
      if (count) count.textContent = `${on} of ${own.length}`;
    }
    const hidden = off(runs), hiddenGroups = off(groups);
    for (const element of study.querySelectorAll("[data-run]"))
      element.hidden = element.dataset.run.split(" ").every((run) => hidden.includes(Number(run)));
    for (const view of views) view.signal("hidden", hidden).signal("hidden_groups", hiddenGroups).runAsync();
    window.dispatchEvent(new Event("resize")); // a hidden figure has no width
  }

  async function draw(figure) {
    const [place, spec] = [".plot", "script"].map((part) => figure.querySelector(part));
    const options = { actions: false, ast: true, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true }, logLevel: 1 };
    views.push((await vegaEmbed(place, JSON.parse(spec.textContent), options)).view);
  }

  for (const box of runs) box.addEventListener("change", apply);
  for (const group of groups)
    group.addEventListener("change", () => {
      const own = members(group), first = own.filter((box) => box.defaultChecked);
      for (const box of own) box.checked = false;
      if (group.checked) for (const box of first.length ? first : own) box.checked = true;
      apply();
    });
  if (panel) {
    panel.hidden = false;
    panel.open = !window.matchMedia("(max-width: 600px)").matches;
  }
  apply();
  return async () => {
    for (const figure of study.querySelectorAll("figure")) await draw(figure);
    apply();
  };
}

const drawings = [...document.querySelectorAll(".study")].map(connect);
(async () => {
  for (const drawing of drawings) await drawing();
  document.documentElement.dataset.ready = "";
})();
