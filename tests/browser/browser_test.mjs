// Tests examples/chat, examples/rooms and examples/login in a real browser: users chat with each other.
//
//   node tests/browser/browser_test.mjs --chat build/chat --rooms build/rooms --login build/login [--db FILE] [--shots DIR]
//        [--modules DIR]
//
// --db is for a rooms program with SQLite: its history then survives a restart. A server may be left out, with its steps.
// --timeout MS is the deadline for one event. --part chat, rooms, own, login, scripted or many: only this part.
// --browser firefox: the stock Firefox in place of Chromium (FIREFOX names another binary than firefox-esr).
// login has moderators. Needs Chromium (CHROMIUM names another binary than the packaged one) and playwright-core, which is
// searched for in --modules DIR, then in NODE_PATH, then beside this file. Prints one line per step and ends with
// status 1 if a step failed. --shots makes the pictures of the README.

import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = dirname(fileURLToPath(import.meta.url));
const PAGES = Object.fromEntries(['chat', 'rooms'].map(name => [name, join(HERE, `../../examples/${name}.html`)]));
const TIMEOUT = Number(option('timeout')) || 60_000;  // ms for one event; generous, because a machine under load is slow
const TOTAL_TIMEOUT = (option('browser') ? 30 : 9) * 60_000;  // ms for all steps; over WebDriver BiDi they are slower
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

// The stock Firefox, over WebDriver BiDi.
function findFirefox() {
  const candidates = [process.env.FIREFOX, '/usr/bin/firefox-esr', '/usr/bin/firefox'];
  return candidates.find(candidate => candidate && existsSync(candidate)) ?? usage('Firefox was not found. Install firefox-esr.');
}

if (!option('chat') && !option('rooms') && !option('login'))
  usage('Usage: browser_test.mjs --chat PROGRAM --rooms PROGRAM --login PROGRAM [--db FILE] [--shots DIR] [--modules DIR]');
const IN_FIREFOX = option('browser') === 'firefox';
const { chromium, firefox } = loadModule('playwright-core')
  ?? usage('playwright-core was not found. Run "npm install --no-package-lock" in tests/browser, or use --modules DIR or NODE_PATH.');
const executablePath = IN_FIREFOX ? findFirefox() : findChromium();

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
  const browser = IN_FIREFOX ? await firefox.launch({ executablePath, channel: 'moz-firefox' }) : await chromium.launch({ executablePath, args: FLAGS });
  browsers.add(browser);
  return { browser };
}

