// States over time. Grafana's own panel for it is part of its server, so this one is drawn after its looks.
import React from 'react';
import { formattedValueToString, getFieldDisplayName } from '@grafana/data';

const AXIS = 22;
const LEGEND = 22;
const LETTER = 7;
const TICKS = [0, 0.25, 0.5, 0.75, 1];

// Spans of one value: {value, from, to}; null is no span.
function findSpans(times, values, step) {
  const spans = [];
  values.forEach((value, index) => {
    const last = spans.at(-1);
    if (value === null) return;
    if (last && last.value === value && last.to === times[index]) last.to += step;
    else spans.push({ value, from: times[index], to: times[index] + step });
  });
  return spans;
}

function readLine(frame) {
  const [time, value] = frame.fields;
  const spans = findSpans(time.values, value.values, time.values[1] - time.values[0]);
  return { name: getFieldDisplayName(value, frame), spans: spans.map((span) => ({ ...span, display: value.display(span.value) })) };
}

export function Timeline({ panel, frames, range, theme, width, height }) {
  const lines = frames.map(readLine);
  const names = Math.min(Math.max(...lines.map(({ name }) => name.length)) * LETTER + 12, width * 0.35);
  const [from, to] = [range.from.valueOf(), range.to.valueOf()];
  const toX = (time) => names + ((Math.min(to, Math.max(from, time)) - from) / (to - from)) * (width - names);
  const plot = height - AXIS - LEGEND;
  const rowHeight = plot / lines.length;
  const bar = rowHeight * panel.options.rowHeight;
  const states = new Map(lines.flatMap(({ spans }) => spans.map(({ display }) => [formattedValueToString(display), display.color])));
  return (
    <div style={{ width, height, fontSize: 12 }}>
      <svg width={width} height={plot + AXIS} fontSize="12">
        {lines.map(({ name, spans }, index) => (
          <g key={name} transform={`translate(0, ${index * rowHeight})`}>
            <text x={names - 6} y={rowHeight / 2 + 4} textAnchor="end" fill={theme.colors.text.primary}>{name}</text>
            {spans.map(({ display, from: start, to: end }) => {
              const text = formattedValueToString(display);
              const [left, right] = [toX(start), toX(end)];
              return (
                <g key={start}>
                  <rect x={left} y={(rowHeight - bar) / 2} width={Math.max(1, right - left)} height={bar} fill={display.color} fillOpacity="0.7" />
                  {right - left > text.length * LETTER + 8 && <text x={left + 5} y={rowHeight / 2 + 4} fill="#fff">{text}</text>}
                </g>
              );
            })}
          </g>
        ))}
        {TICKS.map((part) => (
          <text key={part} x={names + part * (width - names)} y={plot + AXIS - 6} fill={theme.colors.text.secondary}
            textAnchor={part === 1 ? 'end' : part === 0 ? 'start' : 'middle'}>
            {new Date(from + part * (to - from)).toISOString().slice(11, 16)}
          </text>
        ))}
      </svg>
      <div style={{ display: 'flex', gap: 14, paddingLeft: 8 }}>
        {[...states].map(([text, color]) => (
          <span key={text}>
            <span style={{ display: 'inline-block', width: 14, height: 4, background: color, marginRight: 5, verticalAlign: 'middle' }} />
            {text}
          </span>
        ))}
      </div>
    </div>
  );
}
