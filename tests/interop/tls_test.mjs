// npm's ws and a real Chromium against examples/wss, over TLS.
//
//   node tests/interop/tls_test.mjs --wss BIN --modules DIR
//
// Prints one line for each check, then "N passed, N failed", and ends with status 1 if one of them failed.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const PATIENCE = 20_000;  // ms for one thing to happen; a machine under load is slow, not broken
const HERE = dirname(fileURLToPath(import.meta.url));
const text = { type: 'string', default: '' };
const { values: options } = parseArgs({ options: { wss: text, modules: text } });

function usage(sentence) {
  console.error(sentence);
  process.exit(2);
}

function load(name) {
  for (const place of [options.modules, HERE].filter(Boolean)) {
    try { return createRequire(join(resolve(place), 'here.js'))(name); } catch { /* the next place */ }
  }
  return usage(`${name} was not found: --modules DIR says where npm has installed it.`);
}

if (!options.wss) usage('Usage: tls_test.mjs --wss BIN [--modules DIR]');
const { WebSocket } = load('ws');
const { chromium } = load('playwright-core');
const executablePath = [process.env.CHROMIUM, '/usr/bin/chromium-headless-shell', '/usr/bin/chromium']
  .find(place => place && existsSync(place));

const folder = mkdtempSync(join(tmpdir(), 'wschat-tls-'));
const server = spawn(resolve(options.wss), ['0'], { cwd: folder, stdio: ['ignore', 'pipe', 'inherit'] });
const ended = once(server, 'exit');
const tally = { passed: 0, failed: 0 };

async function check(sentence, action) {
  let timer;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('it takes too long')), PATIENCE); });
  try {
    await Promise.race([action(), late]);
    tally.passed += 1;
    console.log('ok - ' + sentence);
  } catch (error) {
    tally.failed += 1;
    console.log(`not ok - ${sentence}\n  # ${error?.stack ?? error}`);
  }
  clearTimeout(timer);
}

function expect(actual, wanted, what) {
  const [a, w] = [JSON.stringify(actual), JSON.stringify(wanted)];
  if (a !== w) throw new Error(`${what}: expected ${w}, got ${a}`);
}

const [line] = await once(server.stdout.setEncoding('utf8'), 'data');
const port = line.match(/https:\/\/127\.0\.0\.1:(\d+)\//)[1];
const ca = readFileSync(join(folder, 'wss-cert.pem'));

await check('ws: chat and a large message, from a certificate that it verifies', async () => {
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

await check('ws: a certificate that nobody has signed is refused', async () => {
  const client = new WebSocket(`wss://localhost:${port}/chat`);
  const [error] = await once(client, 'error');
  expect(error.code, 'DEPTH_ZERO_SELF_SIGNED_CERT', 'the error');
});

await check('Chromium: two people chat at https and wss', async () => {
  const flags = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                 '--disable-component-update', '--disable-sync', '--disable-quic'];
  const browser = await chromium.launch({ executablePath, args: flags });
  try {
    const people = [];
    for (let i = 0; i < 2; ++i) {
      const context = await browser.newContext({ ignoreHTTPSErrors: true });
      const page = await context.newPage();
      const sockets = [];
      page.on('websocket', socket => sockets.push(socket.url()));
      await page.goto(`https://localhost:${port}/`);
      await page.waitForSelector('body[data-state="connected"]');
      expect(sockets[0].startsWith(`wss://localhost:${port}/chat`), true, 'the address of the WebSocket');
      people.push(page);
    }
    await people[0].fill('#message', 'hello over TLS');
    await people[0].press('#message', 'Enter');
    await people[1].waitForFunction(() => [...document.querySelectorAll('#log .message .text')]
      .some(line => line.textContent === 'hello over TLS'));
  } finally {
    await browser.close();
  }
});

server.kill('SIGTERM');
await check('it ends with status 0', async () => expect((await ended)[0], 0, 'the status'));
rmSync(folder, { recursive: true, force: true });
console.log(`${tally.passed} passed, ${tally.failed} failed`);
process.exit(tally.failed === 0 ? 0 : 1);
