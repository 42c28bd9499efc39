"use strict";
const number = (text) => { const found = parseFloat(text.replace(/,/g, "").replace("\u2212", "-")); return Number.isNaN(found) ? null : found; };

// Tables: a click on a heading sorts by its column, the best first, or the worst where cases are looked for; another turns it.
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells];
  const sort = (column, down) => {
    const value = (row) => column === 0 ? row.cells[0].textContent.trim() : number((row.cells[column].querySelector("span") || row.cells[column]).textContent);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
    heads.forEach((head, index) => index === column ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now ? now === "ascending" : head.dataset.first === "high");
    });
  });
  table.sortBy = sort;
}

// Cases: one measure at a time, the case with the worst score in any row first.
const cases = document.getElementById("cases"), measure = document.getElementById("measure");
if (cases && measure) measure.addEventListener("change", () => {
  const index = measure.selectedIndex, high = measure.selectedOptions[0].dataset.better === "high";
  const worst = (row) => {
    const found = [...row.cells].slice(cases.dataset.skip).map((cell) => number(cell.textContent)).filter((value) => value !== null);
    return found.length ? (high ? Math.min(...found) : -Math.max(...found)) : Infinity;
  };
  for (const cell of cases.tBodies[0].querySelectorAll("td[data-v]")) cell.textContent = cell.dataset.v.split(" ")[index];
  for (const head of cases.tHead.rows[0].cells) { if (head.cellIndex >= cases.dataset.skip) head.dataset.first = high ? "low" : "high"; head.removeAttribute("aria-sort"); }
  cases.tBodies[0].append(...[...cases.tBodies[0].rows].sort((a, b) => worst(a) - worst(b)));
});

// Points: a tap names the case, where there is no mouse to point with.
for (const figure of document.querySelectorAll("figure")) figure.addEventListener("click", (event) => {
  const title = event.target.closest("use")?.querySelector("title"), told = figure.querySelector("output");
  if (title && told) told.textContent = title.textContent;
});

// Slices: one at a time, outlines switched on and off, the window of intensities, the close-up.
for (const viewer of document.querySelectorAll(".viewer")) {
  const data = JSON.parse(viewer.querySelector("script").textContent), one = (name) => viewer.querySelector(name);
  const image = one("image"), view = one("svg svg"), slider = one("[name=slice]"), told = one("[name=place]");
  const whole = view.getAttribute("viewBox"), [, , width, height] = view.getAttribute("viewBox").split(" ").map(Number);
  const show = () => {
    const at = slider ? Number(slider.value) : 0;
    image.setAttribute("href", data.images[at]);
    for (const path of viewer.querySelectorAll("path")) path.setAttribute("d", (path.dataset.row === undefined ? data[path.dataset.kind] : data.predictions[path.dataset.row])[at]);
    if (told) told.textContent = data.slices[at];
  };
  const shade = () => {
    const level = one("[name=level]").value / 100, span = one("[name=width]").value / 100;
    for (const part of viewer.querySelectorAll("feFuncR, feFuncG, feFuncB")) { part.setAttribute("slope", 1 / span); part.setAttribute("intercept", 0.5 - level / span); }
    const [low, high] = data.window, real = (share) => (share * (high - low)).toPrecision(3) * 1;
    one("[name=shades]").textContent = `level ${(low + level * (high - low)).toPrecision(3) * 1}, width ${real(span)}`;
  };
  slider?.addEventListener("input", show);
  for (const name of ["level", "width"]) one(`[name=${name}]`).addEventListener("input", shade);
  for (const box of viewer.querySelectorAll("[data-path]")) box.addEventListener("change", () => {
    one(`path.${box.dataset.path}`).classList.toggle("off", !box.checked);
    box.closest("label").classList.toggle("off", !box.checked);
  });
  one("[name=close]").addEventListener("change", (event) => {
    const [x, y, w, h] = data.close, close = [x, y * data.aspect, w, h * data.aspect];
    view.setAttribute("viewBox", event.target.checked ? close.join(" ") : whole);
    const scale = event.target.checked ? Math.min(width / close[2], height / close[3]) : 1;
    if (data.bar) one(".bar rect").setAttribute("width", (1000 * data.bar[1] * scale) / width);
  });
  shade();
}
