// Tests examples/chat and examples/rooms in a real browser: users chat with each other.
//
//   node tests/browser/browser_test.mjs --chat build/chat --rooms build/rooms [--db FILE] [--shots DIR] [--modules DIR]
//
// --db is for a rooms program with SQLite: its history then survives a restart. Either server may be left out, with
// its steps. Needs Chromium (CHROMIUM names another binary than the packaged one) and playwright-core, which is
// searched for in --modules DIR, then in NODE_PATH, then beside this file. Prints one line per step and ends with
// status 1 if a step failed. --shots makes the pictures of the README.

import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = dirname(fileURLToPath(import.meta.url));
const PAGES = Object.fromEntries(['chat', 'rooms'].map(name => [name, join(HERE, `../../examples/${name}.html`)]));
const TIMEOUT = 60_000;  // ms for one event; generous, because a machine under load is slow
const TOTAL_TIMEOUT = 9 * 60_000;  // ms for all steps
const FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
               '--disable-component-update', '--disable-sync', '--disable-quic'];

// ---- Options -----------------------------------------------------------------------------------------------------

function option(name) {
  const at = process.argv.indexOf('--' + name);
  return at < 0 ? '' : process.argv[at + 1] ?? '';
}

function usage(message) {
  console.error(message);
  process.exit(2);
}

function loadModule(name) {
  const candidates = [option('modules'), option('modules') && join(option('modules'), '..'), HERE].filter(Boolean);
  for (const candidate of candidates) {
    try { return createRequire(join(resolve(candidate), 'here.js'))(name); } catch { /* try the next folder */ }
  }
  return null;
}

function findChromium() {
  const candidates = [process.env.CHROMIUM, '/usr/bin/chromium-headless-shell', '/usr/bin/chromium'];
  return candidates.find(candidate => candidate && existsSync(candidate)) ?? usage('Chromium was not found. Install chromium-headless-shell.');
}

if (!option('chat') && !option('rooms')) usage('Usage: browser_test.mjs --chat PROGRAM --rooms PROGRAM [--shots DIR] [--modules DIR]');
const { chromium } = loadModule('playwright-core')
  ?? usage('playwright-core was not found. Run "npm install --no-package-lock" in tests/browser, or use --modules DIR or NODE_PATH.');
const executablePath = findChromium();

// ---- Steps -------------------------------------------------------------------------------------------------------

const results = { passed: 0, failed: 0 };

async function step(title, action) {
  try {
    await action();
    results.passed += 1;
    console.log('ok - ' + title);
  } catch (error) {
    results.failed += 1;
    console.log('not ok - ' + title);
    console.log(String(error?.stack ?? error).replace(/^/gm, '  # '));
  }
}

function expect(actual, expected, name) {
  const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (a !== e) throw new Error(`${name}: expected ${e}, got ${a}`);
}

function withTimeout(promise, name, ms = TIMEOUT) {
  let timer;
  const expired = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`waited ${ms} ms for ${name}`)), ms); });
  return Promise.race([promise, expired]).finally(() => clearTimeout(timer));
}

// ---- Servers: child processes, stopped by their process ids ------------------------------------------------------

const children = new Set();

async function freePort() {
  const probe = createServer();
  await new Promise(done => probe.listen(0, '127.0.0.1', done));
  const { port } = probe.address();
  await new Promise(done => probe.close(done));
  return port;
}

class Program {
  constructor(path, port, more = []) {
    this.port = port;
    this.output = '';
    this.child = spawn(resolve(path), [String(port), '--page', PAGES[basename(path)] ?? PAGES.rooms, ...more], { stdio: ['ignore', 'pipe', 'pipe'] });
    children.add(this.child);
    this.ended = new Promise(done => {
      this.child.once('error', error => done({ error: String(error) }));
      this.child.once('exit', (status, signal) => done({ status, signal }));
    }).finally(() => children.delete(this.child));
    this.child.stdout.setEncoding('utf8').on('data', text => { this.output += text; });
    this.child.stderr.setEncoding('utf8').on('data', text => { this.output += text; });
  }

