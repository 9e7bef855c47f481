"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const stageButtons = document.querySelectorAll("button[data-stage]");
  const several = data.runs.length > 1;
  const COLORS = ["#5b6cf0", "#e07a3f", "#16a37f", "#b455c9", "#d64f6e", "#1f9fc4", "#9a8a1f", "#7a7f8c"];
  const FIRST_CHARTS = 5;
  const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
  const WORK = {
    generate: "#5b6cf0", score: "#e0a030", logprobs: "#16a37f", values: "#58c2a5", update: "#b455c9",
    send_weights: "#d64f6e", receive_weights: "#f08aa3", probe: "#1f9fc4", start: "#8d99ae", evaluation: "#a9b4c6",
    checkpoint: "#c98a5b", "write rollouts": "#7fa0b8", "between calls": "#c3c9d4",
  };
  const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false };

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads some tags in labels.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const translucent = (color, alpha) => color + Math.round(alpha * 255).toString(16).padStart(2, "0");

  function layout(extra) {
    const axis = () => ({
      gridcolor: variable("--grid"), zeroline: false, linecolor: variable("--line"), ticks: "",
      tickfont: { color: variable("--soft"), size: 11.5 }, automargin: true,
    });
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 10, t: 10, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, color: variable("--text"), size: 12.5 },
      hoverlabel: { bgcolor: variable("--card"), bordercolor: variable("--line"), font: { color: variable("--text") } },
      hovermode: "x unified", xaxis: axis(), yaxis: axis(),
      legend: { traceorder: "normal", orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11.5, color: variable("--soft") } },
    };
    for (const [key, value] of Object.entries(extra)) {
      base[key] = key in base && typeof value === "object" ? { ...base[key], ...value } : value;
    }
    return base;
  }

  function traces(chart) {
    const found = [];
    for (const series of chart.series) {
      const color = several ? data.runs[series.run].color : COLORS[series.place % COLORS.length];
      const label = several ? `${data.runs[series.run].name}, ${series.label}` : series.label;
      if (series.spread.length && !several) {
        const side = (sign) => series.y.map((y, i) => (y === null ? null : y + sign * (series.spread[i] || 0)));
        const edge = { x: series.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
        found.push({ ...edge, y: side(-1) });
        found.push({ ...edge, y: side(1), fill: "tonexty", fillcolor: translucent(color, 0.13) });
      }
      found.push({
        x: series.x, y: series.y, name: plain(label), type: "scatter",
        mode: series.sparse || series.x.length < 3 ? "lines+markers" : "lines",
        line: { color, width: 2.2, dash: several ? DASHES[series.place % DASHES.length] : "solid" },
        marker: { size: 6.5, color }, connectgaps: true, showlegend: !several,
      });
    }
    if (several) {
      // Colours are the runs', so the legend explains the dashes alone.
      for (const { label, place } of new Map(chart.series.map((series) => [series.label, series])).values()) {
        const line = { color: variable("--soft"), width: 2.2, dash: DASHES[place % DASHES.length] };
        found.push({ x: [null], y: [null], name: plain(label), type: "scatter", mode: "lines", line });
      }
    }
    return found;
  }

  function draw(place, charts, large) {
    place.replaceChildren();
    charts.forEach((chart, number) => {
      const plot = element("div", { className: "plot" });
      const unit = chart.unit ? [element("small", { textContent: chart.unit })] : [];
      const heading = element("h3", { textContent: chart.title }, ...unit);
      place.append(element("div", { className: number < large ? "card chart large" : "card chart" }, heading, plot));
      const labels = new Set(chart.series.map((series) => series.label));
      const yaxis = {};
      if (chart.scale === "log") Object.assign(yaxis, { type: "log", exponentformat: "power", dtick: 1 });
      if (chart.scale === "share") Object.assign(yaxis, { tickformat: ".0%", rangemode: "tozero" });
      Plotly.newPlot(plot, traces(chart), layout({ yaxis, showlegend: labels.size > 1 }), CONFIG);
    });
  }

  let stage = data.stages.length - 1;
  function drawStage() {
    const { name } = data.stages[stage];
    for (const button of stageButtons) button.setAttribute("aria-pressed", String(button.dataset.stage === name));
    for (const table of document.querySelectorAll(".tables > *")) table.hidden = table.dataset.stage !== name;
    for (const shown of document.querySelectorAll(".stage-name")) shown.textContent = name;
    const { charts, shares } = data.stages[stage];
    const rest = charts.slice(FIRST_CHARTS);
    draw(at("charts"), charts.slice(0, FIRST_CHARTS), charts.length === 4 ? 4 : 2);
    draw(at("more-charts"), at("more-charts").hidden ? [] : rest, 0);
    at("more").hidden = !rest.length;
    at("more").textContent = at("more-charts").hidden ? `Show ${rest.length} more curves` : "Show fewer curves";
    draw(at("shares"), shares, 0);
  }

  let run = 0;
  let number = 0;
  const iterations = () => data.timelines[run][data.stages[stage].name] || [];
  function chooseLast() {
    number = Math.max(0, iterations().length - 1);
  }

  const amount = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
  const duration = (seconds) => (seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1000).toFixed(1)} ms`);
  function described([, method, , seconds, tokens, bytes, cpu, iteration]) {
    const lines = [`<b>${plain(method)}</b>  ${duration(seconds)}`, `for iteration ${iteration}`];
    if (tokens) lines.push(`${amount(tokens)} tokens, ${amount(tokens / Math.max(seconds, 1e-6))} tokens/s`);
    if (bytes) lines.push(`${(bytes / 2 ** 20).toFixed(1)} MiB, ${(bytes / 2 ** 30 / Math.max(seconds, 1e-6)).toFixed(2)} GiB/s`);
    if (cpu) lines.push(`${duration(cpu)} of CPU`);
    return lines.join("<br>");
  }

  function drawTimeline() {
    const shown = iterations()[number];
    at("timeline").hidden = at("iterations").hidden = !shown;
    at("timeline-told").textContent = "nothing of it in this run's trace.json";
    if (!shown) return;
    at("timeline-number").max = String(iterations().length - 1);
    at("timeline-number").value = String(number);
    const name = shown.label === "start" ? "before the first iteration" : `iteration ${shown.label}`;
    at("timeline-told").textContent =
      `${name} · ${duration(shown.seconds)} · ${(shown.idle * 100).toFixed(1)} % without a worker at work`;
    const order = Object.keys(WORK);
    const rank = (method) => (order.includes(method) ? order.indexOf(method) : order.length);
    const methods = [...new Set(shown.calls.map((call) => call[1]))].sort((a, b) => rank(a) - rank(b));
    const bars = methods.map((method, place) => {
      const calls = shown.calls.filter((call) => call[1] === method);
      return {
        type: "bar", orientation: "h", name: plain(method),
        y: calls.map((call) => plain(shown.rows[call[0]])), base: calls.map((call) => call[2]),
        x: calls.map((call) => call[3]), hovertext: calls.map(described), hovertemplate: "%{hovertext}<extra></extra>",
        text: calls.map((call) => (call[3] > shown.seconds * 0.07 && method !== "between calls" ? plain(method) : "")),
        textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { color: "#fff", size: 11.5 },
        marker: { color: WORK[method] || COLORS[place % COLORS.length], line: { width: 0 } }, width: 0.66,
      };
    });
    const rows = shown.rows.map(plain);
    Plotly.react(at("timeline"), bars, layout({
      barmode: "overlay", hovermode: "closest", height: 84 + 30 * rows.length, showlegend: true,
      xaxis: { range: [0, shown.seconds], ticksuffix: " s" },
      yaxis: { categoryorder: "array", categoryarray: rows.slice().reverse(), range: [-0.6, rows.length - 0.4], showgrid: false },
    }), CONFIG);
  }

  function move(by) {
    number = Math.min(iterations().length - 1, Math.max(0, number + by));
    drawTimeline();
  }
  function drawAll() {
    drawStage();
    drawTimeline();
  }
  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    drawAll();
  }

  if (several) {
    at("run-legend").replaceChildren(...data.runs.map((run) => {
      const chip = element("i", { className: "chip" });
      chip.style.background = run.color;
      return element("span", {}, chip, run.name);
    }));
    at("timeline-run").addEventListener("change", (event) => {
      run = Number(event.target.value);
      chooseLast();
      drawTimeline();
    });
  }
  for (const button of stageButtons) {
    button.addEventListener("click", () => {
      stage = data.stages.findIndex(({ name }) => name === button.dataset.stage);
      chooseLast();
      drawAll();
    });
  }
  at("more").addEventListener("click", () => { at("more-charts").hidden = !at("more-charts").hidden; drawStage(); });
  at("timeline-number").addEventListener("input", (event) => {
    number = Number(event.target.value);
    drawTimeline();
  });
  at("earlier").addEventListener("click", () => move(-1));
  at("later").addEventListener("click", () => move(1));
  at("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  });
  chooseLast();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.drawn = "true";
})();
