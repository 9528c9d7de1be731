// What Grafana does when it starts, for @grafana/data alone: its registries of transformations and of field options, and
// the values of variables. Used in node (read_panels.cjs) and in the browser (tests/pictures/viewer).
"use strict";

// As they are, and from release 13 on as functions that load them.
function load(one) {
  const loader = async () => one;
  for (const name of Object.keys(one)) Object.defineProperty(loader, name, { value: one[name] });
  return loader;
}

function makeOption(path, process = (value) => value, settings = {}) {
  return {
    id: path, path: path.replace("custom.", ""), name: path, process, override: process, settings,
    isCustom: path.startsWith("custom."), shouldApply: () => true, getItemsCount: () => 0,
  };
}

const CUSTOM = [
  "width", "minWidth", "align", "cellOptions", "filterable", "inspect", "hidden", "hideFrom",
  "axisLabel", "axisSoftMax", "drawStyle", "fillOpacity", "lineInterpolation", "lineWidth", "scaleDistribution", "showPoints",
  "spanNulls", "stacking",
];

// Returns the registry of field options.
function register(grafana) {
  const transformers = new Map(Object.values(grafana.standardTransformers).map((one) => [one.id, one]));
  grafana.standardTransformersRegistry.setInit(() =>
    [...transformers.values()].map((one) => ({ id: one.id, name: one.name, transformation: load(one) })));
  const options = new grafana.FieldConfigOptionsRegistry(() => [
    makeOption("displayName", grafana.displayNameOverrideProcessor, { expandTemplateVars: true }),
    makeOption("unit", grafana.unitOverrideProcessor),
    makeOption("min", grafana.numberOverrideProcessor),
    makeOption("max", grafana.numberOverrideProcessor),
    makeOption("decimals", grafana.numberOverrideProcessor, { integer: true }),
    makeOption("noValue"),
    makeOption("description"),
    makeOption("links", grafana.dataLinksOverrideProcessor),
    makeOption("color"),
    makeOption("mappings", grafana.valueMappingsOverrideProcessor),
    makeOption("thresholds", grafana.thresholdsOverrideProcessor),
    ...CUSTOM.map((name) => makeOption(`custom.${name}`)),
  ]);
  grafana.standardFieldConfigEditorRegistry.setInit(() => options.list());
  return options;
}

// Returns what replaces variables, as Grafana's scenes do; what is not resolved stays to be seen. ``texts`` are what values
// are shown as.
function makeInterpolate(grafana, variables, texts = {}) {
  return (text, scoped) => {
    const context = scoped?.__dataContext?.value;
    return String(text).replace(/\$\{([^}:]+)(?::(\w+))?\}|\$(\w+)/g, (whole, braced, format, bare) => {
      const name = braced || bare;
      let value = format === "text" ? texts[name] ?? variables[name] : variables[name];
      if (name.startsWith("__data.fields.") && context) {
        const wanted = name.slice("__data.fields.".length).replace(/^\["?|"?\]$/g, "");
        const field = context.frame.fields.find((one) =>
          one.name === wanted || grafana.getFieldDisplayName(one, context.frame) === wanted);
        value = field?.values[context.rowIndex] ?? (field && "");
      }
      if (name.startsWith("__field.labels.") && context) value = context.field?.labels?.[name.slice("__field.labels.".length)];
      if (value === undefined) return whole;
      if (format === "queryparam") return `var-${name}=${encodeURIComponent(value)}`;
      return format === "percentencode" ? encodeURIComponent(value) : String(value);
    });
  };
}

module.exports = { register, makeInterpolate };