  async ready() {
    const printed = new Promise(done => {
      const findAddress = () => {
        const found = this.output.match(/http:\/\/127\.0\.0\.1:\d+\//);
        if (found) done(found[0]);
      };
      this.child.stdout.on('data', findAddress);
      findAddress();
    });
    const died = this.ended.then(how => { throw new Error(`ended before it was ready: ${JSON.stringify(how)}\n${this.output}`); });
    this.address = await withTimeout(Promise.race([printed, died]), 'the address that the server prints');
    return this;
  }

  async stop(signal) {
    this.child.kill(signal);
    return withTimeout(this.ended, `the server to end after ${signal}`);
  }
}

async function start(path, port, more) {
  return new Program(path, port ?? await freePort(), more).ready();
}

// ---- Pages -------------------------------------------------------------------------------------------------------

const browsers = new Set();

async function launch() {
  const server = await chromium.launchServer({ executablePath, args: FLAGS });
  const browser = await chromium.connect(server.wsEndpoint());
  const both = { server, browser };
  browsers.add(both);
  return both;
}

// A user with their own browser context. Contexts share nothing.
class User {
  static async open(browser, address, { name = '', ...options } = {}) {
    const user = new User();
    user.problems = [];
    user.context = await browser.newContext({ locale: 'en-GB', ...options });
    if (name) await user.context.addInitScript(name => localStorage.setItem('wschat.name', name), name);
    await user.context.addInitScript(() => {
      // Records what happens in the page for the test.
      globalThis.testLog = { states: [], violations: [], socket: null, hello: '' };
      globalThis.WebSocket = class extends WebSocket {
        constructor(...options) {
          super(...options);
          testLog.socket = this;
          this.addEventListener('message', event => { if (event.data.startsWith('{"type":"hello"')) testLog.hello = event.data; });
        }
      };
      addEventListener('securitypolicyviolation', event => testLog.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
      addEventListener('DOMContentLoaded', () => {
        const record = () => testLog.states.push(document.body.dataset.state);
        new MutationObserver(record).observe(document.body, { attributeFilter: ['data-state'] });
      });
    });
    user.page = await user.context.newPage();
    user.page.setDefaultTimeout(TIMEOUT);
    user.recordProblems();
    await user.page.goto(address);
    await user.waitForState('connected');
    return user;
  }

  recordProblems() {
    const { page, problems } = this;
    page.on('console', message => {
      // Chromium logs each attempt to connect while the test has taken the page offline.
      const offline = message.text().includes('net::ERR_INTERNET_DISCONNECTED');
      if (!offline && ['error', 'warning'].includes(message.type())) problems.push('console: ' + message.text());
    });
    page.on('pageerror', error => problems.push('exception: ' + error.message));
    page.on('requestfailed', request => problems.push('failed: ' + request.url()));
    page.on('response', response => { if (response.status() >= 400) problems.push(`${response.status()}: ${response.url()}`); });
    page.on('dialog', dialog => { problems.push('dialog: ' + dialog.message()); dialog.dismiss(); });
  }

  waitForState(state) { return this.page.waitForSelector(`body[data-state="${state}"]`); }

  waitFor(condition, argument) { return this.page.waitForFunction(condition, argument); }

  async submit(text) {
    await this.page.fill('#message', text);
    await this.page.press('#message', 'Enter');
  }

  // Sends a message and waits until it comes back from the server.
  async sendMessage(text) {
    await this.submit(text);
    await this.waitForMessage(text, { own: true });
  }

  waitForMessage(text, { own = false } = {}) {
    return this.waitFor(({ text, own }) => [...document.querySelectorAll('#log .message')].some(message =>
      message.classList.contains('own') === own && message.querySelector('.text').textContent === text), { text, own });
  }

  waitForNotice(text) {
    return this.waitFor(text => [...document.querySelectorAll('#log .notice bdi')].some(line => line.textContent.replace(/[\u2068\u2069]/g, '') === text), text);
  }

  countMessages(text) {
    return this.page.evaluate(text => [...document.querySelectorAll('.message .text')].filter(line => line.textContent === text).length, text);
  }

  logText() { return this.page.evaluate(() => document.querySelector('#log').textContent); }

  users() { return this.page.$$eval('#roster bdi', names => names.map(name => name.textContent).sort()); }

  waitForUsers(names) {
    return this.waitFor(names => JSON.stringify([...document.querySelectorAll('#roster bdi')].map(name => name.textContent).sort()) === names,
                      JSON.stringify([...names].sort()));
  }

  async rename(name) {
    await this.page.click('#name');
    await this.page.fill('#ask-input', name);
    await this.page.press('#ask-input', 'Enter');
    await this.waitForName(name);
  }

  waitForName(name) { return this.waitFor(name => document.querySelector('#name').textContent === name, name); }

  // Returns the states of the connection since the last call.
  states() { return this.page.evaluate(() => testLog.states.splice(0)); }

  horizontalOverflow() {
    return this.page.evaluate(() => [document.documentElement, document.body, document.querySelector('#scroll')]
      .map(element => element.scrollWidth - element.clientWidth));
  }

  // Opens a second WebSocket that records how it was closed.
  async openSecondSocket() {
    await this.page.evaluate(() => new Promise((done, failed) => {
      const socket = new WebSocket(location.origin.replace('http', 'ws') + '/chat');
      globalThis.secondSocketClosed = new Promise(closed => { socket.onclose = ({ code, wasClean }) => closed({ code, wasClean }); });
      socket.onopen = () => done();
      socket.onerror = () => failed(new Error('the second socket could not connect'));
    }));
  }

  secondSocketClosed() { return withTimeout(this.page.evaluate(() => globalThis.secondSocketClosed), 'the close of the second socket'); }

  close() { return this.context.close(); }
}

async function expectNoProblems(...users) {
  for (const user of users) {
    expect(user.problems, [], 'console errors, exceptions, failed requests, dialogs');
    expect(await user.page.evaluate(() => testLog.violations), [], 'violations of the content policy');
  }
}

async function expectChat(a, b, topic) {
  await a.sendMessage(`${topic}, says the first`);
  await b.waitForMessage(`${topic}, says the first`);
  await b.sendMessage(`${topic}, says the second`);
  await a.waitForMessage(`${topic}, says the second`);
}

// Presses the key until the element has the focus. Every focused element must show its focus.
async function tabTo(user, id, key) {
  for (let i = 0; i < 30; i++) {
    const focused = await user.page.evaluate(() => {
      const element = document.activeElement;
      const style = getComputedStyle(element);
      return { id: element.id, visible: element === document.body || (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1) };
    });
    if (!focused.visible) throw new Error(`the focus on #${focused.id} cannot be seen`);
    if (focused.id === id) return;
    await user.page.keyboard.press(key);
  }
  throw new Error(`${key} never reaches #${id}`);
}

// ---- chat: one room, plain lines ---------------------------------------------------------------------------------

async function testChat(path) {
  const main = await launch();
  let server, a, b;
  await step('chat prints its address when it is ready and serves the page', async () => {
    server = await start(path);
    a = await User.open(main.browser, server.address);
    b = await User.open(main.browser, server.address);
    expect(await a.page.title(), 'wschat', 'title');
  });
  if (!b) return;

  await step('two pages chat with each other, and each marks its own messages', () => expectChat(a, b, 'Weather'));

  await step('markup in a message stays text', async () => {
    await a.sendMessage('<img src=x onerror=alert(1)>');
    await b.waitForMessage('<img src=x onerror=alert(1)>');
    expect(await b.page.$$eval('#log img', all => all.length), 0, 'images');
  });

  await step('Enter does not send while a character is composed, also where only the key code tells', async () => {
    await a.page.fill('#message', 'composed');
    for (const init of [{ isComposing: true }, { keyCode: 229 }])
      await a.page.$eval('#message', (field, init) => field.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, cancelable: true, ...init })), init);
    expect(await a.page.inputValue('#message'), 'composed', 'the input');
    await a.sendMessage('composed');
  });

  await step('a screen of 320 by 640 does not scroll horizontally, even with long words', async () => {
    const small = await User.open(main.browser, server.address, { viewport: { width: 320, height: 640 } });
    await small.sendMessage('x'.repeat(500));
    expect(await small.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    await small.close();
  });

  await step('axe finds nothing in either colour scheme', async () => { for (const scheme of ['light', 'dark']) await expectAccessible(a, scheme); });
  await step('there was no console error and no violation of the content policy', () => expectNoProblems(a, b));

  await step('the pages reconnect by themselves when the server is back', async () => {
    expect(await server.stop('SIGTERM'), { status: 0, signal: null }, 'how the server ended');
    await a.waitForState('waiting');
    server = await start(path, server.port);
    await a.waitForState('connected');
    await b.waitForState('connected');
    await expectChat(a, b, 'After the return');
  });
  await server.stop('SIGINT');
  await main.browser.close();
}

