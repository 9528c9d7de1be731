// Grafana's page around the panels: bars, what was chosen, and the grid, with the heights of Grafana 11.
import React from 'react';
import { Icon, PanelChrome } from '@grafana/ui';
import { Body } from './panels.jsx';

const COLUMNS = 24;
const UNIT = 30;
const GAP = 8;
const PADDING = 16;
const BAR = 40;
const CONTROLS = 32;
// Two bars, the controls and the space around them.
const TOP = 2 * BAR + PADDING + CONTROLS + GAP;

function place({ x, y, w, h }, width) {
  const column = (width - 2 * PADDING + GAP) / COLUMNS;
  return {
    position: 'absolute', left: PADDING + x * column, top: TOP + y * (UNIT + GAP), width: w * column - GAP,
    height: h * (UNIT + GAP) - GAP,
  };
}

function Bars({ theme, title, range }) {
  const bar = {
    height: BAR, padding: `0 ${PADDING}px`, display: 'flex', alignItems: 'center', justifyContent: 'space-between',
    background: theme.colors.background.primary, borderBottom: `1px solid ${theme.colors.border.weak}`, boxSizing: 'border-box',
  };
  const [from, to] = [range.from, range.to].map((time) => time.utc().format('YYYY-MM-DD HH:mm'));
  return (
    <>
      <div style={bar}><span>Dashboards › {title}</span></div>
      <div style={{ ...bar, justifyContent: 'flex-end', fontSize: 12 }}>{`${from} to ${to} UTC`}</div>
    </>
  );
}

function Chosen({ theme, label, text }) {
  const part = { padding: '0 8px', height: '100%', display: 'flex', alignItems: 'center' };
  return (
    <span style={{ display: 'flex', height: CONTROLS, border: `1px solid ${theme.colors.border.medium}`, boxSizing: 'border-box' }}>
      <span style={{ ...part, background: theme.colors.background.secondary, fontWeight: 500 }}>{label}</span>
      <span style={part}>{text}</span>
    </span>
  );
}

function Controls({ theme, dashboard, texts }) {
  const row = { display: 'flex', gap: GAP, padding: `${PADDING}px ${PADDING}px ${GAP}px`, fontSize: 12 };
  return (
    <div style={row}>
      {dashboard.templating.list.map(({ name, label }) => (
        <Chosen key={name} theme={theme} label={label} text={texts[name] ?? 'All'} />
      ))}
      <span style={{ flex: 1 }} />
      {dashboard.links.map(({ title }) => <Chosen key={title} theme={theme} label={title} text="▾" />)}
    </div>
  );
}

function Heading({ row, title, style }) {
  return (
    <div style={{ ...style, display: 'flex', alignItems: 'center', gap: 4, fontSize: 16, fontWeight: 500 }}>
      <Icon name={row.collapsed ? 'angle-right' : 'angle-down'} />
      {title}
      {row.collapsed && <span style={{ fontSize: 12, opacity: 0.6 }}>({row.panels.length} panels)</span>}
    </div>
  );
}

export function Page({ dashboard, frames, interpolate, marks, range, texts, theme }) {
  const width = document.documentElement.clientWidth;
  const end = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const page = {
    position: 'relative', height: TOP + end * (UNIT + GAP) + PADDING, background: theme.colors.background.canvas,
    color: theme.colors.text.primary, fontFamily: theme.typography.fontFamily, fontSize: 14,
  };
  return (
    <div style={page}>
      <Bars theme={theme} title={dashboard.title} range={range} />
      <Controls theme={theme} dashboard={dashboard} texts={texts} />
      {dashboard.panels.map((panel) => {
        const style = place(panel.gridPos, width);
        const title = interpolate(panel.title);
        if (panel.type === 'row') return <Heading key={panel.id} row={panel} title={title} style={style} />;
        return (
          <div key={panel.id} style={style}>
            <PanelChrome title={title} description={panel.description} width={style.width} height={style.height} padding="md">
              {(w, h) => <Body panel={panel} frames={frames[panel.id]} {...{ range, marks, theme, width: w, height: h }} />}
            </PanelChrome>
          </div>
        );
      })}
    </div>
  );
}
