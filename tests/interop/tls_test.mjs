// Tests examples/wss over TLS with npm's ws and with Chromium.
//
//   node tests/interop/tls_test.mjs --wss BIN --modules DIR
//
// Prints one line per check, then "N passed, N failed", and ends with status 1 if a check failed.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const TIMEOUT = 120_000;  // ms for one check; generous, because a machine under load is slow
const HERE = dirname(fileURLToPath(import.meta.url));
const text = { type: 'string', default: '' };
const { values: options } = parseArgs({ options: { wss: text, modules: text } });

function usage(message) {
  console.error(message);
  process.exit(2);
}

function load(name) {
  for (const folder of [options.modules, HERE].filter(Boolean)) {
    try { return createRequire(join(resolve(folder), 'here.js'))(name); } catch { /* try the next folder */ }
  }
  return usage(`${name} was not found. --modules DIR names the folder where npm installed it.`);
}

if (!options.wss) usage('Usage: tls_test.mjs --wss BIN [--modules DIR]');
const { WebSocket } = load('ws');
const { chromium } = load('playwright-core');
const executablePath = [process.env.CHROMIUM, '/usr/bin/chromium-headless-shell', '/usr/bin/chromium']
  .find(folder => folder && existsSync(folder));

const folder = mkdtempSync(join(tmpdir(), 'wschat-tls-'));
const server = spawn(resolve(options.wss), ['0'], { cwd: folder, stdio: ['ignore', 'pipe', 'inherit'] });
const ended = once(server, 'exit');
const results = { passed: 0, failed: 0 };

async function check(title, action) {
  let timer;
  const expired = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('timeout')), TIMEOUT); });
  try {
    await Promise.race([action(), expired]);
    results.passed += 1;
    console.log('ok - ' + title);
  } catch (error) {
    results.failed += 1;
    console.log(`not ok - ${title}\n  # ${error?.stack ?? error}`);
  }
  clearTimeout(timer);
}

function expect(actual, expected, name) {
  const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (a !== e) throw new Error(`${name}: expected ${e}, got ${a}`);
}

const [line] = await once(server.stdout.setEncoding('utf8'), 'data');
const port = line.match(/https:\/\/127\.0\.0\.1:(\d+)\//)[1];
const ca = readFileSync(join(folder, 'wss-cert.pem'));

await check('ws: a chat and a large message with a verified certificate', async () => {
  const client = new WebSocket(`wss://localhost:${port}/chat`, { ca });
  await once(client, 'open');
  for (const message of ['hello', 'x'.repeat(1_000_000)]) {
    client.send(message);
    const [data] = await once(client, 'message');
    expect(data.toString() === message, true, 'the message');
  }
  client.close(4001, 'bye');
  expect((await once(client, 'close'))[0], 4001, 'the close code');
});

await check('ws: a self-signed certificate is rejected', async () => {
  const client = new WebSocket(`wss://localhost:${port}/chat`);
  const [error] = await once(client, 'error');
  expect(error.code, 'DEPTH_ZERO_SELF_SIGNED_CERT', 'the error');
});

await check('Chromium: two users chat over https and wss', async () => {
  const flags = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                 '--disable-component-update', '--disable-sync', '--disable-quic'];
  const browser = await chromium.launch({ executablePath, args: flags });
  try {
    const pages = [];
    for (let i = 0; i < 2; ++i) {
      const context = await browser.newContext({ ignoreHTTPSErrors: true });
      const page = await context.newPage();
      const sockets = [];
      page.on('websocket', socket => sockets.push(socket.url()));
      page.setDefaultTimeout(TIMEOUT);
      await page.goto(`https://localhost:${port}/`);
      await page.waitForSelector('body[data-state="connected"]');
      expect(sockets[0].startsWith(`wss://localhost:${port}/chat`), true, 'the address of the WebSocket');
      pages.push(page);
    }
    await pages[0].fill('#message', 'hello over TLS');
    await pages[0].press('#message', 'Enter');
    await pages[1].waitForFunction(() => [...document.querySelectorAll('#log .message .text')]
      .some(line => line.textContent === 'hello over TLS'));
  } finally {
    await browser.close();
  }
});

server.kill('SIGTERM');
await check('SIGTERM ends the server with status 0', async () => expect((await ended)[0], 0, 'the status'));
rmSync(folder, { recursive: true, force: true });
console.log(`${results.passed} passed, ${results.failed} failed`);
process.exit(results.failed === 0 ? 0 : 1);
