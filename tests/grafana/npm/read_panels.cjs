// Says what a person reads on stats and tables, by Grafana's own library: transformations, field options, mappings,
// thresholds, units and links, of one release of @grafana/data.
//
// It takes one JSON document on stdin and prints one: {library, variables, panels: [{panel, frames}]}, where frames are what
// the data source makes of Prometheus' answers. It asks nothing of the network.
"use strict";

// What the library asks of a browser when it is loaded.
const element = () => ({ style: {}, setAttribute() {}, appendChild() {}, getContext: () => null });
const define = (name, value) => Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
define("window", globalThis);
define("navigator", { userAgent: "", language: "en-US", languages: ["en-US"] });
define("location", { href: "http://grafana/", origin: "http://grafana", protocol: "http:", host: "grafana", search: "" });
define("history", { pushState() {}, replaceState() {}, state: null });
define("localStorage", { getItem: () => null, setItem() {} });
define("document", {
  createElement: element, createTextNode: element, documentElement: element(), head: element(), body: element(), cookie: "",
  querySelector: () => null, querySelectorAll: () => [], getElementsByTagName: () => [element()], addEventListener() {},
});
define("addEventListener", () => {});
define("removeEventListener", () => {});

const { register, makeInterpolate } = require("./grafana_setup.cjs");
const task = JSON.parse(require("fs").readFileSync(0, "utf8"));
const grafana = require(task.library);
const { lastValueFrom } = require(require.resolve("rxjs", { paths: [require.resolve(task.library)] }));
const theme = grafana.createTheme({ colors: { mode: "dark" } });

const options = register(grafana);
const interpolate = makeInterpolate(grafana, task.variables);

// A colour of "" is that of text.
const toHex = (color) => color.replace(/^rgb\((\d+), (\d+), (\d+)\)$/, (_, ...parts) =>
  `#${parts.slice(0, 3).map((part) => Number(part).toString(16).padStart(2, "0")).join("")}`);
const TEXT = toHex(theme.visualization.getColorByName("text"));
const show = (display) => ({
  text: grafana.formattedValueToString(display), color: !display.color || toHex(display.color) === TEXT ? "" : display.color,
});

function readLinks(field, row) {
  return field.config.links?.length ? field.getLinks({ valueRowIndex: row }).map((link) => link.href) : [];
}

function readTable(frame) {
  const shown = frame.fields.filter((field) => !field.config.custom?.hidden);
  return {
    columns: shown.map((field) => grafana.getFieldDisplayName(field, frame)),
    rows: Array.from({ length: frame.length }, (_, row) => shown.map((field) => {
      const cell = { ...show(field.display(field.values[row])), links: readLinks(field, row) };
      // A cell that is not coloured has the text's colour, whatever its thresholds say.
      return (field.config.custom?.cellOptions?.type ?? "auto") === "auto" ? { ...cell, color: "" } : cell;
    })),
  };
}

async function readPanel({ panel, frames }) {
  const context = { interpolate };
  const transformed = await lastValueFrom(grafana.transformDataFrame(panel.transformations ?? [], frames, context));
  const data = grafana.applyFieldOverrides({
    data: transformed, fieldConfig: panel.fieldConfig, fieldConfigRegistry: options, theme, timeZone: "utc",
    replaceVariables: interpolate,
  });
  const found = { title: panel.title, type: panel.type };
  if (panel.type === "table") {
    const table = data.find((frame) => frame.fields.length > 0 && frame.length > 0);
    return { ...found, noValue: panel.fieldConfig.defaults.noValue, ...(table ? readTable(table) : { columns: [], rows: [] }) };
  }
  const values = grafana.getFieldDisplayValues({
    fieldConfig: panel.fieldConfig, reduceOptions: panel.options.reduceOptions, data, theme, timeZone: "utc",
    replaceVariables: (text) => interpolate(text),
  });
  return { ...found, values: values.map((value) => show(value.display)) };
}

(async () => {
  const panels = [];
  for (const one of task.panels) panels.push(await readPanel(one));
  process.stdout.write(JSON.stringify({ panels }), () => process.exit(0));
})().catch((error) => {
  process.stderr.write(`${error.stack}\n`, () => process.exit(1));
});