// A user with their own browser context. Contexts share nothing.
class User {
  // `prepare` is called with the page before it loads anything; `script` runs in the page before its own script.
  static async open(browser, address, { name = '', prepare, script, ...options } = {}) {
    const user = new User();
    user.problems = [];
    user.context = await browser.newContext({ locale: 'en-GB', ...options });
    if (name) await user.context.addInitScript(name => { if (location.protocol === 'http:') localStorage.setItem('wschat.name', name); }, name);
    if (IN_FIREFOX) await user.context.addInitScript({ content: axeSource() });
    await user.context.addInitScript(() => {
      // Records what happens in the page for the test.
      globalThis.testLog = { states: [], violations: [], socket: null, hello: '', longest: 0, read: false };
      globalThis.WebSocket = class extends WebSocket {
        constructor(...options) {
          super(...options);
          testLog.socket = this;
          this.addEventListener('message', event => { if (event.data.startsWith('{"type":"hello"')) testLog.hello = event.data; });
        }
        send(line) {
          testLog.longest = Math.max(testLog.longest, line.length);
          if (line.startsWith('/read ')) testLog.read = true;
          super.send(line);
        }
      };
      addEventListener('securitypolicyviolation', event => testLog.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
      addEventListener('DOMContentLoaded', () => {
        const record = () => testLog.states.push(document.body.dataset.state);
        new MutationObserver(record).observe(document.body, { attributeFilter: ['data-state'] });
      });
    });
    if (script) await user.context.addInitScript(script);
    user.page = await user.context.newPage();
    await prepare?.(user.page);
    user.page.setDefaultTimeout(TIMEOUT);
    user.recordProblems();
    await user.page.goto(address);
    await user.waitForState('connected');
    return user;
  }

  recordProblems() {
    const { page, problems } = this;
    page.on('console', message => {
      // Browsers log each attempt to connect while the test has taken the page offline.
      const offline = message.text().includes('net::ERR_INTERNET_DISCONNECTED');
      if (!offline && ['error', 'warning'].includes(message.type())) problems.push('console: ' + message.text());
    });
    const isAttempt = text => IN_FIREFOX && /^Firefox can.t establish a connection|^The connection to ws:.* was interrupted/.test(text);
    page.on('pageerror', error => { if (!isAttempt(error.message)) problems.push('exception: ' + error.message); });
    page.on('requestfailed', request => { if (!IN_FIREFOX || !/\/chat\b/.test(request.url())) problems.push('failed: ' + request.url()); });
    page.on('response', response => { if (response.status() >= 400) problems.push(`${response.status()}: ${response.url()}`); });
    page.on('dialog', dialog => { problems.push('dialog: ' + dialog.message()); dialog.dismiss(); });
  }

  waitForState(state) { return this.page.waitForSelector(`body[data-state="${state}"]`); }

  waitFor(condition, argument) { return this.page.waitForFunction(condition, argument); }

  async submit(text) {
    // Firefox gets each character as a key.
    if (text.length < 500) await this.page.fill('#message', text);
    else await this.page.$eval('#message', (field, text) => { field.value = text; field.dispatchEvent(new Event('input')); }, text);
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
    return this.waitFor(text => [...document.querySelectorAll('#log .notice bdi')].some(line => {
      const seen = line.textContent.replace(/[\u2068\u2069]/g, '');
      return seen === text || seen.split(', ').includes(text);            // who came and who went are one line
    }), text);
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

  // The tab is hidden, or is shown again. For a user with the script recordAttention.
  async setHidden(hidden) {
    await this.page.evaluate(hidden => {
      attention.hidden = hidden;
      document.dispatchEvent(new Event('visibilitychange'));
    }, hidden);
  }

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
  await user.page.bringToFront();                    // in Firefox, only a window in front shows its focus
  for (let i = 0; i < 30; i++) {
    const focused = await user.page.evaluate(() => {
      const element = document.activeElement;
      const style = getComputedStyle(element);
      return { id: element.id || element.outerHTML.slice(0, 100), visible: element === document.body || (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1) };
    });
    if (!focused.visible) throw new Error(`the focus on ${focused.id} cannot be seen`);
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

function axeSource() {
  return loadModule('axe-core')?.source ?? usage('axe-core was not found. Run "npm install --no-package-lock" in tests/browser.');
}

// axe-core finds what assistive technology cannot use.
async function expectAccessible(user, scheme) {
  await user.page.emulateMedia({ colorScheme: scheme });
  if (!IN_FIREFOX) {
    const cdp = await user.context.newCDPSession(user.page);               // the content policy allows no added script
    await cdp.send('Runtime.evaluate', { expression: axeSource() });
  }
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
async function chooseOption(user, text) {
  await user.page.click('#options');
  await chooseInMenu(user, text);
}
async function menuOf(user, name) {
  await user.page.click(`#roster button:has-text("${name}")`);
  await user.page.waitForSelector('#menu:popover-open');
}

// Replaces in a page what asks for the user's attention, and records it.
function recordAttention() {
  globalThis.attention = { asked: 0, shown: [], tones: 0, badge: 0, hidden: false };
  Navigator.prototype.setAppBadge = async count => { attention.badge = count; };
  Navigator.prototype.clearAppBadge = async () => { attention.badge = 0; };
  globalThis.Notification = class {
    static permission = 'default';
    static async requestPermission() {
      attention.asked += 1;
      return Notification.permission = 'granted';
    }
    constructor(title, { body }) { attention.shown.push(`${title} | ${body.replace(/[\u2068\u2069]/g, '')}`); }
    close() {}
  };
  globalThis.AudioContext = class {
    currentTime = 0;
    createOscillator() {
      attention.tones += 1;
      return { frequency: {}, connect: next => next, start() {}, stop() {} };
    }
    createGain() { return { gain: {}, connect() {} }; }
    close() {}
  };
  Object.defineProperty(Document.prototype, 'hidden', { get: () => attention.hidden });
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

  await step('a name that is taken needs no warning: the second user gets another one, and is another user', async () => {
    const other = await openUser('tea', { name: 'Anna' });
    await other.waitForName('Anna-2');
    await anna.sendMessage('from the first Anna');
    await other.waitForMessage('from the first Anna');
    expect(await other.page.$$eval('#log .message.own, #log .notice.bad', all => all.length), 0, 'own messages and warnings');
    await other.close();
  });

  await step('a command that the server refuses comes back into the input, with the reason', async () => {
    await bob.submit('/nick Anna');
    await bob.page.waitForSelector('#log .notice.bad:has-text("That name is taken")');
    expect(await bob.page.inputValue('#message'), '/nick Anna', 'the input');
    await bob.page.fill('#message', '');
  });

  await step('Enter does not send while a character is composed, also where only the key code tells', async () => {
    await bob.page.fill('#message', 'composed in a room');
    for (const init of [{ isComposing: true }, { keyCode: 229 }])
      await bob.page.$eval('#message', (field, init) => field.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, cancelable: true, ...init })), init);
    expect(await bob.page.inputValue('#message'), 'composed in a room', 'the input');
    await bob.sendMessage('composed in a room');
  });

  await step('a room with the name ".." is a room', async () => {
    const dot = await openUser('..', { name: 'Dot' });
    await dot.waitFor(() => document.querySelector('#room').textContent === '# ..');
    await dot.sendMessage('between the dots');
    await dot.close();
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

  await step('the list of rooms has a button for each', async () => {
    await anna.submit('/rooms');
    await anna.page.click('#ask-choices button:has-text("# milk and sugar, 1 here")');
    await anna.waitFor(() => document.querySelector('#room').textContent === '# milk and sugar');
    await anna.waitForUsers(['Anna', 'Bob']);
    await anna.page.click('#room-list button[aria-label="Leave # milk and sugar"]');
    await anna.waitFor(() => document.querySelector('#room').textContent === '# tea');
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

  await step('the keyboard goes through the page from its top to its end', async () => {
    const order = [];
    await anna.page.bringToFront();
    await anna.page.evaluate(() => { document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus(); });
    while (order.at(-1) !== 'roster') {
      await anna.page.keyboard.press('Tab');
      order.push(await anna.page.evaluate(() => document.activeElement.closest('#room-list, #roster, [id]').id));
      if (order.length > 30) break;
    }
    expect([...new Set(order)], ['options', 'add-room', 'room-list', 'scroll', 'log', 'message', 'send', 'name', 'roster'], 'the order; in the log is an address');
    await anna.page.evaluate(() => document.body.removeAttribute('tabindex'));
  });

  await step('notifications: the page asks only on a click, and shows mentions and private messages of a hidden tab', async () => {
    const dora = await openUser('tea', { name: 'Dora', script: recordAttention });
    const shown = () => dora.page.evaluate(() => attention.shown);
    await dora.setHidden(true);
    await anna.sendMessage('@Dora before the click');
    await dora.waitForMessage('@Dora before the click');
    await title(dora, '(1) tea \u00B7 wschat');
    expect(await dora.page.evaluate(() => attention.badge), 1, 'the badge');
    await dora.page.waitForSelector('#log .divider');                       // new since the user left
    await dora.setHidden(false);
    await title(dora, 'tea \u00B7 wschat');
    expect(await dora.page.evaluate(() => [attention.badge, attention.asked]), [0, 0], 'the badge, questions');
    expect(await shown(), [], 'notifications');
    await chooseOption(dora, 'Notify me about mentions');
    await dora.waitFor(() => attention.asked === 1);
    await anna.sendMessage('@Dora while the tab is shown');
    await dora.waitForMessage('@Dora while the tab is shown');
    await dora.setHidden(true);
    await anna.sendMessage('@Dora in a hidden tab');
    await anna.sendMessage('for nobody');
    await menuOf(anna, 'Dora');
    await chooseInMenu(anna, 'Message privately');
    await anna.sendMessage('a secret for Dora');
    await anna.page.click('#room-list button:has-text("# tea")');
    await dora.waitFor(() => attention.shown.length === 2);
    expect(await shown(), ['# tea | Anna: @Dora in a hidden tab', '@ Anna | Anna: a secret for Dora'], 'notifications');
    await dora.setHidden(false);
    await title(dora, '(1) tea \u00B7 wschat');
    await dora.close();
  });

  await step('a sound is off until it is switched on, and then tells of mentions', async () => {
    const dana = await openUser('tea', { name: 'Dana', script: recordAttention });
    const tones = () => dana.page.evaluate(() => attention.tones);
    await dana.setHidden(true);
    await anna.sendMessage('@Dana without a sound');
    await dana.waitForMessage('@Dana without a sound');
    expect(await tones(), 0, 'tones');
    await dana.setHidden(false);
    await chooseOption(dana, 'Play a sound');
    expect(await tones(), 1, 'tones: the choice is heard');
    await dana.setHidden(true);
    await anna.sendMessage('@Dana with a sound');
    await dana.waitFor(() => attention.tones === 2);
    await dana.close();
  });

  await step('text from right to left stays in its place, and a name cannot turn the line around', async () => {
    const arabic = '\u0645\u0631\u062D\u0628\u0627';
    await bob.submit('/nick Bob\u202Eevil');
    await bob.page.waitForSelector('#log .notice.bad:has-text("visible text")');
    expect(await bob.page.textContent('#name'), 'Bob', 'the name');
    const guest = await openUser('tea', { name: arabic });
    await anna.waitForNotice(`${arabic} joined`);
    await guest.sendMessage(`${arabic} 1 2 3`);
    await anna.waitForMessage(`${arabic} 1 2 3`);
    const seen = await anna.page.evaluate(name => {
      const line = [...document.querySelectorAll('#log .notice bdi')].find(each => each.textContent.includes(name)).firstChild;
      const left = word => {
        const range = document.createRange();
        range.setStart(line, line.data.indexOf(word));
        range.setEnd(line, line.data.indexOf(word) + word.length);
        return range.getBoundingClientRect().left;
      };
      const text = [...document.querySelectorAll('#log .message .text')].at(-1);
      return { nameFirst: left(name) < left('joined'), direction: getComputedStyle(text).direction, time: getComputedStyle(text.parentElement).direction };
    }, arabic);
    expect(seen, { nameFirst: true, direction: 'rtl', time: 'ltr' }, 'the directions');
    await guest.submit('https://example.org/\u202Egnp.exe');
    await anna.page.waitForSelector('#log a:has-text("[U+202E]")');
    await guest.close();
  });

  await step('a text that is too long in bytes stays in the input, with a sentence, and is not sent', async () => {
    await bob.page.evaluate(() => { testLog.longest = 0; });
    await bob.submit('\u8336'.repeat(6000));
    await bob.waitForNotice('The message has 18000 bytes, but the limit is 16384. It is still in the input.');
    expect((await bob.page.inputValue('#message')).length, 6000, 'characters in the input');
    expect(await bob.page.evaluate(() => testLog.longest < 6000), true, 'nothing long was sent');
    await bob.sendMessage('\u8336'.repeat(5000));
    await bob.page.fill('#message', '');
  });

  await step('a change that the server refuses comes back into the input, with the reason', async () => {
    await anna.sendMessage('about to go');
    await anna.page.press('#message', 'ArrowUp');
    await anna.context.setOffline(true);
    await anna.waitForState('waiting');
    await anna.submit('changed while offline');
    await anna.waitForNotice('There is no connection.');
    expect([await anna.page.inputValue('#message'), await anna.page.isVisible('#editing')], ['changed while offline', true], 'the input');
    await anna.context.setOffline(false);
    await anna.waitForState('connected');
    const tab = await anna.context.newPage();                                 // of the same user, who deletes the message there
    await tab.goto(server.address + '#tea');
    const message = tab.locator('#log .message', { hasText: 'about to go' });
    await message.hover();
    await message.locator('.tools').click();
    await tab.click('#menu [role="menuitem"]:has-text("Delete")');
    await anna.waitFor(() => [...document.querySelectorAll('#log .message')].at(-1).classList.contains('removed'));
    await tab.close();
    await anna.submit('changed too late');
    await anna.waitForNotice('There is no such message in this room.');
    expect([await anna.page.inputValue('#message'), await anna.page.isVisible('#editing')], ['changed too late', false], 'the input');
    await anna.page.fill('#message', '');
  });

  await step('a page that loads again shows what is new since the user left', async () => {
    const flo = await openUser('tea', { name: 'Flo' });
    await anna.sendMessage('read by Flo');
    await flo.waitForMessage('read by Flo');
    await flo.waitFor(() => testLog.read);                                    // the read marker was sent
    await flo.page.goto('about:blank');
    await anna.sendMessage('new for Flo');
    await flo.page.goto(server.address + '#tea');
    await flo.page.waitForSelector('#log .divider + .message:has-text("new for Flo")');
    await flo.close();
  });

  await step('a screen of 320 by 640 does not scroll horizontally, and shows rooms and users', async () => {
    const small = await openUser('tea', { name: 'Small', viewport: { width: 320, height: 640 }, isMobile: true, hasTouch: true });
    expect(await small.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    expect(await small.page.$eval('#room', name => name.scrollWidth > name.clientWidth), false, 'the name of the room is cut off');
    await small.page.click('#show-people');
    await small.page.waitForSelector('#roster li:has-text("Anna")', { state: 'visible' });
    await small.page.keyboard.press('Escape');
    await small.page.click('#show-rooms');
    await small.page.waitForSelector('#room-list li', { state: 'visible' });
    await small.close();
  });

  await step('axe finds nothing in either colour scheme, also in menus, dialogs and panels', async () => {
    const small = await openUser('tea', { name: 'Small', viewport: { width: 320, height: 640 } });
    for (const scheme of ['light', 'dark']) {
      await expectAccessible(anna, scheme);
      await menuOf(anna, 'Bob');
      await expectAccessible(anna, scheme);
      await anna.page.keyboard.press('Escape');
      await anna.page.click('#add-room');
      await anna.page.waitForSelector('#ask-choices button');
      await expectAccessible(anna, scheme);
      await anna.page.click('#ask-cancel');
      for (const panel of ['#show-people', '#show-rooms']) {
        await small.page.click(panel);
        await expectAccessible(small, scheme);
        await small.page.keyboard.press('Escape');
      }
    }
    await small.close();
  });

  await step('the page does not jump when it loads, when the connection is lost and when it is back', async () => {
    if (IN_FIREFOX) return;                                                   // it does not measure that
    const still = await openUser('tea', { name: 'Still', script: () => {
      globalThis.jumps = 0;
      new PerformanceObserver(list => { for (const entry of list.getEntries()) jumps += entry.value; }).observe({ type: 'layout-shift', buffered: true });
    } });
    await still.page.waitForSelector('#log .message');
    await still.context.setOffline(true);
    await still.waitForState('waiting');
    await still.context.setOffline(false);
    await still.waitForState('connected');
    const jumps = await still.page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(jumps)))));
    if (jumps > 0.03) throw new Error(`the layout shift is ${jumps}`);
    await still.close();
  });

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

  await step('private messages wait for a user who is away, and the conversation survives a restart of the server', async () => {
    const eve = await openUser('tea', { name: 'Eve' });
    await anna.waitForNotice('Eve joined');
    await menuOf(anna, 'Eve');
    await chooseInMenu(anna, 'Message privately');
    await anna.sendMessage('for now');
    await eve.page.click('#room-list button:has-text("@ Anna")');
    await eve.waitForMessage('for now');
    expect(await eve.countMessages('for now'), 1, 'copies');
    expect(await eve.users(), ['Anna', 'Eve'], 'the users of the conversation');
    await eve.sendMessage('thank you');
    await anna.waitForMessage('thank you');
    const storageState = await eve.context.storageState();
    await eve.close();
    await anna.sendMessage('for later');
    if (db.length) {
      expect(await server.stop('SIGTERM'), { status: 0, signal: null }, 'how the server ended');
      server = await start(path, server.port, db);
      await anna.waitForState('connected');
    }
    const back = await openUser('tea', { storageState });
    await back.page.click('#room-list li.unread button:has-text("@ Anna")');
    await back.waitForMessage('for later');
    await back.waitForMessage('thank you', { own: true });
    await back.sendMessage('I am back');
    await anna.waitForMessage('I am back');
    expect([await anna.countMessages('thank you'), await anna.countMessages('for later')], [1, 1], 'copies');
    await anna.page.reload();
    await anna.page.click('#room-list button:has-text("@ Eve")');
    await anna.waitForMessage('I am back');
    await anna.page.click('#room-list button[aria-label="Leave @ Eve"]');
    await anna.waitFor(() => document.querySelector('#room').textContent === '# tea');
    await back.page.reload();                                               // nothing is new, and the conversation is there
    await back.page.click('#room-list button:has-text("@ Anna")');
    await back.waitForMessage('for later');
    expect(await back.page.$$eval('#room-list .badge', all => all.length), 0, 'badges');
    await anna.page.reload();
    await anna.waitForState('connected');
    await anna.waitForUsers(['Anna', 'Bob', 'Eve']);
    expect(await anna.page.$$eval('#room-list li', all => all.map(each => each.firstChild.textContent).sort()), ['# tea', '@ Bob', '@ Dora'], 'what Anna has not closed');
    await menuOf(anna, 'Eve');
    await chooseInMenu(anna, 'Message privately');
    await anna.waitForMessage('I am back');
    await back.sendMessage('still there?');
    await anna.waitForMessage('still there?');
    await back.close();
  });

  await server.stop('SIGINT');
  await main.browser.close();
}

// ---- login: members and moderators -------------------------------------------------------------------------------

class Members {
  static async start(browser, path, names) {
    const members = new Members();
    members.browser = browser;
    members.server = await start(path, undefined, names.flatMap((name, at) => [at === 0 ? '--moderator' : '--user', `${name}:tea`]));
    return members;
  }
  // Logs in by the form of the program, and opens the page.
  open(name, options) {
    const prepare = async page => {
      await page.goto(this.server.address + 'login');
      await page.fill('[name=name]', name);
      await page.fill('[name=password]', 'tea');
      await page.click('button');
      await page.waitForSelector('body[data-state="connected"]');
    };
    return User.open(this.browser, this.server.address + 'rooms.html#tea', { ...options, prepare });
  }
}

async function testModeration(path) {
  const main = await launch();
  let members, mo, anna, bob;
  const menuTexts = async (user, name) => {
    await menuOf(user, name);
    const texts = await user.page.$$eval('#menu [role="menuitem"]', all => all.map(each => each.textContent));
    await user.page.keyboard.press('Escape');
    return texts;
  };

  await step('members log in, and only the menu of a moderator can mute, remove and ban', async () => {
    members = await Members.start(main.browser, path, ['Mo', 'Anna', 'Bob', 'Dora']);
    [mo, anna, bob] = [await members.open('Mo'), await members.open('Anna'), await members.open('Bob')];
    for (const user of [mo, anna, bob]) await user.waitForUsers(['Anna', 'Bob', 'Mo']);
    expect(await menuTexts(mo, 'Bob'), ['Message privately', 'Mention', 'Mute for 10 minutes', 'Remove from the room', 'Ban for an hour'], 'the menu of Mo');
    expect(await menuTexts(anna, 'Bob'), ['Message privately', 'Mention'], 'the menu of Anna');
  });
  if (!bob) return;

  await step('a moderator deletes the message of another one', async () => {
    await anna.sendMessage('not for this room');
    await mo.waitForMessage('not for this room');
    await openMessageMenu(mo, 'not for this room');
    await chooseInMenu(mo, 'Delete');
    await anna.page.waitForSelector('#log .message.removed');
  });

  await step('a muted user reads why a message was not sent, and may discard it', async () => {
    await menuOf(mo, 'Bob');
    await chooseInMenu(mo, 'Mute for 10 minutes');
    await mo.waitForNotice('You have muted Bob.');
    await bob.submit('may I?');
    await bob.page.waitForSelector('#outbox .message.refused .fate:has-text("Not sent: ")');
    await bob.page.click('#outbox .fate button:has-text("Send again")');
    await bob.page.waitForSelector('#outbox .message.refused .fate:has-text("Not sent: ")');
    await bob.page.click('#outbox .fate button:has-text("Edit")');
    expect(await bob.page.inputValue('#message'), 'may I?', 'the input');
    await bob.submit('may I speak?');
    await bob.page.waitForSelector('#outbox .message.refused:has-text("may I speak?")');
    await bob.page.click('#outbox .fate button:has-text("Discard")');
    await bob.page.waitForSelector('#outbox .message', { state: 'detached' });
    await mo.submit('/unmute Bob');
    await mo.waitForNotice('Bob may speak again.');
    await bob.sendMessage('thank you');
    await anna.waitForMessage('thank you');
  });

  const gate = (user, text) => user.waitFor(text => document.querySelector('#gate-text').textContent.startsWith(text) && !document.querySelector('#gate').hidden, text);
  const noGate = user => user.waitFor(() => document.querySelector('#gate').hidden);
  const setSlow = async seconds => {
    await chooseOption(mo, 'Slow mode');
    await mo.page.fill('#ask-input', String(seconds));
    await mo.page.press('#ask-input', 'Enter');
  };

  await step('in a slow room a countdown stands above the input, and what is written too early stays there', async () => {
    await setSlow(600);
    await gate(anna, 'Slow room: one message in 600 s.');
    await anna.waitForNotice('The room is public. Everybody writes. One message in 600 s.');
    await anna.sendMessage('the first of mine');
    await gate(anna, 'Slow room: you may write again in 5');
    await anna.submit('too early');
    await anna.waitFor(() => document.querySelector('#announce').textContent.startsWith('Slow room: '));
    expect([await anna.page.inputValue('#message'), await anna.page.$$eval('#outbox .message', all => all.length)], ['too early', 0], 'the input and the outbox');
    if (!IN_FIREFOX) await expectAccessible(anna, 'dark');
    for (const text of ['one', 'two']) await mo.sendMessage(`${text} of a moderator`);
    await setSlow(0);
    await noGate(anna);
    await anna.page.press('#message', 'Enter');
    await mo.waitForMessage('too early');
    await setSlow('x');
    await mo.page.waitForSelector('#log .notice.bad:has-text("/slow SECONDS")');
  });

  await step('in a read-only room the input is locked with a sentence, except for moderators', async () => {
    await anna.page.fill('#message', 'a draft');
    await chooseOption(mo, 'Only moderators write');
    await gate(anna, 'Only moderators write in this room.');
    expect(await anna.page.$eval('#message', field => field.readOnly), true, 'the input is locked');
    await anna.page.press('#message', 'Enter');
    await expectAccessible(anna, 'light');
    expect(await mo.page.$eval('#message', field => field.readOnly), false, 'the input of the moderator is locked');
    await mo.sendMessage('news');
    await chooseOption(mo, 'Everybody writes');
    await noGate(anna);
    expect(await anna.page.inputValue('#message'), 'a draft', 'the draft');
    await anna.sendMessage('written again');
  });

  await step('a private room has a lock, lets nobody in without an invitation, and its users invite', async () => {
    await chooseOption(mo, 'Make the room private');
    for (const user of [mo, anna]) await user.page.waitForSelector('#title .lock');
    await anna.page.waitForSelector('#room-list li:has-text("# tea") .lock');
    const dora = await members.open('Dora');
    await dora.waitForNotice('That room is private; somebody in it can invite you.');
    await dora.page.reload();
    await gate(dora, 'That room is private');
    await dora.page.waitForSelector('#room-list li.refused:has-text("# tea")');
    expect([await dora.page.$eval('#message', field => field.readOnly), await dora.users()], [true, []], 'the locked input, the users');
    await expectAccessible(dora, 'dark');
    await dora.page.click('#try-again');
    await dora.waitFor(() => document.querySelector('#announce').textContent.startsWith('That room is private'));
    for (const user of [dora, anna]) {
      await user.page.click('#room-list button:has-text("# lobby")');
      await user.waitForUsers(['Anna', 'Bob', 'Dora', 'Mo']);
    }
    await menuOf(anna, 'Dora');
    await chooseInMenu(anna, 'Invite to # tea');
    await anna.waitForNotice('You have invited Dora to tea.');
    await dora.page.waitForSelector('#invitation:has-text("invites you to #")');
    await expectAccessible(dora, 'light');
    await dora.page.click('#not-now');
    await dora.page.waitForSelector('#invitation', { state: 'hidden' });
    await anna.page.click('#room-list button:has-text("# tea")');
    await anna.waitForUsers(['Anna', 'Bob', 'Mo']);
    await chooseOption(anna, 'Invite somebody');
    await anna.page.fill('#ask-input', 'Dora');
    await anna.page.press('#ask-input', 'Enter');
    await dora.page.click('#enter');
    await dora.waitForUsers(['Anna', 'Bob', 'Dora', 'Mo']);
    await noGate(dora);
    await dora.sendMessage('thank you for the invitation');
    await chooseOption(mo, 'Make the room public');
    await anna.page.waitForSelector('#title .lock', { state: 'detached' });
    await dora.submit('/leave');
    await dora.waitFor(() => document.querySelector('#room').textContent === '# lobby');
    await dora.close();
    await anna.waitForUsers(['Anna', 'Bob', 'Mo']);
  });

  await step('a user who is removed reads why, stays away, and comes back on a click', async () => {
    await menuOf(mo, 'Bob');
    await chooseInMenu(mo, 'Remove from the room');
    await bob.waitForState('closed');
    expect(await bob.page.textContent('#countdown'), 'You are not connected. You were asked to leave.', 'the reason');
    expect(await bob.users(), [], 'the users');
    for (const user of [mo, anna]) await user.waitForUsers(['Anna', 'Mo']);
    await mo.waitForNotice('You have removed Bob from the room.');
    await bob.page.click('#retry');
    await bob.waitForState('connected');
    await anna.waitForUsers(['Anna', 'Bob', 'Mo']);
  });

  await step('a banned user stays out until the moderator ends the ban', async () => {
    await menuOf(mo, 'Bob');
    await chooseInMenu(mo, 'Ban for an hour');
    await bob.waitForState('closed');
    expect(await bob.page.textContent('#countdown'), 'You are not connected. You are banned.', 'the reason');
    await bob.page.click('#retry');
    await bob.waitForState('waiting');
    await mo.page.click('#options');
    await mo.page.click('#menu [role="menuitem"]:has-text("End a ban")');
    await mo.page.click('#menu [role="menuitem"]:has-text("Bob")');
    await mo.waitForNotice('The ban of Bob has ended.');
    await bob.page.evaluate(() => document.querySelector('#retry').click());
    await bob.waitForState('connected');
    await bob.sendMessage('back again');
    await anna.waitForMessage('back again');
    await chooseOption(mo, 'End a ban');
    await mo.waitForNotice('Nobody is banned.');
  });

  await step('there was no console error and no violation of the content policy', async () => {
    bob.problems = bob.problems.filter(each => !each.includes('403'));         // Chromium logs the refused handshake
    await expectNoProblems(mo, anna, bob);
  });
  await members.server.stop('SIGINT');
  await main.browser.close();
}

// ---- What a server seldom does: the page is real, the server is a script --------------------------------------------

async function testScripted(path) {
  const main = await launch(), server = await start(path);
  let user, socket, answer = () => {};
  const send = event => socket.send(JSON.stringify(event));
  const said = (id, text, more) => ({ type: 'said', room: 'tea', id, user: 'BOB', name: 'Bob', text, time: Date.now(), ...more });
  const prepare = page => page.routeWebSocket(/\/chat/, route => {
    socket = route;
    send({ type: 'hello', version: 3, room: 'tea', name: 'Anna', user: 'ANNA', features: ['history', 'before', 'read'], may: ['say', 'private'], limits: {} });
    send({ type: 'users', room: 'tea', count: 2, users: [{ user: 'ANNA', name: 'Anna' }, { user: 'BOB', name: 'Bob' }] });
    send({ type: 'history', room: 'tea', epoch: 'e', last: 1, gap: false, more: false, entries: [said(1, 'hello')] });
    route.onMessage(line => {
      const [, tag, rest] = line.match(/^\/tag (\S+) ([^]*)$/) ?? [, undefined, line];
      if (rest === '/help') send({ type: 'help', commands: [], tag });
      else if (tag) answer(rest, tag);
    });
  });

  await step('a mention is one of the id of the user, not of the name', async () => {
    user = await User.open(main.browser, server.address + '#tea', { name: 'Anna', prepare });
    await user.waitForMessage('hello');
    send(said(2, 'for another @Anna', { mentions: ['OTHER'] }));
    send(said(3, 'for this @Anna', { mentions: ['ANNA'] }));
    await user.page.waitForSelector('#log .message.mention:has-text("for this")');
    expect(await user.page.$$eval('#log .message.mention', all => all.length), 1, 'mentions');
  });
  if (!user) return;

  await step('what a room refuses as read-only goes back into the input', async () => {
    answer = (rest, tag) => send({ type: 'error', code: 'read_only', text: 'Only moderators speak in this room.', tag });
    await user.submit('a moment too late');
    await user.waitFor(() => document.querySelector('#message').value === 'a moment too late' && document.querySelector('#outbox').childElementCount === 0);
    await user.page.fill('#message', '');
  });

  await step('a full room says so, and is entered when a place is free', async () => {
    answer = (rest, tag) => send({ type: 'error', code: 'room_full', text: 'That room is full.', room: 'milk', tag });
    send({ type: 'error', code: 'refused', text: 'That room is full.', room: 'tea' });               // of a room that was entered: a notice
    await user.waitForNotice('That room is full.');
    await user.submit('/join milk');
    await user.waitFor(() => document.querySelectorAll('#log .notice.bad').length === 2);
    expect(await user.page.inputValue('#message'), '/join milk', 'the input');
    await user.page.fill('#message', '');
  });

  await step('a limit of read markers is told once', async () => {
    for (let i = 0; i < 3; i++) send({ type: 'error', code: 'read_limit', text: 'You have too many read markers.' });
    send(said(4, 'after the errors'));
    await user.waitForMessage('after the errors');
    expect(await user.page.$$eval('#log .notice.bad', all => all.filter(each => each.textContent.includes('read markers')).length), 1, 'notices');
  });

  await step('joins and leaves are one line, with the last that each one did', async () => {
    const people = Array.from({ length: 12 }, (_, i) => ({ user: `U${i}`, name: `User ${i}` }));
    send({ type: 'join', room: 'tea', count: 14, users: people, time: Date.now() });
    await user.waitForNotice('12 people joined');
    await user.waitFor(() => document.querySelector('#count').textContent === '14 here');
    for (let i = 0; i < 5; i++) for (const type of ['leave', 'join']) send({ type, room: 'tea', count: 13, ...people[0], time: Date.now() });
    send({ type: 'leave', room: 'tea', count: 13, ...people[1], time: Date.now() });
    await user.waitFor(() => [...document.querySelectorAll('#log .notice bdi')].at(-1).textContent.replace(/[\u2068\u2069]/g, '') === '11 people joined, User 1 left');
  });

  await step('a large room shows a number, and one that hides its users says so', async () => {
    send({ type: 'users', room: 'tea', count: 4321 });
    await user.waitFor(() => document.querySelector('#count').textContent === '4321 here' && document.querySelector('#roster').textContent === 'and 4321 more');
    send({ type: 'users', room: 'tea' });
    await user.waitFor(() => document.querySelector('#count').textContent === 'This room does not show who is here.');
  });

  await step('an own event and an unknown event of a program change nothing', async () => {
    send({ type: 'event', room: 'tea', name: 'weather', data: { sun: true }, time: 1 });
    send({ type: 'of tomorrow', room: 'tea' });
    send(said(5, 'with data', { data: { cups: 2 } }));
    await user.waitForMessage('with data');
  });
  await step('there was no console error', () => expectNoProblems(user));
  await server.stop('SIGINT');
  await main.browser.close();
}

// ---- The page of the guide in examples/README.md ---------------------------------------------------------------------

async function testOwnPage(path) {
  const main = await launch(), folder = mkdtempSync(join(tmpdir(), 'wschat-own-'));
  let server;
  await step('the page of the guide has 30 lines, and two of them chat', async () => {
    const page = readFileSync(join(HERE, '../../examples/README.md'), 'utf8').match(/```html\n([^]*?)```/)[1];
    expect(page.split('\n').length - 1 <= 30, true, 'at most 30 lines');
    writeFileSync(join(folder, 'own.html'), page);
    server = await start(path, undefined, ['--page', join(folder, 'own.html')]);
    const open = async () => {
      const context = await main.browser.newContext(), opened = await context.newPage();
      opened.setDefaultTimeout(TIMEOUT);
      await opened.goto(server.address);
      await opened.waitForSelector('#state:has-text("connected")');
      return opened;
    };
    const [one, two] = [await open(), await open()];
    for (const [from, to, text] of [[one, two, '<b>Hello</b>'], [two, one, 'Hello yourself']]) {
      await from.fill('#text', text);
      await from.press('#text', 'Enter');
      for (const each of [from, to]) await each.waitForFunction(text => [...document.querySelectorAll('#log li')].at(-1)?.textContent.endsWith(': ' + text), text);
    }
    expect(await one.$$eval('#log li', all => all.length), 2, 'messages');
  });
  await server?.stop('SIGINT');
  rmSync(folder, { recursive: true });
  await main.browser.close();
}

// ---- A room of 10,000 messages: the page is real, the server is a script --------------------------------------------

const MANY = 10_000;
function numbered(id) {
  return { type: 'said', room: 'tea', id, user: 'BOB', name: 'Bob', text: `number ${id}${' and so on'.repeat(id % 23)}`, time: 1.7e12 + 1000 * id };
}
function numbers(from, to) { return Array.from({ length: Math.max(0, to - from) }, (_, at) => numbered(from + at)); }

class ManyMessages {
  async route(page) {
    await page.routeWebSocket(/\/chat/, socket => {
      this.socket = socket;
      this.last = MANY;
      this.send({ type: 'hello', version: 3, room: 'tea', name: 'Anna', user: 'ANNA', features: ['before', 'history'], may: ['say'], limits: {} });
      this.send({ type: 'users', room: 'tea', count: 200, users: Array.from({ length: 200 }, (_, i) => ({ user: `U${i}`, name: `User ${i}` })) });
      this.send({ type: 'history', room: 'tea', epoch: 'e', last: MANY, gap: false, more: true, entries: numbers(MANY - 99, MANY + 1) });
      socket.onMessage(line => {
        const [, tag, rest] = line.match(/^\/tag (\S+) (.*)$/) ?? [];
        const [, before, limit] = rest?.match(/^\/before (\d+) (\d+)$/) ?? [];
        const from = Math.max(1, before - limit);
        if (before) this.send({ type: 'history', room: 'tea', before: Number(before), gap: false, more: from > 1, entries: numbers(from, Number(before)), tag });
        else if (tag) this.send({ type: 'help', commands: [], tag });
      });
    });
  }
  send(event) { this.socket.send(JSON.stringify(event)); }
  say(count) { for (let i = 0; i < count; i++) this.send(numbered(this.last += 1)); }
}

// The numbers of the drawn messages. They must follow each other.
async function drawnNumbers(user) {
  const { found, nodes } = await user.page.evaluate(() => ({ nodes: document.querySelectorAll('#log *').length,
    found: [...document.querySelectorAll('#log .message .text')].map(each => parseInt(each.textContent.slice(7))) }));
  found.forEach((number, at) => { if (at > 0 && number !== found[at - 1] + 1) throw new Error(`${number} follows ${found[at - 1]}`); });
  if (found.length > 450 || nodes > 5000) throw new Error(`${found.length} messages and ${nodes} elements are drawn`);
  return { first: found[0], last: found.at(-1) };
}

function waitForNewest(user, number) {
  return user.waitFor(number => parseInt([...document.querySelectorAll('#log .message .text')].at(-1)?.textContent.slice(7)) === number, number);
}

async function testMany(path) {
  const main = await launch(), server = await start(path), many = new ManyMessages();
  let anna;
  await step('a room of 10,000 messages: the page keeps its place while it scrolls back, and draws few of them', async () => {
    anna = await User.open(main.browser, server.address + '#tea', { name: 'Anna', prepare: page => many.route(page) });
    await waitForNewest(anna, 10000);
    for (let { first } = await drawnNumbers(anna); first > 1; { first } = await drawnNumbers(anna)) {
      const moved = await anna.page.evaluate(async first => {
        const scroll = document.querySelector('#scroll'), number = each => parseInt(each.textContent.slice(7));
        const textOf = wanted => [...document.querySelectorAll('#log .message .text')].find(each => number(each) === wanted);
        scroll.scrollTop = 60;
        const before = textOf(first).getBoundingClientRect().bottom;
        while (number(document.querySelector('#log .message .text')) === first) await new Promise(requestAnimationFrame);
        return Math.abs(textOf(first).getBoundingClientRect().bottom - before);
      }, first);
      if (moved > 2) throw new Error(`the page moved by ${moved} pixels when messages before ${first} came`);
    }
    await anna.page.evaluate(() => { document.querySelector('#scroll').scrollTop = 0; });
    await anna.waitForNotice('This is the beginning.');
  });

  await step('a message costs the page little', async () => {
    many.say(1);
    await anna.page.click('#pill');                                           // to the end of the conversation
    await waitForNewest(anna, many.last);
    if (IN_FIREFOX) return;                                                   // it does not measure that
    const cdp = await anna.context.newCDPSession(anna.page);
    await cdp.send('Performance.enable');
    const measure = async () => Object.fromEntries((await cdp.send('Performance.getMetrics')).metrics.map(({ name, value }) => [name, value]));
    const before = await measure();
    many.say(500);
    await waitForNewest(anna, many.last);
    await cdp.send('HeapProfiler.collectGarbage');
    const after = await measure(), per = name => ((after[name] - before[name]) * 1000 / 500).toFixed(3);
    console.log(`# per message: ${per('ScriptDuration')} ms of script, ${per('LayoutDuration')} ms of layout, ${per('RecalcStyleDuration')} ms of style; ${after.Nodes} nodes, ${Math.round(after.JSHeapUsedSize / 1e6)} MB`);
    if (after.Nodes > 20_000) throw new Error(`the document has ${after.Nodes} nodes`);
  });

  await step('new messages do not move a page that is read further up, and are counted', async () => {
    for (let { first } = await drawnNumbers(anna), i = 0; i < 8; i++) {
      await anna.page.evaluate(() => { document.querySelector('#scroll').scrollTop = 60; });
      await anna.waitFor(first => parseInt(document.querySelector('#log .message .text').textContent.slice(7)) < first, first);
      ({ first } = await drawnNumbers(anna));
    }
    const { last } = await drawnNumbers(anna);
    many.say(300);
    await anna.page.waitForSelector('#pill:has-text("300 new messages")');
    expect((await drawnNumbers(anna)).last, last, 'the last message that is drawn');
    await anna.page.click('#pill');
    await waitForNewest(anna, many.last);
    await drawnNumbers(anna);
  });

  await step('hundreds of new messages at once leave the page small, and older ones come back in their order', async () => {
    many.say(700);
    await waitForNewest(anna, many.last);
    const { first } = await drawnNumbers(anna);
    await anna.page.evaluate(() => { document.querySelector('#scroll').scrollTop = 0; });
    await anna.waitFor(first => parseInt(document.querySelector('#log .message .text').textContent.slice(7)) < first, first);
    await drawnNumbers(anna);
  });
  await step('there was no console error', () => expectNoProblems(anna));
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
  if (paths.login) await step('picture: moderation.png, the menu of a moderator', async () => {
    const members = await Members.start(main.browser, paths.login, ['Mo', 'Anna', 'Bob']);
    const [mo, anna, bob] = [await members.open('Mo', desktop), await members.open('Anna', desktop), await members.open('Bob', desktop)];
    await playChat([anna, bob]);
    await bob.sendMessage('BUY CHEAP TEA at https://spam.example.org !!!');
    await mo.waitForMessage('BUY CHEAP TEA at https://spam.example.org !!!');
    await openMessageMenu(mo, 'BUY CHEAP TEA');
    await mo.page.mouse.move(5, 5);
    await mo.page.screenshot({ path: join(folder, 'moderation.png') });
    for (const user of [mo, anna, bob]) await user.close();
    await members.server.stop('SIGINT');
  });
  await main.browser.close();
}

// ---- The run -----------------------------------------------------------------------------------------------------

async function cleanUp() {
  for (const child of children) child.kill('SIGKILL');
  await Promise.allSettled([...browsers].map(browser => withTimeout(browser.close(), 'the browser to end', 10_000)));
}

async function end() {
  await cleanUp();
  console.log(`${results.passed} passed, ${results.failed} failed`);
  process.exit(results.failed ? 1 : 0);
}

setTimeout(() => {
  results.failed += 1;
  console.log(`not ok - the run ends within ${TOTAL_TIMEOUT / 1000} s`);
  end();
}, TOTAL_TIMEOUT).unref();
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => { results.failed += 1; end(); });

const runs = part => ['', part].includes(option('part'));
const paths = { chat: option('chat'), rooms: option('rooms'), login: option('login') };

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
await step('rooms.html: all its text is in the table TEXT', () => {
  const [, markup] = readFileSync(PAGES.rooms, 'utf8').match(/<body[^>]*>([^]*?)<script/);
  expect(markup.replace(/<[^>]*>/g, ' ').match(/[\p{L}]+/gu) ?? [], [], 'words in the markup');
  expect(markup.match(/\b(?:aria-label|placeholder|title|alt)="[^"]*"/g) ?? [], [], 'words in attributes');
});
try {
  if (paths.chat && runs('chat')) await testChat(paths.chat);
  if (paths.rooms && runs('rooms')) await testRooms(paths.rooms);
  if (paths.rooms && runs('own')) await testOwnPage(paths.rooms);
  if (paths.login && runs('login')) await testModeration(paths.login);
  if (paths.rooms && runs('scripted')) await testScripted(paths.rooms);
  if (paths.rooms && runs('many')) await testMany(paths.rooms);
  if (option('shots')) await makePictures(paths, resolve(option('shots')));
} catch (error) {
  results.failed += 1;
  console.log('not ok - the run itself\n' + String(error?.stack ?? error).replace(/^/gm, '  # '));
}
await end();
