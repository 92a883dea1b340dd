/* <cache-size>: how large is the cache of keys and values?

   Inside the element stands a plain table of known models, one row each, with the columns model, layers, heads,
   key-value heads, head size and source. It stays as it is; the sliders are put above it, and a choice of a model
   sets them. Nothing is loaded and nothing is stored. */

(() => {
  "use strict";

  const STYLE = `
    :host { display: block; margin: 1rem 0; color: var(--pst-color-text-base, #222); font-size: 0.9rem; }
    .controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.4rem 1.5rem; }
    label { display: grid; grid-template-columns: 1fr auto; gap: 0 0.5rem; }
    label :is(input, select) { grid-column: 1 / -1; width: 100%; box-sizing: border-box; }
    input, select { font: inherit; color: inherit; accent-color: var(--pst-color-primary, #0a7d91); }
    select { background: var(--pst-color-surface, #f5f5f5); border: 1px solid var(--pst-color-border, #767676);
      border-radius: 4px; padding: 0.15rem 0.5rem; }
    :is(input, select):focus-visible { outline: 3px solid var(--pst-color-primary, #0a7d91); outline-offset: 1px; }
    .value, td { font-variant-numeric: tabular-nums; }
    table { width: 100%; border-collapse: collapse; margin: 0.7rem 0 0; }
    caption { text-align: left; font-weight: 600; padding-bottom: 0.2rem; }
    th { text-align: left; font-weight: 400; padding: 3px 8px 3px 0; width: 12rem; }
    td { padding: 3px 0; }
    td.size { text-align: right; white-space: nowrap; padding-left: 8px; width: 6rem; }
    .bar { height: 0.9rem; min-width: 2px; background: var(--pst-color-primary, #0a7d91); border-radius: 2px; }
    tr.chosen th { font-weight: 700; }
    tr:not(.chosen) .bar { opacity: 0.55; }
    .said { margin: 0.5rem 0 0.8rem; min-height: 3em; }`;

  const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const PRECISIONS = [[4, "32 bits"], [2, "16 bits"], [1, "8 bits"]];

  /* A key and a value of d numbers, for each layer, key-value head, token and sequence. */
  const cacheBytes = (s, kvHeads) => 2 * s.layers * kvHeads * s.headSize * s.length * s.batch * s.bytes;

  const readable = (bytes) => {
    const power = bytes < 1024 ? 0 : Math.min(Math.floor(Math.log2(bytes) / 10), UNITS.length - 1);
    const value = bytes / 1024 ** power;
    return `${power === 0 || value >= 100 ? Math.round(value) : value.toPrecision(3)} ${UNITS[power]}`;
  };

  const divisors = (n) => Array.from({ length: n }, (_, i) => i + 1).filter((k) => n % k === 0);
  const grouped = (n) => n.toLocaleString("en-US");

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const kindOf = (s) => (s.kvHeads === s.heads ? "multi-head" : s.kvHeads === 1 ? "multi-query" : "grouped-query");

  class CacheSize extends HTMLElement {
    connectedCallback() {
      const rows = [...this.querySelectorAll("tbody tr")];
      if (this.shadowRoot || rows.length === 0) return;
      this.models = rows.map((row) => {
        const [name, ...numbers] = [...row.children].map((cell) => cell.textContent.trim());
        const [layers, heads, kvHeads, headSize] = numbers.map(Number);
        return { name, layers, heads, kvHeads, headSize };
      });
      this.attachShadow({ mode: "open" });
      this.shadowRoot.append(element("style", {}, STYLE), this.makeControls(), this.makeBars(), this.makeSentence(), element("slot"));
      this.take(Math.max(this.models.findIndex((model) => model.name === this.dataset.model), 0));
    }

    makeControls() {
      const slider = (min, max) => element("input", { type: "range", min, max, step: 1 });
      this.model = element("select", {}, ...this.models.map((model, i) => element("option", { value: i }, model.name)),
        element("option", { value: -1 }, "none of these"));
      this.precision = element("select", {}, ...PRECISIONS.map(([bytes, name]) => element("option", { value: bytes }, name)));
      this.precision.value = 2;
      this.sliders = {
        layers: slider(1, 128),
        heads: slider(1, 128),
        kvHeads: slider(0, 0),
        headSize: slider(1, 16),
        length: slider(0, 20),
        batch: slider(1, 64),
      };
      this.sliders.length.value = 13;
      this.sliders.batch.value = 1;
      const names = { layers: "Layers", heads: "Query heads", kvHeads: "Key-value heads", headSize: "Numbers in a head",
        length: "Tokens", batch: "Sequences at a time" };
      this.shown = {};
      const controls = element("div", { class: "controls" }, element("label", {}, element("span", {}, "Model"), this.model));
      for (const [key, input] of Object.entries(this.sliders)) {
        this.shown[key] = element("span", { class: "value" }); // an output would take the label for itself
        controls.append(element("label", {}, element("span", {}, names[key]), this.shown[key], input));
        input.addEventListener("input", () => this.moved(key));
      }
      controls.append(element("label", {}, element("span", {}, "Precision"), this.precision));
      this.model.addEventListener("change", () => this.take(Number(this.model.value)));
      this.precision.addEventListener("change", () => this.draw());
      /* The theme turns pages with the arrow keys; a control needs them for itself. */
      controls.addEventListener("keydown", (event) => event.stopPropagation());
      return controls;
    }

    makeBars() {
      this.bars = ["every head its own: multi-head", "chosen", "one for all: multi-query"].map((name, i) => {
        const bar = element("div", { class: "bar" });
        const size = element("td", { class: "size" });
        const head = element("th", { scope: "row" }, name);
        return { bar, size, head, row: element("tr", i === 1 ? { class: "chosen" } : {}, head, element("td", {}, bar), size) };
      });
      const body = element("tbody", {}, ...this.bars.map((bar) => bar.row));
      return element("table", {}, element("caption", {}, "Size of the cache"), body);
    }

    makeSentence() {
      this.said = element("p", { class: "said", "aria-live": "polite" });
      return this.said;
    }

    /* Set the sliders to a known model. */
    take(index) {
      this.model.value = index;
      const model = this.models[index];
      if (model) {
        this.sliders.layers.value = model.layers;
        this.sliders.heads.value = model.heads;
        this.sliders.headSize.value = model.headSize / 16;
        this.chooseKvHeads(model.kvHeads);
      }
      this.draw();
    }

    moved(key) {
      if (key === "heads") this.chooseKvHeads(this.kvHeads);
      if (!["length", "batch"].includes(key)) this.model.value = -1;
      this.draw();
    }

    /* Key-value heads divide the query heads: the slider steps through the divisors. */
    chooseKvHeads(wanted) {
      this.choices = divisors(Number(this.sliders.heads.value));
      const best = this.choices.filter((n) => n <= wanted).length - 1;
      this.sliders.kvHeads.max = this.choices.length - 1;
      this.sliders.kvHeads.value = Math.max(best, 0);
    }

    get kvHeads() {
      return this.choices[Number(this.sliders.kvHeads.value)];
    }

    get settings() {
      const value = (key) => Number(this.sliders[key].value);
      return { layers: value("layers"), heads: value("heads"), kvHeads: this.kvHeads, headSize: 16 * value("headSize"),
        length: 2 ** value("length"), batch: value("batch"), bytes: Number(this.precision.value) };
    }

    draw() {
      const s = this.settings;
      for (const key of Object.keys(this.sliders)) {
        this.shown[key].textContent = grouped(s[key]);
        this.sliders[key].setAttribute("aria-valuetext", grouped(s[key]));
      }
      const sizes = [s.heads, s.kvHeads, 1].map((n) => cacheBytes(s, n));
      this.bars.forEach((bar, i) => {
        bar.bar.style.width = `${(100 * sizes[i]) / sizes[0]}%`;
        bar.size.textContent = readable(sizes[i]);
        bar.size.dataset.bytes = sizes[i];
      });
      this.bars[1].head.textContent = `chosen: ${kindOf(s)}, ${s.kvHeads} of ${s.heads}`;
      const token = cacheBytes({ ...s, length: 1, batch: 1 }, s.kvHeads);
      const fit = Math.floor(2 ** 30 / token);
      this.said.textContent = `One token leaves ${readable(token)}, so ${grouped(fit)} tokens fill a GiB. `
        + `${grouped(s.length)} tokens of ${s.batch} sequence${s.batch === 1 ? "" : "s"} take ${readable(sizes[1])}, `
        + `${s.heads === s.kvHeads ? "the whole" : `1/${s.heads / s.kvHeads}`} of what multi-head attention would take.`;
    }
  }

  customElements.define("cache-size", CacheSize);
})();
