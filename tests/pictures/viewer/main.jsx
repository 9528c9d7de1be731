// Draws the dashboard of /task.json with Grafana's own components. `window.drawn` tells when, and what went wrong.
import React from 'react';
import { createRoot } from 'react-dom/client';
import * as grafana from '@grafana/data';
import { GlobalStyles, ThemeContext } from '@grafana/ui';
import { makeInterpolate, register } from '../../grafana/npm/grafana_setup.cjs';
import { readFrames } from './frames.js';
import { Page } from './page.jsx';

const SETTLE_MS = 1500;
const theme = grafana.createTheme({ colors: { mode: 'dark' } });

function findPanels(dashboard) {
  return dashboard.panels.flatMap((one) => (one.type === 'row' ? one.panels ?? [] : [one]));
}

async function draw() {
  const task = await (await fetch('/task.json')).json();
  const options = register(grafana);
  const interpolate = makeInterpolate(grafana, task.variables, task.texts);
  const frames = {};
  for (const panel of findPanels(task.dashboard)) {
    frames[panel.id] = await readFrames(panel, task.frames[panel.id], { options, theme, interpolate });
  }
  const [from, to] = task.range.map((ms) => grafana.dateTime(ms));
  const range = { from, to, raw: { from, to } };
  const shown = { ...task, frames, interpolate, range, theme };
  createRoot(document.getElementById('root')).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <Page {...shown} />
    </ThemeContext.Provider>
  );
  await document.fonts.ready;
  await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
}

window.drawn = null;
draw().then(() => { window.drawn = 'ok'; }, (error) => { window.drawn = String(error.stack); });