// ---- rooms: the whole chat ---------------------------------------------------------------------------------------

// axe-core finds what assistive technology cannot use.
async function expectAccessible(user, scheme) {
  await user.page.emulateMedia({ colorScheme: scheme });
  const axe = loadModule('axe-core');
  const script = axe?.source ?? usage('axe-core was not found. Run "npm install --no-package-lock" in tests/browser.');
  const cdp = await user.context.newCDPSession(user.page);                 // the content policy allows no added script
  await cdp.send('Runtime.evaluate', { expression: script });
  const found = await user.page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }).then(result =>
    result.violations.map(each => `${each.id}: ${each.nodes.slice(0, 3).map(node => node.target.join(' ') + ' ' + (node.any[0]?.message ?? '')).join('; ')}`)));
  expect(found, [], `axe, ${scheme}`);
}

async function chooseInMenu(user, text) {
  await user.page.click(`#menu [role="menuitem"]:has-text("${text}")`);
  await user.page.waitForSelector('#menu', { state: 'hidden' });
}
async function openMessageMenu(user, text) {
  const message = user.page.locator('#log .message', { hasText: text }).last();
  await message.hover();
  await message.locator('.tools').click();
}
function title(user, text) { return user.waitFor(text => document.title === text, text); }

async function testRooms(path) {
  const main = await launch();
  let server, anna, bob;
  if (option('db')) for (const end of ['', '-wal', '-shm', '-lock']) rmSync(option('db') + end, { force: true });
  const db = option('db') ? ['--db', option('db')] : [];
  const openUser = (hash, options) => User.open(main.browser, server.address + (hash ? '#' + hash : ''), options);

  await step('the page of rooms shows the room and the users', async () => {
    server = await start(path, undefined, db);
    anna = await openUser('tea', { name: 'Anna' });
    bob = await openUser('tea', { name: 'Bob' });
    expect(await anna.page.textContent('#room'), '# tea', 'room');
    for (const user of [anna, bob]) await user.waitForUsers(['Anna', 'Bob']);
    await anna.waitForNotice('Bob joined');
  });
  if (!bob) return;

  await step('two users chat with each other under their names', async () => {
    await expectChat(anna, bob, 'Biscuits');
    expect(await bob.page.textContent('#log .message:not(.own) .name'), 'Anna', 'name');
  });

  await step('a newcomer is asked for a name', async () => {
    const gil = await openUser('tea');
    await gil.page.waitForSelector('#ask[open]');
    await gil.page.fill('#ask-input', '<b>Gil</b>');
    await gil.page.press('#ask-input', 'Enter');
    await gil.waitForName('<b>Gil</b>');
    await gil.sendMessage('markup <i>stays</i> text');
    await anna.waitForMessage('markup <i>stays</i> text');
    expect(await anna.page.$$eval('#log i, #roster b', all => all.length), 0, 'elements from text');
    await gil.close();
    await anna.waitForUsers(['Anna', 'Bob']).catch(() => {});                  // the grace period may be long
  });

  await step('an unknown command stays in the input, and is sent as text on request', async () => {
    await anna.submit('/usr/bin/true is a path');
    await anna.page.waitForSelector('#ask[open]');
    await anna.page.click('#ask-cancel');
    expect(await anna.page.inputValue('#message'), '/usr/bin/true is a path', 'the input');
    await anna.page.press('#message', 'Enter');
    await anna.page.click('#ask-ok');
    await bob.waitForMessage('/usr/bin/true is a path');
  });

  await step('an address keeps its balanced brackets, and shows what changes the direction of text', async () => {
    await anna.sendMessage('(see https://example.org/a_(b)) and https://example.org/x.');
    expect(await anna.page.$$eval('#log .message:last-child a', all => all.map(each => each.href)), ['https://example.org/a_(b)', 'https://example.org/x'], 'links');
  });

  await step('a long message is folded, and unfolds', async () => {
    await anna.submit('long '.repeat(600).trim());
    await bob.page.waitForSelector('#log .message.long');
    await bob.page.click('#log .message.long .fold');
    await bob.page.waitForSelector('#log .message.long', { state: 'detached' });
  });

  await step('a name of an emoji becomes the emoji, and Tab completes a name', async () => {
    await anna.page.fill('#message', '');
    await anna.page.type('#message', 'hi @bo');
    await anna.page.press('#message', 'Tab');
    await anna.page.type('#message', ':tada:');
    expect(await anna.page.inputValue('#message'), 'hi @Bob \u{1F389}', 'the input');
    await anna.page.press('#message', 'Enter');
    await bob.page.waitForSelector('#log .message.mention mark:has-text("@Bob")');
  });

  await step('ArrowUp edits the last message, in all pages', async () => {
    await anna.sendMessage('with a mistaek');
    await anna.page.press('#message', 'ArrowUp');
    expect(await anna.page.inputValue('#message'), 'with a mistaek', 'the input');
    await anna.submit('without a mistake');
    await bob.waitForMessage('without a mistake');
    expect(await bob.countMessages('with a mistaek'), 0, 'copies of the old text');
    await bob.page.waitForSelector('#log .message .aside:has-text("edited")');
  });

  await step('a reaction is counted, and taken back', async () => {
    await openMessageMenu(bob, 'without a mistake');
    await chooseInMenu(bob, '\u{1F44D}');
    await anna.page.waitForSelector('#log .reactions button:has-text("1")');
    await bob.page.click('#log .reactions button');
    await anna.page.waitForSelector('#log .reactions', { state: 'detached' });
  });

  await step('a deleted message is gone in all pages', async () => {
    await openMessageMenu(anna, 'without a mistake');
    await chooseInMenu(anna, 'Delete');
    await bob.page.waitForSelector('#log .message.removed');
    expect(await bob.countMessages('without a mistake'), 0, 'copies');
  });

  await step('several rooms: unread messages and mentions are counted, drafts are kept, and nobody reconnects', async () => {
    await bob.page.fill('#message', 'a draft');
    await bob.page.evaluate(() => { globalThis.testLog.before = testLog.socket; });
    await bob.page.click('#add-room');
    await bob.page.waitForSelector('#ask[open]');
    await bob.page.fill('#ask-input', 'milk and sugar');
    await bob.page.press('#ask-input', 'Enter');
    await bob.waitFor(() => document.querySelector('#room').textContent === '# milk and sugar');
    await anna.sendMessage('one');
    await anna.sendMessage('two, @Bob');
    await bob.page.waitForSelector('#room-list .badge.loud:has-text("2")');
    await title(bob, '(1) milk and sugar \u00B7 wschat');
    await bob.sendMessage('nobody hears that');
    await bob.page.click('#room-list button:has-text("# tea")');
    await bob.waitForMessage('two, @Bob');
    await bob.page.waitForSelector('#log .divider');
    expect(await bob.page.inputValue('#message'), 'a draft', 'the draft');
    expect(await bob.page.$$eval('#room-list .badge', all => all.length), 0, 'badges');
    expect(await bob.page.evaluate(() => testLog.before === testLog.socket), true, 'the same connection');
    expect((await anna.logText()).includes('nobody hears that'), false, 'text of the other room');
    await bob.page.fill('#message', '');
  });

  await step('leaving a room leaves nothing of it in the header and the list', async () => {
    await bob.page.click('#room-list button[aria-label="Leave # milk and sugar"]');
    await bob.waitFor(() => document.querySelectorAll('#room-list li').length === 1);
    await bob.submit('/leave');
    await bob.waitFor(() => document.querySelector('#room').textContent === 'No room' && document.querySelector('#count').textContent === '' && document.querySelector('#show-people').hidden);
    await bob.page.evaluate(() => { location.hash = 'tea'; });
    await bob.waitForUsers(['Anna', 'Bob']);
  });

  await step('a name is a menu: message privately', async () => {
    await anna.page.click('#roster button:has-text("Bob")');
    await chooseInMenu(anna, 'Message privately');
    await anna.sendMessage('psst');
    await bob.page.waitForSelector('#room-list .badge.loud');
    await bob.page.click('#room-list button:has-text("@ Anna")');
    await bob.waitForMessage('psst');
    for (const user of [anna, bob]) await user.page.click('#room-list button:has-text("# tea")');
  });

  await step('the page scrolls back, keeps its place, and draws few lines', async () => {
    await anna.page.evaluate(async () => {
      for (let i = 0; i < 130; i++) {
        const socket = testLog.socket;
        socket.send(`/tag bulk-${i} bulk ${i}`);
        await new Promise(done => setTimeout(done, i < 15 ? 0 : 230));
      }
    });
    await bob.waitForMessage('bulk 129');
    const late = await openUser('tea', { name: 'Late' });
    await late.waitForMessage('bulk 129');
    for (let i = 0; i < 200 && !(await late.countMessages('Biscuits, says the first')); i++) {
      await late.page.evaluate(() => { document.querySelector('#scroll').scrollTop = 0; });
      await late.page.waitForTimeout(20);
    }
    expect(await late.countMessages('Biscuits, says the first'), 1, 'the first message');
    const lines = await late.page.$$eval('#log > *', all => all.length);
    if (lines > 450) throw new Error(`${lines} lines are drawn`);
    await late.close();
  });

  await step('a screen reader hears a new message, but not the history', async () => {
    await bob.sendMessage('a new message');
    await anna.waitFor(() => document.querySelector('#live').textContent.endsWith('Bob: a new message'));
    const late = await openUser('tea', { name: 'Late' });
    await late.waitForMessage('a new message');
    expect(await late.page.textContent('#live'), '', 'the live region');
    await late.close();
  });

  await step('arrow keys go through the messages, and Enter opens the menu of one', async () => {
    await anna.page.focus('#scroll');
    await anna.page.keyboard.press('ArrowUp');
    await anna.page.keyboard.press('ArrowUp');
    await anna.page.keyboard.press('Enter');
    await anna.page.waitForSelector('#menu:popover-open');
    await anna.page.keyboard.press('Escape');
    await tabTo(anna, 'message', 'Tab');
  });

  await step('a screen of 320 by 640 does not scroll horizontally, and shows rooms and users', async () => {
    const small = await openUser('tea', { name: 'Small', viewport: { width: 320, height: 640 }, isMobile: true, hasTouch: true });
    expect(await small.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    await small.page.click('#show-people');
    await small.page.waitForSelector('#roster li:has-text("Anna")', { state: 'visible' });
    await small.page.keyboard.press('Escape');
    await small.page.click('#show-rooms');
    await small.page.waitForSelector('#room-list li', { state: 'visible' });
    await small.close();
  });

  await step('axe finds nothing in either colour scheme', async () => { for (const scheme of ['light', 'dark']) await expectAccessible(anna, scheme); });

  await step('an offline user gets missed messages, and messages written meanwhile arrive once', async () => {
    await anna.context.setOffline(true);
    await anna.waitForState('waiting');
    await anna.submit('written offline');
    await anna.page.waitForSelector('#outbox .message.waiting');
    await bob.sendMessage('said meanwhile');
    await anna.context.setOffline(false);
    await anna.waitForMessage('said meanwhile');
    await bob.waitForMessage('written offline');
    await anna.waitForMessage('written offline', { own: true });
    expect([await anna.countMessages('written offline'), await anna.countMessages('said meanwhile')], [1, 1], 'copies');
  });

  await step('there was no console error and no violation of the content policy', () => expectNoProblems(anna, bob));

  await step('when the server is back, users return to their room with their names', async () => {
    expect(await server.stop('SIGINT'), { status: 0, signal: null }, 'how the server ended');
    await anna.waitForState('waiting');
    await anna.submit('written while it was away');
    server = await start(path, server.port, db);
    await bob.waitForMessage('written while it was away');
    await anna.waitForMessage('written while it was away', { own: true });
    expect(await anna.countMessages('written while it was away'), 1, 'copies of the message');
    await anna.waitForUsers(['Anna', 'Bob']);
    await expectChat(anna, bob, 'After the return');
  });

  await server.stop('SIGINT');
  await main.browser.close();
}

// ---- Pictures for the README -------------------------------------------------------------------------------------

const SCRIPT = [
  [0, 'Tea in the garden today?'],
  [1, 'Gladly. I bring the ginger biscuits.'],
  [1, 'And Chloé, if her train is on time.'],
  [0, 'Then I take the big pot 🫖'],
  [1, 'Here is the way: https://example.org/garden'],
  [0, 'Found it. See you there!'],
];

async function playChat(users) {
  for (const [who, line] of SCRIPT) {
    await users[who].sendMessage(line);
    await Promise.all(users.filter(user => user !== users[who]).map(user => user.waitForMessage(line)));
  }
  await Promise.all(users.map(user => user.page.evaluate(() => document.activeElement.blur())));
}

// Two pictures side by side on a plain background, each framed like a window.
async function sideBySide(browser, pictures, file) {
  const context = await browser.newContext({ viewport: { width: 1920, height: 740 } });
  const page = await context.newPage();
  const images = pictures.map(picture => `<img src="data:image/png;base64,${picture.toString('base64')}">`).join('');
  await page.setContent(`<style>
    body { margin: 0; display: flex; gap: 36px; padding: 36px; background: linear-gradient(120deg, #dfe6ff, #efe4fb 60%, #ffe9e0); }
    img { width: 900px; border-radius: 14px; box-shadow: 0 14px 40px rgb(30 40 90 / 25%); }
    </style>${images}`);
  await page.evaluate(() => Promise.all([...document.images].map(image => image.decode())));
  await page.screenshot({ path: file, fullPage: true });
  await context.close();
}

async function makePictures(paths, folder) {
  mkdirSync(folder, { recursive: true });
  const main = await launch();
  const common = { reducedMotion: 'reduce', timezoneId: 'Europe/Berlin' };
  const desktop = { ...common, viewport: { width: 900, height: 640 }, colorScheme: 'light' };
  const phone = { ...common, viewport: { width: 390, height: 780 }, colorScheme: 'dark', deviceScaleFactor: 2, isMobile: true, hasTouch: true };

  async function withServer(path, hash, looks, action) {
    const server = await start(path);
    const users = [];
    for (const findAddress of looks) users.push(await User.open(main.browser, server.address + hash, findAddress));
    await action(users);
    for (const user of users) await user.close();
    await server.stop('SIGINT');
  }

  if (paths.chat) await step('picture: chat.png, two browsers side by side', () => withServer(paths.chat, '', [desktop, desktop], async users => {
    await playChat(users);
    await sideBySide(main.browser, [await users[0].page.screenshot(), await users[1].page.screenshot()], join(folder, 'chat.png'));
  }));
  const named = [{ ...desktop, name: 'Anna' }, { ...desktop, name: 'Bob' }, { ...phone, name: 'Chloé' }];
  if (paths.rooms) await step('picture: rooms.png and phone.png, names and a list of users, light and dark', () => withServer(paths.rooms, '#tea', named, async users => {
    for (const user of users) await user.waitForUsers(['Anna', 'Bob', 'Chloé']);
    for (const user of users.slice(0, 2)) {
      for (const room of ['garden', 'biscuits and cake']) {
        await user.submit('/join ' + room);
        await user.waitFor(room => document.querySelector('#room').textContent === '# ' + room, room);
      }
      await user.sendMessage('Who brings plates?');
      await user.page.click('#room-list button:has-text("# tea")');
    }
    await users[0].page.waitForSelector('#room-list .badge');
    await playChat(users);
    await sideBySide(main.browser, [await users[0].page.screenshot(), await users[1].page.screenshot()], join(folder, 'rooms.png'));
    await users[2].sendMessage('It is. Keep a cup for me!');
    await users[2].page.evaluate(() => document.activeElement.blur());
    await users[2].page.screenshot({ path: join(folder, 'phone.png') });
  }));
  await main.browser.close();
}

// ---- The run -----------------------------------------------------------------------------------------------------

async function cleanUp() {
  for (const child of children) child.kill('SIGKILL');
  await Promise.allSettled([...browsers].map(({ server }) => server.kill()));
}

async function end() {
  await cleanUp();
  console.log(`${results.passed} passed, ${results.failed} failed`);
  process.exit(results.failed ? 1 : 0);
}

setTimeout(() => {
  results.failed += 1;
  console.log(`not ok - logText ends withTimeout ${TOTAL_TIMEOUT / 1000} s`);
  end();
}, TOTAL_TIMEOUT).unref();
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => { results.failed += 1; end(); });

const paths = { chat: option('chat'), rooms: option('rooms') };

for (const [name, page] of Object.entries(PAGES)) {
  await step(`${name}.html: its content policy has the hashes of its script and its style`, () => {
    const { status, stderr } = spawnSync(process.execPath, [join(HERE, 'csp.mjs'), page], { encoding: 'utf8' });
    if (status !== 0) throw new Error(stderr);
  });
  await step(`${name}.html: it never parses text as markup and loads nothing from other origins`, () => {
    const found = readFileSync(page, 'utf8').match(/innerHTML|outerHTML|insertAdjacentHTML|document\.write|unsafe-|\b(?:src|href)="(?!data:)[^"]*"/g);
    expect(found ?? [], [], 'forbidden code');
  });
}
try {
  if (paths.chat) await testChat(paths.chat);
  if (paths.rooms) await testRooms(paths.rooms);
  if (option('shots')) await makePictures(paths, resolve(option('shots')));
} catch (error) {
  results.failed += 1;
  console.log('not ok - the run itself\n' + String(error?.stack ?? error).replace(/^/gm, '  # '));
}
await end();
