// Lines over time, with the marks of annotations as Grafana draws them.
import React from 'react';
import { colorManipulator } from '@grafana/data';
import { TimeSeries } from '@grafana/ui';

const MARK_HEIGHT = 5;

function drawMark(plot, { from, to, color }) {
  const { ctx, bbox } = plot;
  const [left, right] = [from, to].map((time) => plot.valToPos(time, 'x', true));
  ctx.setLineDash([5, 5]);
  ctx.lineWidth = 2;
  ctx.strokeStyle = color;
  for (const x of new Set([left, right])) {
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.fillStyle = colorManipulator.alpha(color, 0.1);
  ctx.fillRect(left, bbox.top, right - left, bbox.height);
  ctx.fillStyle = color;
  ctx.fillRect(left - 3, bbox.top + bbox.height - MARK_HEIGHT, Math.max(6, right - left), MARK_HEIGHT);
}

function addMarks(builder, marks) {
  builder.addHook('draw', (plot) => {
    plot.ctx.save();
    plot.ctx.beginPath();
    plot.ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    plot.ctx.clip();
    for (const mark of marks) drawMark(plot, mark);
    plot.ctx.restore();
  });
}

export function Graph({ panel, frames, range, marks, width, height }) {
  const marked = new WeakSet();
  return (
    <TimeSeries
      frames={frames} structureRev={1} timeRange={range} timeZone="utc" width={width} height={height}
      legend={panel.options.legend} options={panel.options}
    >
      {(builder) => {
        if (!marked.has(builder)) addMarks(builder, marks);
        marked.add(builder);
        return null;
      }}
    </TimeSeries>
  );
}
