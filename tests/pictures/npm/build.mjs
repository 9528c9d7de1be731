// Puts the viewer and what it needs of Grafana into one file for the browser: node build.mjs VIEWER OUTPUT
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import * as esbuild from 'esbuild';

const [viewer, output] = process.argv.slice(2);
const here = path.dirname(fileURLToPath(import.meta.url));
const modules = path.join(here, 'node_modules');

// One copy of each of Grafana's packages: their ES modules and CommonJS are not the same objects.
const onlyCommonJs = {
  name: 'only-common-js',
  setup(build) {
    build.onResolve({ filter: /^@grafana\/(ui|data|schema|e2e-selectors)$/ }, ({ path: name }) => ({
      path: path.join(modules, name, 'dist/cjs/index.cjs'),
    }));
  },
};

await esbuild.build({
  entryPoints: [path.join(viewer, 'main.jsx')],
  outfile: path.join(output, 'viewer.js'),
  bundle: true,
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  format: 'iife',
  jsx: 'automatic',
  loader: { '.svg': 'dataurl', '.ttf': 'empty' },
  logLevel: 'warning',
  minify: true,
  nodePaths: [modules],
  platform: 'browser',
  mainFields: ['browser', 'module', 'main'],
  plugins: [onlyCommonJs],
  target: 'chrome120',
});
