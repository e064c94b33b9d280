"use strict";
// The slider of the texts, the tip of a token, and tables that sort. Text is only set as text.

const routing = document.getElementById("routing");
if (routing) showTexts(JSON.parse(routing.textContent));
document.querySelectorAll("table.sortable").forEach(makeSortable);

function showTexts(data) {
  const slider = document.getElementById("layer");
  const name = document.getElementById("layer-name");
  const tip = document.getElementById("tip");
  const blocks = [...document.querySelectorAll(".tokens")];
  const places = new Map();
  let shown = null;

  blocks.forEach((block, text) => {
    [...block.children].forEach((span, token) => places.set(span, [text, token]));
  });

  function slots(span) {
    const [text, token] = places.get(span);
    return data.texts[text][Number(slider.value)][token];
  }

  function paint() {
    for (const span of places.keys()) {
      const [expert, percent] = slots(span);
      const kept = [...span.classList].filter((c) => c === "t" || c === "empty" || c === "line");
      const step = Math.floor((Math.min(Math.max(percent, 0), 100) * data.steps + 50) / 100);
      const color = expert === undefined ? ["none"] : [data.colors[expert], "w" + step];
      span.className = [...kept, ...color].join(" ");
    }
    name.textContent = data.layers[Number(slider.value)];
    slider.setAttribute("aria-valuetext", "layer " + name.textContent);
    if (shown) showTip(shown);
  }

  function showTip(span) {
    hideTip();
    const used = slots(span);
    const lines = [];
    for (let i = 0; i < used.length; i += 2) lines.push(`expert ${used[i]}: ${used[i + 1]} %`);
    tip.textContent = lines.join("\n") || "no expert";
    tip.hidden = false;
    span.setAttribute("aria-describedby", "tip");
    const box = (span.getClientRects()[0] || span.getBoundingClientRect());
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = window.scrollX + Math.max(8, Math.min(box.left, most)) + "px";
    const above = box.top - tip.offsetHeight - 6;
    tip.style.top = window.scrollY + (above > 0 ? above : box.bottom + 6) + "px";
    shown = span;
  }

  function hideTip() {
    if (shown) shown.removeAttribute("aria-describedby");
    tip.hidden = true;
    shown = null;
  }

  function move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const turn = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (!places.has(event.target) || (!step && !turn)) return;
    event.preventDefault();
    if (turn) {
      slider.value = String(Number(slider.value) + turn);
      paint();
      return;
    }
    const next = step > 0 ? event.target.nextElementSibling : event.target.previousElementSibling;
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  slider.addEventListener("input", paint);
  for (const block of blocks) {
    block.addEventListener("pointerover", (e) => places.has(e.target) && showTip(e.target));
    block.addEventListener("pointerleave", hideTip);
    block.addEventListener("focusin", (e) => places.has(e.target) && showTip(e.target));
    block.addEventListener("focusout", hideTip);
    block.addEventListener("keydown", move);
  }
  paint();
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const value = (row) => Number(row.cells[column].dataset.value);
      const rows = [...body.rows].sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)));
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}
