"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // make("label", {className: "x"}, "text", child) saves innerHTML, so that no name becomes markup.
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key.includes("-") || key === "role") element.setAttribute(key, value);
      else element[key] = value;
    }
    element.append(...children);
    return element;
  }

  function save(name, type, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- light and dark -------------------------------------------------------------------------
  function remembered(value) {
    try { // files opened from a disk may have no storage
      if (value) localStorage.setItem("medseg-report-theme", value);
      return localStorage.getItem("medseg-report-theme");
    } catch { return null; }
  }

  function setUpTheme() {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const kept = remembered();
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
    const button = make("button", { type: "button", id: "theme" });
    const show = () => {
      button.textContent = isDark() ? "Light page" : "Dark page";
    };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remembered(root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    show();
    const print = make("button", { type: "button" }, "Print");
    print.addEventListener("click", () => window.print());
    document.getElementById("page-tools").append(button, print);
    // What is folded away would be missing on paper.
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = all("details:not([open])");
      opened.forEach((one) => { one.open = true; });
    });
    addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
  }

  // ---- tables: sort, filter, save -------------------------------------------------------------
  function compareCells(a, b) {
    const [x, y] = [a.dataset.value, b.dataset.value];
    if (x !== undefined && y !== undefined) return Number(x) - Number(y);
    return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  }

  const isNothing = (cell) => cell.dataset.value === undefined && cell.textContent.trim() === "–";

  function sortBy(table, index) {
    const heads = all("thead th", table);
    const down = heads[index].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[index].setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [a.cells[index], b.cells[index]];
      if (isNothing(x) !== isNothing(y)) return isNothing(x) ? 1 : -1; // always last
      return down ? compareCells(y, x) : compareCells(x, y);
    });
    body.append(...rows);
  }

  function filter(table, text, told) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      const content = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    told.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  }

  function asCsv(table) {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const rows = [...table.rows].filter((row) => !row.hidden);
    const line = (row) => [...row.cells].map((cell) => quoted(cell.textContent.trim())).join(",");
    return rows.map(line).join("\n") + "\n";
  }

  // Scroll bars hide on many screens, and what is cut off at the edge of a column or row looks whole.
  function tellOfMore(area) {
    const told = make("p", { className: "note more" });
    area.before(told);
    const show = () => {
      const aside = area.scrollWidth > area.clientWidth ? "Scroll sideways: there are more columns. " : "";
      const below = area.scrollHeight > area.clientHeight ? "Scroll down: there are more rows." : "";
      told.textContent = aside + below;
      told.hidden = !told.textContent;
    };
    new ResizeObserver(show).observe(area);
    show();
  }

  function setUpTable(box) {
    const table = box.querySelector("table");
    all("thead th", table).forEach((head, index) => {
      const button = make("button", { type: "button" }, head.textContent.trim());
      button.addEventListener("click", () => sortBy(table, index));
      head.replaceChildren(button);
    });
    tellOfMore(box.querySelector(".scroll"));
    if (table.tBodies[0].rows.length < 2) return;
    const told = make("output", { "aria-live": "polite" });
    const caption = table.caption.textContent;
    const field = make("input", { type: "search", placeholder: "words in a row", "aria-label": `Filter: ${caption}` });
    field.addEventListener("input", () => filter(table, field.value, told));
    const button = make("button", { type: "button", "aria-label": `Save rows as CSV: ${caption}` }, "Save rows as CSV");
    button.addEventListener("click", () => save(`${box.dataset.name}.csv`, "text/csv", asCsv(table)));
    box.prepend(make("div", { className: "tools" }, make("label", {}, "Filter ", field), told, button));
    filter(table, "", told);
  }

  // ---- figures --------------------------------------------------------------------------------
  function setUpFigure(figure) {
    const button = make("button", { type: "button" }, "Save as SVG");
    button.setAttribute("aria-label", `Save as SVG: ${figure.dataset.name}`);
    button.addEventListener("click", () => {
      const text = new XMLSerializer().serializeToString(figure.querySelector("svg"));
      save(`${figure.dataset.name}.svg`, "image/svg+xml", text);
    });
    figure.append(button);
  }

  // ---- pictures: a slider between two methods, and a zoom ---------------------------------------
  function setUpPanel(panel) {
    const views = all(".view", panel);
    const names = views.map((view) => view.dataset.name);
    const title = panel.querySelector("h3").textContent;
    const side = (which) => {
      const picture = make("img", { alt: "" });
      const layer = make("div", { className: `layer ${panel.dataset.image}` }, picture);
      const tag = make("span", { className: `tag ${which}` });
      return { picture, layer, tag, box: make("div", { className: "side" }, layer) };
    };
    const [left, right] = [side("left"), side("right")];
    const handle = make("div", { className: "handle" });
    const help = "arrow keys move the slider, or the picture when it is zoomed; + and - zoom; 0 resets";
    const stage = make(
      "div",
      { className: "stage", tabIndex: 0, role: "group", "aria-label": `${title}: ${help}` },
      left.box, right.box, handle, left.tag, right.tag,
    );
    const choice = (one, start, label) => {
      const select = make("select", { "aria-label": label }, ...names.map((name) => make("option", {}, name)));
      select.selectedIndex = start;
      const show = () => {
        const view = views[select.selectedIndex];
        one.picture.src = view.querySelector("img").src;
        one.picture.alt = view.querySelector("img").alt;
        // With the places where a long name may break.
        one.tag.replaceChildren(...view.querySelector("figcaption b").cloneNode(true).childNodes);
      };
      select.addEventListener("change", show);
      show();
      return select;
    };
    const range = (min, max, step, value) =>
      make("input", { type: "range", min, max, step, value });
    const split = range(0, 100, 1, 50);
    const zoom = range(1, 8, 0.5, 1);
    let [x, y] = [0, 0]; // of the picture's corner, in shares of the stage

    function draw() {
      const scale = Number(zoom.value);
      x = Math.min(0, Math.max(1 - scale, x));
      y = Math.min(0, Math.max(1 - scale, y));
      right.box.style.clipPath = `inset(0 0 0 ${split.value}%)`;
      handle.style.left = `${split.value}%`;
      for (const one of [left, right]) {
        one.layer.style.transform = `translate(${100 * x}%, ${100 * y}%) scale(${scale})`;
      }
      stage.classList.toggle("zoomed", scale > 1);
      zoom.setAttribute("aria-valuetext", `${scale} times`);
      split.setAttribute("aria-valuetext", `${split.value} % ${left.tag.textContent}`);
    }

    function zoomTo(scale) {
      const [before, after] = [Number(stage.dataset.scale || 1), Math.min(8, Math.max(1, scale))];
      // The middle of what is seen stays in the middle.
      x = 0.5 - ((0.5 - x) * after) / before;
      y = 0.5 - ((0.5 - y) * after) / before;
      zoom.value = after;
      stage.dataset.scale = after;
      draw();
    }

    function onKey(event) {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const scale = Number(zoom.value);
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "+" || event.key === "=") zoomTo(scale + 0.5);
      else if (event.key === "-") zoomTo(scale - 0.5);
      else if (event.key === "0") { split.value = 50; zoomTo(1); }
      else if (step && scale > 1) { x -= step[0] * 0.1; y -= step[1] * 0.1; draw(); }
      else if (step && step[0]) { split.value = Number(split.value) + 5 * step[0]; draw(); }
      else return;
      event.preventDefault();
    }

    function onDrag(event) {
      if (!(event.buttons & 1)) return;
      const box = stage.getBoundingClientRect();
      if (Number(zoom.value) > 1) {
        x += event.movementX / box.width;
        y += event.movementY / box.height;
      } else split.value = (100 * (event.clientX - box.left)) / box.width;
      draw();
    }

    stage.addEventListener("keydown", onKey);
    stage.addEventListener("pointermove", onDrag);
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      onDrag(event);
    });
    split.addEventListener("input", draw);
    zoom.addEventListener("input", () => zoomTo(Number(zoom.value)));
    const controls = make(
      "div",
      { className: "controls" },
      make("label", {}, "Left", choice(left, Math.min(2, names.length - 1), "Left")),
      make("label", {}, "Right", choice(right, names.length > 3 ? 3 : 0, "Right")),
      make("label", {}, "Slider", split),
      make("label", {}, "Zoom", zoom),
    );
    all("select", controls).forEach((one) => one.addEventListener("change", draw));
    panel.insertBefore(make("div", { className: "compare" }, stage, controls), panel.querySelector(".views"));
    draw();
  }

  setUpTheme();
  all(".table").forEach(setUpTable);
  all(".drawing").forEach(setUpFigure);
  all(".panel").forEach(setUpPanel);
})();
