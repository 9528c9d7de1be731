// What is inside a panel, by its kind.
import React from 'react';
import { getFieldDisplayValues } from '@grafana/data';
import { BigValue, BigValueGraphMode, Table } from '@grafana/ui';
import { Graph } from './graph.jsx';
import { Timeline } from './timeline.jsx';

function Nothing({ text, width, height, theme }) {
  const style = {
    width, height, display: 'flex', alignItems: 'center', justifyContent: 'center', color: theme.colors.text.secondary,
    textAlign: 'center',
  };
  return <div style={style}>{text}</div>;
}

function Stat({ panel, frames, width, height, theme }) {
  const { fieldConfig, options } = panel;
  const values = getFieldDisplayValues({
    fieldConfig, reduceOptions: options.reduceOptions, data: frames, theme, timeZone: 'utc', replaceVariables: (text) => text,
  });
  return (
    <div style={{ display: 'flex', width, height }}>
      {values.map(({ display }, index) => (
        <BigValue
          key={index} value={display} theme={theme} width={width / values.length} height={height} count={values.length}
          colorMode={options.colorMode} graphMode={BigValueGraphMode.None} justifyMode={options.justifyMode}
          textMode={options.textMode}
        />
      ))}
    </div>
  );
}

export function Body(props) {
  const { panel, frames, range, width, height } = props;
  const known = frames.filter((frame) => frame.length);
  if (panel.type === 'stat') return <Stat {...props} />;
  if (!known.length) return <Nothing {...props} text={panel.fieldConfig.defaults.noValue} />;
  if (panel.type === 'timeseries') return <Graph {...props} frames={known} />;
  if (panel.type === 'state-timeline') return <Timeline {...props} frames={known} />;
  if (panel.type !== 'table') throw new Error(`no panel of this kind is drawn: ${panel.type}`);
  return (
    <Table
      data={known[0]} width={width} height={height} initialSortBy={panel.options.sortBy} cellHeight={panel.options.cellHeight}
      fieldConfig={panel.fieldConfig} timeRange={range} showTypeIcons={false} resizable
    />
  );
}
