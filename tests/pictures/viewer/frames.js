// From answers to what panels draw: transformations and field options, by Grafana's own library.
import { applyFieldOverrides, transformDataFrame } from '@grafana/data';
import { lastValueFrom } from 'rxjs';

// Panels of Grafana have these by default; the components alone do not.
const GRAPH_DEFAULTS = {
  axisColorMode: 'text', axisPlacement: 'auto', barAlignment: 0, gradientMode: 'none',
  hideFrom: { legend: false, tooltip: false, viz: false }, lineStyle: { fill: 'solid' }, pointSize: 5,
  scaleDistribution: { type: 'linear' }, thresholdsStyle: { mode: 'off' },
};

export async function readFrames(panel, answers, { options, theme, interpolate }) {
  const named = answers.map((frame) => ({ ...frame, fields: frame.fields.map((field) => nameField(field, frame)) }));
  const transformed = await lastValueFrom(transformDataFrame(panel.transformations ?? [], named, { interpolate }));
  const frames = applyFieldOverrides({
    data: transformed, fieldConfig: panel.fieldConfig, fieldConfigRegistry: options, theme, timeZone: 'utc',
    replaceVariables: interpolate,
  });
  if (panel.type !== 'timeseries') return frames;
  for (const field of frames.flatMap((frame) => frame.fields)) {
    field.config = { ...field.config, custom: { ...GRAPH_DEFAULTS, ...field.config.custom } };
  }
  return frames;
}

// The data source says what a line is called.
function nameField(field, frame) {
  return field.type === 'number' && frame.name ? { ...field, config: { displayNameFromDS: frame.name } } : field;
}
