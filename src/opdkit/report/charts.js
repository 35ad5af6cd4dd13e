"use strict";
// Unpacks the data and plotly, draws every chart in the colours of the theme, and starts the token viewer.

const byId = (id) => document.getElementById(id);

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// Plotly needs colours, not CSS variables.
function colour(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

// Plotly reads names as a little HTML; a teacher's name is text.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

function traces(chart) {
  const format = chart.kind === "share" ? ".1%" : ",.4~g";
  return chart.series.flatMap((line) => {
    const color = colour(line.colour);
    const value = `%{y:${format}}<extra>${plain(line.name)}</extra>`;
    const shape = { type: "scatter", mode: line.x.length > 1 ? "lines" : "markers", x: line.x, hovertemplate: value };
    if (chart.stacked) {
      const y = line.mean.length ? line.mean : line.y;
      return [{ ...shape, y, stackgroup: "all", line: { color, width: 1 }, fillcolor: color }];
    }
    const strong = { color, width: 2, dash: line.dash };
    if (line.mean.length) {
      const faint = { ...shape, y: line.y, line: { color, width: 1 }, opacity: 0.3 };
      return [faint, { ...shape, y: line.mean, line: strong, hoverinfo: "skip", hovertemplate: null }];
    }
    if (!line.error.length) return [{ ...shape, y: line.y, line: strong }];
    const error_y = { array: line.error, color, thickness: 1.2, width: 3, visible: line.error.some((e) => e > 0) };
    return [{ ...shape, mode: "lines+markers", y: line.y, line: strong, marker: { color, size: 6 }, error_y }];
  });
}

function layout(chart) {
  const [ink, soft, grid, line, panel] = ["ink", "soft", "grid", "line", "panel"].map(colour);
  const axis = { gridcolor: grid, linecolor: line, zerolinecolor: line, tickfont: { size: 11 } };
  const values = chart.series.flatMap((s) => s.y);
  const within = chart.kind === "share" && chart.from_zero && Math.max(...values) > 0.5;
  return {
    margin: { l: 46, r: 8, t: 6, b: 22 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: soft },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    showlegend: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hovermode: "x unified",
    hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink, size: 12 } },
    xaxis: { ...axis, showgrid: false, ticks: "outside", tickcolor: line, ticklen: 4, nticks: 6, hoverformat: ",d" },
    yaxis: {
      ...axis,
      nticks: 5,
      tickformat: chart.kind === "share" ? ".0~%" : Math.max(...values) >= 1000 ? ",d" : "",
      exponentformat: "power",
      rangemode: chart.from_zero ? "tozero" : "normal",
      ...(within ? { range: [0, 1.03] } : {}),
    },
  };
}

async function draw(charts) {
  for (const chart of charts) {
    await Plotly.react(byId(chart.id), traces(chart), layout(chart), { displayModeBar: false, responsive: true });
  }
}

function onTheme(redraw) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  byId("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);
}

async function start() {
  if (!("DecompressionStream" in window) || !CSS.supports("color", "light-dark(red, blue)")) {
    throw new Error("the curves and the token viewer need a browser from 2024 or newer");
  }
  const data = JSON.parse(await unpack("data"));
  if (data.tokens.steps.length) showTokens(data.tokens);
  const plotly = document.createElement("script");
  plotly.textContent = await unpack("plotly");
  document.head.append(plotly);
  onTheme(() => draw(data.charts));
  await draw(data.charts);
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("failure").textContent = `This report could not be drawn completely: ${error.message}.`;
  byId("failure").hidden = false;
  console.error(error);
});
