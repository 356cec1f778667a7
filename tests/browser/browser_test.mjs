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
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = dirname(fileURLToPath(import.meta.url));
const PAGE = join(HERE, '../../examples/chat.html');
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

function loadPlaywright() {
  const candidates = [option('modules'), option('modules') && join(option('modules'), '..'), HERE].filter(Boolean);
  for (const candidate of candidates) {
    try { return createRequire(join(resolve(candidate), 'here.js'))('playwright-core'); } catch { /* try the next folder */ }
  }
  return usage('playwright-core was not found. Run "npm install --no-package-lock" in tests/browser, or use --modules DIR or NODE_PATH.');
}

function findChromium() {
  const candidates = [process.env.CHROMIUM, '/usr/bin/chromium-headless-shell', '/usr/bin/chromium'];
  return candidates.find(candidate => candidate && existsSync(candidate)) ?? usage('Chromium was not found. Install chromium-headless-shell.');
}

if (!option('chat') && !option('rooms')) usage('Usage: browser_test.mjs --chat PROGRAM --rooms PROGRAM [--shots DIR] [--modules DIR]');
const { chromium } = loadPlaywright();
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
    this.child = spawn(resolve(path), [String(port), '--page', PAGE, ...more], { stdio: ['ignore', 'pipe', 'pipe'] });
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
        constructor(address) {
          super(address);
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
    return this.waitFor(text => [...document.querySelectorAll('#log .notice bdi')].some(line => line.textContent === text), text);
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
  const openUser = (options, browser = main.browser) => User.open(browser, server.address, options);

  await step('chat prints its address when it is ready and serves the page', async () => {
    server = await start(path);
    a = await openUser();
    b = await openUser();
    expect(await a.page.title(), 'wschat', 'title');
  });
  if (!b) return;

  await step('two pages chat with each other, and each marks its own messages', () => expectChat(a, b, 'Weather'));

  await step('a message shows its local time', async () => {
    const times = await b.page.$$eval('#log time', all => all.map(time => time.textContent));
    expect(times.every(time => /^\d\d:\d\d$/.test(time)), true, `times ${times}`);
  });

  await step('markup in a message stays text', async () => {
    const markup = '<img src=x onerror=alert(1)>';
    await a.sendMessage(markup);
    await b.waitForMessage(markup);
    expect(await b.page.$$eval('#log img', found => found.length), 0, 'images in the log');
  });

  await step('a message that imitates an event of a rooms server stays text', async () => {
    const imitation = '{"type":"hello","version":1,"server":"rooms","room":"tea","name":"Eve","features":[]}';
    await a.sendMessage(imitation);
    await b.waitForMessage(imitation);
    await expectChat(a, b, 'After the imitation');
    const late = await openUser();
    await a.sendMessage(imitation);                       // the new user gets this as the first message
    await a.sendMessage('So, plain again');
    await late.waitForMessage('So, plain again');
    await late.close();
  });

  await step('Shift+Enter starts a second line, and both lines arrive as one message', async () => {
    await a.page.focus('#message');
    await a.page.keyboard.type('first line');
    await a.page.keyboard.press('Shift+Enter');
    await a.page.keyboard.type('second line');
    await a.page.keyboard.press('Enter');
    await b.waitForMessage('first line\nsecond line');
  });

  await step('an address in a message becomes a link to that address only', async () => {
    await a.sendMessage('see https://example.org/a?b=c.');
    await b.waitForMessage('see https://example.org/a?b=c.');
    expect(await b.page.$$eval('#log a', found => found.map(({ href, rel }) => [href, rel])),
           [['https://example.org/a?b=c', 'noopener noreferrer']], 'links');
  });

  await step('the page works with the keyboard: the input has the focus, Enter sends, Tab moves a visible focus', async () => {
    const c = await openUser();
    expect(await c.page.evaluate(() => document.activeElement.id), 'message', 'focus after loading');
    await c.page.keyboard.type('typed without a mouse');
    await tabTo(c, 'send', 'Tab');
    await c.page.keyboard.press('Enter');
    await a.waitForMessage('typed without a mouse');
    await tabTo(c, 'scroll', 'Shift+Tab');
    await tabTo(c, 'message', 'Tab');
    await c.page.keyboard.type('and again');
    await c.page.keyboard.press('Enter');
    await a.waitForMessage('and again');
    await c.close();
  });

  await step('a screen of 360 by 740 does not scroll horizontally, even with long words', async () => {
    const c = await openUser({ viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    const long = 'Donaudampfschiff'.repeat(60);
    await a.sendMessage(long);
    await c.waitForMessage(long);
    await c.sendMessage('https://example.org/' + 'x'.repeat(300));
    expect(await c.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    await c.close();
  });

  await step('a user who has scrolled up keeps the position and sees the number of new messages', async () => {
    for (let i = 0; i < 40; i++) await a.submit(`line ${i}`);
    await b.waitForMessage('line 39');
    await b.page.hover('#scroll');
    await b.page.mouse.wheel(0, -600);
    await b.waitFor(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight > 100; });
    const before = await b.page.$eval('#scroll', scroll => scroll.scrollTop);
    await a.sendMessage('news from below');
    await b.waitForMessage('news from below');
    await b.waitFor(() => document.querySelector('#pill').textContent.startsWith('1 new message'));
    expect(await b.page.$eval('#scroll', scroll => scroll.scrollTop), before, 'scroll position');
    await b.page.click('#pill');
    await b.waitFor(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
    await b.page.waitForSelector('#pill', { state: 'hidden' });
    await a.sendMessage('more news');
    await b.waitFor(() => { const s = document.querySelector('#scroll'); return s.textContent.includes('more news') && s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
  });

  await step('the title counts messages that arrive while the page is hidden', async () => {
    const setHidden = hidden => b.page.evaluate(hidden => {
      Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    }, hidden);
    await setHidden(true);
    await a.sendMessage('one');
    await a.sendMessage('two');
    await b.waitFor(() => document.title === '(2) wschat');
    await setHidden(false);
    await b.waitFor(() => document.title === 'wschat');
  });

  await step('the page keeps at most a thousand lines', async () => {
    await a.page.evaluate(() => new Promise(done => {
      const socket = new WebSocket(location.origin.replace('http', 'ws') + '/chat');
      socket.onopen = () => { for (let i = 0; i < 1200; i++) socket.send(`flood ${i}`); };
      let seen = 0;
      socket.onmessage = () => { if (++seen === 1200) { socket.onclose = done; socket.close(); } };
    }));
    await b.waitForMessage('flood 1199');
    const kept = await b.page.$eval('#log', log => log.childElementCount);
    expect(kept > 900 && kept <= 1000, true, `${kept} lines kept`);
    await b.waitFor(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
  });

  await step('there was no console error and no violation of the content policy', () => expectNoProblems(a, b));

  await step('closing a page does not disturb the others', async () => {
    const c = await openUser();
    await Promise.all([a.states(), b.states()]);
    await c.sendMessage('I am off');
    await a.waitForMessage('I am off');
    await c.close();
    await expectChat(a, b, 'After the closing');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
  });

  await step('a crashed renderer does not disturb the others', async () => {
    const c = await openUser();
    const crashed = new Promise(done => c.page.once('crash', done));
    c.page.goto('chrome://crash').catch(() => {});
    await withTimeout(crashed, 'the crash');
    await expectChat(a, b, 'After the crash');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
    await c.close();
  });

  await step('killing a browser does not disturb the others', async () => {
    const second = await launch();
    const c = await openUser({}, second.browser);
    await c.sendMessage('I shall be killed');
    await a.waitForMessage('I shall be killed');
    await second.server.kill();
    browsers.delete(second);
    await expectChat(a, b, 'After the killing');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
  });

  await step('reloading a page does not disturb the other', async () => {
    await b.page.reload();
    await b.waitForState('connected');
    await expectChat(a, b, 'After the reload');
    expect(await a.states(), [], 'changes of the connection');
  });

  await step('an offline page says so, keeps new messages, and reconnects by itself', async () => {
    await b.context.setOffline(true);
    await b.waitForState('offline');
    await b.submit('written offline');
    await b.page.waitForSelector('#outbox .message:has-text("Waiting to be sent")');
    await b.context.setOffline(false);
    await b.waitForState('connected');
    await b.waitForMessage('written offline', { own: true });
    await a.waitForMessage('written offline');
    await expectChat(a, b, 'After the gap');
    expect([await a.countMessages('written offline'), await b.countMessages('written offline')], [1, 1], 'copies of the message');
  });

  await step('SIGINT closes all connections with 1001 and ends the server with status 0', async () => {
    await a.openSecondSocket();
    const how = await server.stop('SIGINT');
    expect(await a.secondSocketClosed(), { code: 1001, wasClean: true }, 'how the socket was closed');
    expect(how, { status: 0, signal: null }, 'how the server ended');
    await a.waitFor(() => document.body.dataset.state !== 'connected');
    await b.waitFor(() => document.body.dataset.state !== 'connected');
  });

  await step('without a server the page counts down, keeps messages, and fits a small screen', async () => {
    await a.waitForState('waiting');
    await a.waitFor(() => /^Reconnecting in \d+ s\.$/.test(document.querySelector('#countdown').textContent));
    await a.submit('written in vain?');
    await a.page.waitForSelector('#outbox .message:has-text("Waiting to be sent")');
    await a.page.setViewportSize({ width: 360, height: 740 });
    expect(await a.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    await a.page.setViewportSize({ width: 1280, height: 720 });
  });

  await step('the pages reconnect by themselves when the server is back, and no message is lost or duplicated', async () => {
    server = await start(path, server.port);
    await b.waitForState('connected');
    await a.waitForState('connected');
    await a.waitForNotice('Connected again. Messages sent in the meantime may be missing here.');
    await a.waitForMessage('written in vain?', { own: true });
    await expectChat(a, b, 'After the return');
    expect(await a.countMessages('written in vain?'), 1, 'copies of the message');
    expect(await a.page.$$eval('#outbox .message', left => left.length), 0, 'messages still waiting');
  });

  await step('a sent message without an echo is marked, and only the user sends it again', async () => {
    server.child.kill('SIGSTOP');                     // accepts bytes but does not reply
    await a.submit('into the void');
    await a.page.waitForSelector('#outbox .message.sent');
    await server.stop('SIGKILL');
    await a.page.waitForSelector('#outbox .message:has-text("It may not have arrived")');
    server = await start(path, server.port);
    await a.waitForState('connected');
    await b.waitForState('connected');
    await expectChat(a, b, 'After the void');
    expect(await b.countMessages('into the void'), 0, 'copies before the writer decides');
    await a.page.click('#outbox button:has-text("Send again")');
    await b.waitForMessage('into the void');
    await a.waitForMessage('into the void', { own: true });
    expect(await a.countMessages('into the void'), 1, 'copies of the message');
  });

  await step('after the server is killed, "Retry now" works with the keyboard', async () => {
    await server.stop('SIGKILL');
    await a.waitForState('waiting');
    server = await start(path, server.port);
    await a.page.evaluate(() => {                     // focuses the button unless the page has already reconnected
      const button = document.querySelector('#retry');
      if (!document.querySelector('#trouble').hidden) button.focus();
    });
    await a.page.keyboard.press('Enter');
    await a.waitForState('connected');
    await b.waitForState('connected');
    await expectChat(a, b, 'After the retry');
  });

  await step('SIGTERM ends the server with status 0', async () => {
    expect(await server.stop('SIGTERM'), { status: 0, signal: null }, 'how the server ended');
  });
  await main.browser.close();
}

// ---- rooms: names and JSON events --------------------------------------------------------------------------------

async function testRooms(path) {
  const main = await launch();
  const db = option('db') ? ['--db', resolve(option('db'))] : [];
  for (const end of ['', '-wal', '-shm']) if (db.length) rmSync(db[1] + end, { force: true });
  let server, anna, bob;
  const openUser = (room, options) => User.open(main.browser, server.address + (room && '#' + room), options);
  const openUserIn = async (room, name, options) => {
    const user = await openUser(room, options);
    await user.page.waitForSelector('body[data-mode="rooms"]');
    await user.rename(name);
    return user;
  };

  await step('the page of rooms shows the room and a name', async () => {
    server = await start(path, undefined, db);
    anna = await openUserIn('tea', 'Anna');
    expect(await anna.page.textContent('#room'), 'tea', 'room');
    expect(await anna.page.title(), 'tea · wschat', 'title');
    bob = await openUserIn('tea', 'Bob');
  });
  if (!bob) return;

  await step('the list of users shows everybody in the room', async () => {
    await anna.waitForUsers(['Anna', 'Bob']);
    await bob.waitForUsers(['Anna', 'Bob']);
  });

  await step('two users of a room chat with each other under their names', async () => {
    await expectChat(anna, bob, 'Biscuits');
    expect(await bob.page.$$eval('#log .message.hued .name', names => names.map(name => name.textContent)), ['Anna'], 'names over messages');
  });

  await step('joining and leaving are announced', async () => {
    const carol = await openUser('tea');
    const name = await carol.page.textContent('#name');
    await anna.waitForNotice(`${name} joined`);
    await anna.waitForUsers(['Anna', 'Bob', name]);
    await carol.close();
    await anna.waitForNotice(`${name} left`);
    await anna.waitForUsers(['Anna', 'Bob']);
  });

  await step('two rooms get no messages of each other', async () => {
    const dora = await openUserIn('coffee', 'Dora');
    await dora.sendMessage('only for coffee drinkers');
    await anna.sendMessage('only for tea drinkers');
    await bob.waitForMessage('only for tea drinkers');
    await dora.sendMessage('indeed');
    expect((await dora.logText()).includes('tea drinkers'), false, 'whether the coffee room has messages of the tea room');
    expect((await bob.logText()).includes('coffee drinkers'), false, 'whether the tea room has messages of the coffee room');
    expect([await dora.users(), await bob.users()], [['Dora'], ['Anna', 'Bob']], 'lists of users');
    await dora.close();
  });

  await step('without a room in the address the page opens the lobby', async () => {
    const eve = await openUser('');
    await eve.page.waitForSelector('body[data-mode="rooms"]');
    expect(await eve.page.textContent('#room'), 'lobby', 'room');
    expect(new URL(eve.page.url()).hash, '', 'hash');
    await eve.close();
  });

  await step('a name with markup stays text', async () => {
    const markup = '<b>x</b>';
    const fay = await openUser('tea');
    const before = await fay.page.textContent('#name');
    await fay.page.click('#name');
    await fay.page.fill('#ask-input', markup);
    await fay.page.press('#ask-input', 'Enter');
    // A server may reject such a name. Then the page shows the error as text.
    await fay.waitFor(({ markup, before }) => document.querySelector('#name').textContent === markup ||
      (document.querySelector('#log .notice.bad') && document.querySelector('#name').textContent === before), { markup, before });
    await fay.sendMessage('hello from fay');
    await anna.waitForMessage('hello from fay');
    expect(await anna.page.$$eval('#log b, #roster b', found => found.length), 0, 'bold elements');
    await fay.close();
  });

  await step('a name that is an image with a script stays text', async () => {
    const name = '<img src=x onerror=alert(1)>';
    const fay = await openUserIn('tea', name);
    await fay.sendMessage('hello from the image');
    await anna.waitForMessage('hello from the image');
    await anna.waitForUsers(['Anna', 'Bob', name]);
    expect(await anna.page.$$eval('#log img, #roster img, #typing img', found => found.length), 0, 'images');
    await fay.close();
    await anna.waitForUsers(['Anna', 'Bob']);
  });

  await step('a new user sees earlier messages once', async () => {
    const late = await openUser('tea');
    await late.waitForMessage('Biscuits, says the first');
    await late.waitForMessage('Biscuits, says the second');
    expect(await late.countMessages('Biscuits, says the first'), 1, 'copies of an old message');
    await late.close();
    await anna.waitForUsers(['Anna', 'Bob']);
  });

  await step('the others see who is typing until the message arrives', async () => {
    await bob.page.focus('#message');
    await bob.page.keyboard.type('hm');
    await anna.waitFor(() => document.querySelector('#typing').textContent === 'Bob is writing');
    await bob.page.keyboard.press('Enter');
    await anna.waitForMessage('hm');
    await anna.waitFor(() => document.querySelector('#typing').textContent === '');
  });

  await step('/me is an action, /msg is private, /help and /rooms get a reply', async () => {
    const carol = await openUserIn('tea', 'Carol');
    await bob.submit('/me waves');
    await anna.waitFor(() => [...document.querySelectorAll('#log .action')].some(line => line.textContent.startsWith('Bob waves')));
    await bob.submit('/msg Anna psst');
    await anna.waitForMessage('psst');
    await bob.waitForMessage('psst', { own: true });
    await bob.submit('//half');
    await carol.waitForMessage('/half');
    expect(await carol.countMessages('psst'), 0, 'private messages that a third person sees');
    await bob.submit('/rooms');
    await bob.waitForNotice('Rooms: tea (3)');
    await bob.submit('/help');
    await bob.waitForNotice('/nick NAME: changes your name in this room');
    expect(await bob.page.$$eval('#outbox .message', left => left.length), 0, 'lines still waiting');
    await carol.close();
    await anna.waitForUsers(['Anna', 'Bob']);
  });

  await step('two tabs of one browser are one user', async () => {
    const tab = await bob.context.newPage();
    await tab.goto(server.address + '#tea');
    await tab.waitForFunction(() => document.querySelector('#name').textContent === 'Bob');
    expect(await anna.users(), ['Anna', 'Bob'], 'list of users');
    await anna.sendMessage('Are there two of you?');
    await tab.waitForSelector('#log .message:has-text("Are there two of you?")');
    await tab.close();
    await expectChat(anna, bob, 'One tab less');
    expect((await anna.logText()).includes('Bob left'), false, 'whether a notice says that Bob left');
  });

  await step('an offline user gets missed messages, and messages written meanwhile arrive once', async () => {
    await bob.context.setOffline(true);
    await bob.waitForState('offline');
    await bob.submit('written while offline');
    await anna.sendMessage('said while Bob was offline');
    await bob.context.setOffline(false);
    await bob.waitForState('connected');
    await bob.waitForMessage('said while Bob was offline');
    await bob.waitForMessage('written while offline', { own: true });
    await anna.waitForMessage('written while offline');
    const counts = [await anna.countMessages('written while offline'), await bob.countMessages('written while offline'),
                    await bob.countMessages('said while Bob was offline')];
    expect(counts, [1, 1, 1], 'copies of the messages');
    await bob.waitForNotice('Connected again.');
  });

  await step('renaming works with the keyboard, and everybody gets a notice', async () => {
    await bob.page.focus('#message');
    await tabTo(bob, 'name', 'Tab');
    await bob.page.keyboard.press('Enter');
    await bob.page.keyboard.type('Robert');             // the old name is selected, so typing replaces it
    await bob.page.keyboard.press('Enter');
    await bob.waitForName('Robert');
    await anna.waitForNotice('Bob is now Robert');
    await anna.waitForUsers(['Anna', 'Robert']);
    expect(await bob.page.evaluate(() => document.activeElement.id), 'message', 'focus after the dialog');
    await expectChat(anna, bob, 'After the renaming');
  });

  await step('a taken name is rejected with an error text, and nothing else changes', async () => {
    await bob.submit('/nick Anna');
    await bob.page.waitForSelector('#log .notice.bad');
    expect(await bob.page.textContent('#name'), 'Robert', 'name');
    await expectChat(anna, bob, 'After the refusal');
  });

  await step('the name survives a reload', async () => {
    await bob.page.reload();
    await bob.waitForState('connected');
    await bob.waitForName('Robert');
    await anna.waitForUsers(['Anna', 'Robert']);
    await expectChat(anna, bob, 'After the reload');
  });

  await step('another room in the address moves the page to that room', async () => {
    await bob.page.click('#room');
    await bob.page.fill('#ask-input', 'Grüner Tee & mehr');
    await bob.page.press('#ask-input', 'Enter');
    // The server may change or reject the room's name. The page must still be in a room.
    await anna.waitForUsers(['Anna']);
    await bob.page.evaluate(() => {
      location.hash = '#tea';                       // the hello of the previous room arrives after that
      testLog.socket.onmessage(new MessageEvent('message', { data: testLog.hello }));
    });
    await anna.waitForUsers(['Anna', 'Robert']);
    await bob.waitForState('connected');
    await bob.waitForName('Robert');
    await expectChat(anna, bob, 'After the excursion');
  });

  await step('a screen of 360 by 740 does not scroll horizontally and shows the users', async () => {
    const gil = await openUser('tea', { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    await gil.page.click('#people');
    await gil.page.waitForSelector('#crowd[open] li:has-text("Anna")');
    expect(await gil.horizontalOverflow(), [0, 0, 0], 'overflow of document, body and log');
    await gil.page.click('#crowd-close');
    await gil.close();
  });

  await step('there was no console error and no violation of the content policy', () => expectNoProblems(anna, bob));

  await step('SIGINT closes all connections with 1001 and ends the server with status 0', async () => {
    await anna.openSecondSocket();
    const how = await server.stop('SIGINT');
    expect(await anna.secondSocketClosed(), { code: 1001, wasClean: true }, 'how the socket was closed');
    expect(how, { status: 0, signal: null }, 'how the server ended');
  });

  await step('when the server is back, users return to their room with their names', async () => {
    await anna.waitForState('waiting');
    await anna.submit('written while it was away');
    server = await start(path, server.port, db);
    await anna.waitForState('connected');
    await bob.waitForState('connected');
    await anna.waitForUsers(['Anna', 'Robert']);
    await bob.waitForMessage('written while it was away');
    await anna.waitForMessage('written while it was away', { own: true });
    expect(await anna.countMessages('written while it was away'), 1, 'copies of the message');
    await expectChat(anna, bob, 'After the return');
  });

  await step('an unacknowledged message is sent again by itself and is not duplicated', async () => {
    server.child.kill('SIGSTOP');                     // accepts bytes but does not reply
    await anna.submit('into the void');
    await anna.page.waitForSelector('#outbox .message.sent');
    await server.stop('SIGKILL');
    server = await start(path, server.port, db);
    await anna.waitForState('connected');
    await bob.waitForState('connected');
    await anna.waitForMessage('into the void', { own: true });
    await bob.waitForMessage('into the void');
    expect([await anna.countMessages('into the void'), await bob.countMessages('into the void')], [1, 1], 'copies of the message');
  });

  if (db.length) await step('with a database, a new user sees messages from before the server was killed', async () => {
    const late = await openUser('tea');
    await late.waitForMessage('written while it was away');
    await late.waitForMessage('Biscuits, says the first');
    expect(await late.countMessages('written while it was away'), 1, 'copies of the message');
    expect((await anna.logText()).includes('Messages are missing here.'), false, 'whether a notice reports a gap');
    await late.close();
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

await step('the page: its content policy has the hashes of its script and its style', () => {
  const { status, stderr } = spawnSync(process.execPath, [join(HERE, 'csp.mjs'), PAGE], { encoding: 'utf8' });
  if (status !== 0) throw new Error(stderr);
});
await step('the page: it never parses text as markup and loads nothing from other origins', () => {
  const page = readFileSync(PAGE, 'utf8');
  const found = page.match(/innerHTML|outerHTML|insertAdjacentHTML|document\.write|unsafe-|\b(?:src|href)="(?!data:)[^"]*"/g);
  expect(found ?? [], [], 'forbidden code');
});
try {
  if (paths.chat) await testChat(paths.chat);
  if (paths.rooms) await testRooms(paths.rooms);
  if (option('shots')) await makePictures(paths, resolve(option('shots')));
} catch (error) {
  results.failed += 1;
  console.log('not ok - the run itself\n' + String(error?.stack ?? error).replace(/^/gm, '  # '));
}
await end();
