/* <attention-map>: look around in attention weights.

   Data stand inside the element, as JSON made by dianlib.widgets.AttentionMap: names of queries, keys and heads,
   and for each weight its logarithm (null for a weight of 0). Beside the data stand plain tables, which are
   shown as long as this script has not run. Nothing is loaded and nothing is stored. */

(() => {
  "use strict";

  const STYLE = `
    :host { display: block; margin: 1rem 0; color: var(--pst-color-text-base, #222); font-size: 0.9rem; }
    .controls { display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; align-items: center; margin-bottom: 0.5rem; }
    .controls label { display: flex; gap: 0.4rem; align-items: center; }
    select, button, input { font: inherit; color: inherit; accent-color: var(--pst-color-primary, #0a7d91); }
    select, button { background: var(--pst-color-surface, #f5f5f5); border: 1px solid var(--pst-color-border, #767676);
      border-radius: 4px; padding: 0.15rem 0.5rem; }
    button:disabled { opacity: 0.6; }
    :is(select, button, input, td):focus-visible { outline: 3px solid var(--pst-color-primary, #0a7d91); outline-offset: 1px; }
    .frame { overflow-x: auto; padding: 4px; }
    table { border-collapse: separate; border-spacing: 2px; margin: 0; }
    caption { text-align: left; padding-bottom: 0.3rem; font-weight: 600; }
    th { font-weight: 400; padding: 2px 6px; white-space: nowrap; text-align: center; }
    tbody th { text-align: right; }
    td { min-width: 2.4em; padding: 3px 4px; text-align: center; cursor: default; font-variant-numeric: tabular-nums; }
    th.marked { font-weight: 700; text-decoration: underline; }
    .said { min-height: 1.5em; margin: 0.4rem 0 0; }
    .hidden-text { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }`;

  /* White to dark blue, the colours of the book's other heat maps (ColorBrewer's Blues). */
  const BLUES = [[247, 251, 255], [222, 235, 247], [198, 219, 239], [158, 202, 225], [107, 174, 214],
    [66, 146, 198], [33, 113, 181], [8, 81, 156], [8, 48, 107]];

  const colour = (weight) => {
    const place = Math.min(Math.max(weight, 0), 1) * (BLUES.length - 1);
    const low = Math.min(Math.floor(place), BLUES.length - 2);
    const parts = BLUES[low].map((value, i) => Math.round(value + (BLUES[low + 1][i] - value) * (place - low)));
    return `rgb(${parts.join(", ")})`;
  };

  /* Black and white are equally far from the blue at 0.71. */
  const ink = (weight) => (weight > 0.71 ? "#ffffff" : "#000000");

  /* Softmax of the scores times a factor; null is a score of minus infinity, and a row of them gives zeros. */
  const softmax = (scores, factor) => {
    const scaled = scores.map((score) => (score === null ? -Infinity : score * factor));
    const largest = Math.max(...scaled);
    if (largest === -Infinity) return scores.map(() => 0);
    const exponentials = scaled.map((score) => Math.exp(score - largest));
    const total = exponentials.reduce((sum, value) => sum + value, 0);
    return exponentials.map((value) => value / total);
  };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const percent = (weight) => (weight >= 0.005 ? String(Math.round(100 * weight)) : "");

  class AttentionMap extends HTMLElement {
    connectedCallback() {
      const source = this.querySelector('script[type="application/json"]');
      if (this.shadowRoot || !source) return;
      this.map = JSON.parse(source.textContent);
      this.place = [0, 0];
      this.attachShadow({ mode: "open" });
      this.shadowRoot.append(element("style", {}, STYLE), this.makeControls(), this.makeFrame(), this.makeSentence());
      this.draw();
    }

    /* The factor on the logarithms of the weights: temperature divides, another divisor of the scores rescales. */
    get factor() {
      return Number(this.scale.value) / this.temperature;
    }

    get temperature() {
      return 2 ** Number(this.slider.value);
    }

    get weights() {
      const factor = this.factor;
      return this.map.scores[Number(this.head.value)].map((row) => softmax(row, factor));
    }

    makeControls() {
      this.head = element("select", {}, ...this.map.heads.map((name, i) => element("option", { value: i }, name)));
      this.scale = element("select", {}, ...this.divisors().map(([name, factor]) => element("option", { value: factor }, name)));
      this.slider = element("input", { type: "range", min: -4, max: 4, step: 0.25, value: 0 });
      this.shown = element("output", {}, "1");
      this.reset = element("button", { type: "button" }, "Reset");
      this.head.addEventListener("change", () => this.draw());
      this.scale.addEventListener("change", () => this.draw());
      this.slider.addEventListener("input", () => this.draw());
      this.reset.addEventListener("click", () => {
        this.slider.value = 0;
        this.scale.selectedIndex = 0;
        this.draw();
      });
      const controls = element("div", { class: "controls" });
      if (this.map.heads.length > 1) controls.append(element("label", {}, "Head", this.head));
      if (this.scale.options.length > 1) controls.append(element("label", {}, "Scores divided by", this.scale));
      controls.append(element("label", {}, "Temperature", this.slider, this.shown), this.reset);
      /* The theme turns pages with the arrow keys; a control needs them for itself. */
      controls.addEventListener("keydown", (event) => event.stopPropagation());
      return controls;
    }

    divisors() {
      const { headDim: d, modelDim: width } = this.map;
      if (!d) return [["what they were", 1]];
      const found = [[`√d = √${d}`, 1], ["1 (no scale)", Math.sqrt(d)], [`d = ${d}`, 1 / Math.sqrt(d)]];
      if (width && width !== d) found.push([`√D = √${width}`, Math.sqrt(d / width)]);
      return found;
    }

    makeFrame() {
      const { queries, keys } = this.map;
      const heads = keys.map((name) => element("th", { scope: "col", lang: this.dataset.keyLanguage || "en" }, name));
      const corner = element("td", { class: "corner" });
      this.rows = queries.map((name, i) => {
        const cells = keys.map((_, j) => element("td", { tabindex: i || j ? -1 : 0, "data-place": `${i},${j}` }));
        return { head: element("th", { scope: "row", lang: this.dataset.language || "en" }, name), cells };
      });
      this.columns = heads;
      const body = element("tbody", {}, ...this.rows.map((row) => element("tr", {}, row.head, ...row.cells)));
      const caption = element("caption", {}, this.dataset.caption || "Attention weights");
      this.table = element("table", {}, caption, element("thead", {}, element("tr", {}, corner, ...heads)), body);
      body.addEventListener("keydown", (event) => this.move(event));
      body.addEventListener("focusin", (event) => this.choose(event.target));
      body.addEventListener("pointerover", (event) => this.choose(event.target));
      return element("div", { class: "frame", role: "region", "aria-label": this.dataset.caption || "Attention weights" }, this.table);
    }

    makeSentence() {
      this.said = element("p", { class: "said", "aria-live": "polite" });
      return this.said;
    }

    draw() {
      this.shown.textContent = this.temperature.toPrecision(2).replace(/\.0$/, "");
      const weights = this.weights;
      this.rows.forEach((row, i) => row.cells.forEach((cell, j) => {
        const weight = weights[i][j];
        cell.textContent = percent(weight);
        cell.style.background = colour(weight);
        cell.style.color = ink(weight);
      }));
      this.reset.disabled = this.factor === 1 && this.scale.selectedIndex === 0;
      this.say();
    }

    choose(target) {
      const place = target?.dataset?.place;
      if (!place) return;
      this.place = place.split(",").map(Number);
      this.rows.forEach((row, i) => row.cells.forEach((cell, j) => {
        cell.tabIndex = i === this.place[0] && j === this.place[1] ? 0 : -1;
      }));
      this.say();
    }

    /* Arrow keys, Home and End move from cell to cell. */
    move(event) {
      const [i, j] = this.place;
      const steps = { ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
        Home: [i, 0], End: [i, this.columns.length - 1] };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      this.rows[step[0]]?.cells[step[1]]?.focus();
    }

    say() {
      const [i, j] = this.place;
      const { queries, keys } = this.map;
      this.rows.forEach((row, number) => row.head.classList.toggle("marked", number === i));
      this.columns.forEach((head, number) => head.classList.toggle("marked", number === j));
      const weight = this.weights[i][j];
      const share = weight > 0 && weight < 0.0005 ? "less than 0.1" : (100 * weight).toFixed(1);
      this.said.textContent = `“${queries[i]}” looks at “${keys[j]}” with ${share} % of its weight.`;
    }
  }

  if (!customElements.get("attention-map")) customElements.define("attention-map", AttentionMap);
})();
