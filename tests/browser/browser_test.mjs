// The main job on a real browser: two people chat through examples/chat and examples/rooms.
//
//   node tests/browser/browser_test.mjs --chat build/chat --rooms build/rooms [--db FILE] [--shots DIR] [--modules DIR]
//
// --db is given to rooms where it was built with SQLite: then nothing is lost when it is restarted.
// Either server may be left out, and its steps with it. Needs Chromium (CHROMIUM names another than the packaged one)
// and playwright-core, which is looked for in --modules DIR, then in NODE_PATH, then beside this file.
// Prints one line for each step and ends with status 1 if one of them failed. --shots makes the README's pictures.

import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = dirname(fileURLToPath(import.meta.url));
const PAGE = join(HERE, '../../examples/chat.html');
const PATIENCE = 20_000;                 // ms for one thing to happen; a machine under load is slow, not broken
const LAST_CALL = 8 * 60_000;            // ms for everything; then the test ends itself
const FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
               '--disable-component-update', '--disable-sync', '--disable-quic'];

// ---- What this run is given ------------------------------------------------------------------------------------

function option(name) {
  const at = process.argv.indexOf('--' + name);
  return at < 0 ? '' : process.argv[at + 1] ?? '';
}

function usage(sentence) {
  console.error(sentence);
  process.exit(2);
}

function loadPlaywright() {
  const places = [option('modules'), option('modules') && join(option('modules'), '..'), HERE].filter(Boolean);
  for (const place of places) {
    try { return createRequire(join(resolve(place), 'here.js'))('playwright-core'); } catch { /* the next place */ }
  }
  return usage('playwright-core was not found: "npm install --no-package-lock" in tests/browser, or --modules DIR, or NODE_PATH.');
}

function findChromium() {
  const places = [process.env.CHROMIUM, '/usr/bin/chromium-headless-shell', '/usr/bin/chromium'];
  return places.find(place => place && existsSync(place)) ?? usage('There is no Chromium: install chromium-headless-shell.');
}

if (!option('chat') && !option('rooms')) usage('Usage: browser_test.mjs --chat PROGRAM --rooms PROGRAM [--shots DIR] [--modules DIR]');
const { chromium } = loadPlaywright();
const executablePath = findChromium();

// ---- Steps -----------------------------------------------------------------------------------------------------

const tally = { passed: 0, failed: 0 };

async function step(sentence, action) {
  try {
    await action();
    tally.passed += 1;
    console.log('ok - ' + sentence);
  } catch (error) {
    tally.failed += 1;
    console.log('not ok - ' + sentence);
    console.log(String(error?.stack ?? error).replace(/^/gm, '  # '));
  }
}

function expect(actual, wanted, what) {
  const [a, w] = [JSON.stringify(actual), JSON.stringify(wanted)];
  if (a !== w) throw new Error(`${what}: expected ${w}, got ${a}`);
}

function within(promise, what, ms = PATIENCE) {
  let timer;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`waited ${ms} ms for ${what}`)), ms); });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// ---- Servers: each is a child of this process and is ended by its own process id ---------------------------------

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
      const look = () => {
        const found = this.output.match(/http:\/\/127\.0\.0\.1:\d+\//);
        if (found) done(found[0]);
      };
      this.child.stdout.on('data', look);
      look();
    });
    const died = this.ended.then(how => { throw new Error(`ended before it was ready: ${JSON.stringify(how)}\n${this.output}`); });
    this.address = await within(Promise.race([printed, died]), 'the address that the server prints');
    return this;
  }

  async stop(signal) {
    this.child.kill(signal);
    return within(this.ended, `the server to end after ${signal}`);
  }
}

async function start(path, port, more) {
  return new Program(path, port ?? await freePort(), more).ready();
}

// ---- Pages -----------------------------------------------------------------------------------------------------

const browsers = new Set();

async function launch() {
  const server = await chromium.launchServer({ executablePath, args: FLAGS });
  const browser = await chromium.connect(server.wsEndpoint());
  const both = { server, browser };
  browsers.add(both);
  return both;
}

/// A person at a browser of their own (a context shares nothing with another one).
class Person {
  static async arrive(browser, address, { name = '', ...options } = {}) {
    const person = new Person();
    person.troubles = [];
    person.context = await browser.newContext({ locale: 'en-GB', ...options });
    if (name) await person.context.addInitScript(name => localStorage.setItem('wschat.name', name), name);
    await person.context.addInitScript(() => {
      // What a page went through, kept where the test can ask for it afterwards.
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
        const note = () => testLog.states.push(document.body.dataset.state);
        new MutationObserver(note).observe(document.body, { attributeFilter: ['data-state'] });
      });
    });
    person.page = await person.context.newPage();
    person.page.setDefaultTimeout(PATIENCE);
    person.watch();
    await person.page.goto(address);
    await person.is('connected');
    return person;
  }

  watch() {
    const { page, troubles } = this;
    page.on('console', message => { if (['error', 'warning'].includes(message.type())) troubles.push('console: ' + message.text()); });
    page.on('pageerror', error => troubles.push('exception: ' + error.message));
    page.on('requestfailed', request => troubles.push('failed: ' + request.url()));
    page.on('response', response => { if (response.status() >= 400) troubles.push(`${response.status()}: ${response.url()}`); });
    page.on('dialog', dialog => { troubles.push('dialog: ' + dialog.message()); dialog.dismiss(); });
  }

  is(state) { return this.page.waitForSelector(`body[data-state="${state}"]`); }

  until(condition, argument) { return this.page.waitForFunction(condition, argument); }

  async type(text) {
    await this.page.fill('#message', text);
    await this.page.press('#message', 'Enter');
  }

  /// Until the line has come back from the server as one's own.
  async say(text) {
    await this.type(text);
    await this.sees(text, { own: true });
  }

  sees(text, { own = false } = {}) {
    return this.until(({ text, own }) => [...document.querySelectorAll('#log .message')].some(message =>
      message.classList.contains('own') === own && message.querySelector('.text').textContent === text), { text, own });
  }

  seesNotice(text) {
    return this.until(text => [...document.querySelectorAll('#log .notice bdi')].some(line => line.textContent === text), text);
  }

  count(text) {
    return this.page.evaluate(text => [...document.querySelectorAll('.message .text')].filter(line => line.textContent === text).length, text);
  }

  everything() { return this.page.evaluate(() => document.querySelector('#log').textContent); }

  people() { return this.page.$$eval('#roster bdi', names => names.map(name => name.textContent).sort()); }

  seesPeople(names) {
    return this.until(names => JSON.stringify([...document.querySelectorAll('#roster bdi')].map(name => name.textContent).sort()) === names,
                      JSON.stringify([...names].sort()));
  }

  async renameTo(name) {
    await this.page.click('#name');
    await this.page.fill('#ask-input', name);
    await this.page.press('#ask-input', 'Enter');
    await this.calls(name);
  }

  calls(name) { return this.until(name => document.querySelector('#name').textContent === name, name); }

  /// Which states the connection has been through since the last time this was asked.
  states() { return this.page.evaluate(() => testLog.states.splice(0)); }

  sidewaysScroll() {
    return this.page.evaluate(() => [document.documentElement, document.body, document.querySelector('#scroll')]
      .map(element => element.scrollWidth - element.clientWidth));
  }

  /// A WebSocket beside the page's own that tells how it was closed.
  async openSpy() {
    await this.page.evaluate(() => new Promise((done, failed) => {
      const socket = new WebSocket(location.origin.replace('http', 'ws') + '/chat');
      globalThis.spyClosed = new Promise(closed => { socket.onclose = ({ code, wasClean }) => closed({ code, wasClean }); });
      socket.onopen = () => done();
      socket.onerror = () => failed(new Error('the spy could not connect'));
    }));
  }

  spyClosed() { return within(this.page.evaluate(() => globalThis.spyClosed), 'the close of the spy'); }

  leave() { return this.context.close(); }
}

async function expectNoTrouble(...people) {
  for (const person of people) {
    expect(person.troubles, [], 'console errors, exceptions, failed requests, dialogs');
    expect(await person.page.evaluate(() => testLog.violations), [], 'violations of the policy');
  }
}

async function expectTalk(a, b, topic) {
  await a.say(`${topic}, says the one`);
  await b.sees(`${topic}, says the one`);
  await b.say(`${topic}, says the other`);
  await a.sees(`${topic}, says the other`);
}

/// Tab (or Shift+Tab) until the element has the focus, and what has it shows it.
async function tabTo(person, id, key) {
  for (let i = 0; i < 30; i++) {
    const focused = await person.page.evaluate(() => {
      const element = document.activeElement;
      const style = getComputedStyle(element);
      return { id: element.id, visible: element === document.body || (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1) };
    });
    if (!focused.visible) throw new Error(`the focus on #${focused.id} cannot be seen`);
    if (focused.id === id) return;
    await person.page.keyboard.press(key);
  }
  throw new Error(`${key} never reaches #${id}`);
}

// ---- chat: one room, plain lines ---------------------------------------------------------------------------------

async function testChat(path) {
  const main = await launch();
  let server, a, b;
  const arrive = (options, browser = main.browser) => Person.arrive(browser, server.address, options);

  await step('chat prints its address when it is ready and serves the page there', async () => {
    server = await start(path);
    a = await arrive();
    b = await arrive();
    expect(await a.page.title(), 'wschat', 'title');
  });
  if (!b) return;

  await step('two pages chat both ways, and each knows its own lines', () => expectTalk(a, b, 'Weather'));

  await step('a line that comes at a time shows the local time', async () => {
    const times = await b.page.$$eval('#log time', all => all.map(time => time.textContent));
    expect(times.every(time => /^\d\d:\d\d$/.test(time)), true, `times ${times}`);
  });

  await step('markup in a message stays text', async () => {
    const markup = '<img src=x onerror=alert(1)>';
    await a.say(markup);
    await b.sees(markup);
    expect(await b.page.$$eval('#log img', found => found.length), 0, 'images in the log');
  });

  await step('a message that imitates an event of a rooms server stays text', async () => {
    const imitation = '{"type":"hello","version":1,"server":"rooms","room":"tea","name":"Eve","features":[]}';
    await a.say(imitation);
    await b.sees(imitation);
    await expectTalk(a, b, 'After the imitation');
    const late = await arrive();
    await a.say(imitation);                       // to the newcomer it is the very first message
    await a.say('So, plain again');
    await late.sees('So, plain again');
    await late.leave();
  });

  await step('Shift+Enter makes a second line, and both lines arrive as one message', async () => {
    await a.page.focus('#message');
    await a.page.keyboard.type('first line');
    await a.page.keyboard.press('Shift+Enter');
    await a.page.keyboard.type('second line');
    await a.page.keyboard.press('Enter');
    await b.sees('first line\nsecond line');
  });

  await step('an address in a message becomes a link to that address only', async () => {
    await a.say('see https://example.org/a?b=c.');
    await b.sees('see https://example.org/a?b=c.');
    expect(await b.page.$$eval('#log a', found => found.map(({ href, rel }) => [href, rel])),
           [['https://example.org/a?b=c', 'noopener noreferrer']], 'links');
  });

  await step('the keyboard alone suffices: the field has the focus, Enter sends, Tab shows where it is', async () => {
    const c = await arrive();
    expect(await c.page.evaluate(() => document.activeElement.id), 'message', 'focus after loading');
    await c.page.keyboard.type('typed without a mouse');
    await tabTo(c, 'send', 'Tab');
    await c.page.keyboard.press('Enter');
    await a.sees('typed without a mouse');
    await tabTo(c, 'scroll', 'Shift+Tab');
    await tabTo(c, 'message', 'Tab');
    await c.page.keyboard.type('and again');
    await c.page.keyboard.press('Enter');
    await a.sees('and again');
    await c.leave();
  });

  await step('a phone of 360 by 740 has no sideways scroll, whatever the words', async () => {
    const c = await arrive({ viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    const long = 'Donaudampfschiff'.repeat(60);
    await a.say(long);
    await c.sees(long);
    await c.say('https://example.org/' + 'x'.repeat(300));
    expect(await c.sidewaysScroll(), [0, 0, 0], 'surplus width of document, body and log');
    await c.leave();
  });

  await step('a reader who has scrolled up stays there and is told of new messages', async () => {
    for (let i = 0; i < 40; i++) await a.type(`line ${i}`);
    await b.sees('line 39');
    await b.page.hover('#scroll');
    await b.page.mouse.wheel(0, -600);
    await b.until(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight > 100; });
    const before = await b.page.$eval('#scroll', scroll => scroll.scrollTop);
    await a.say('news from below');
    await b.sees('news from below');
    await b.until(() => document.querySelector('#pill').textContent.startsWith('1 new message'));
    expect(await b.page.$eval('#scroll', scroll => scroll.scrollTop), before, 'place of the reader');
    await b.page.click('#pill');
    await b.until(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
    await b.page.waitForSelector('#pill', { state: 'hidden' });
    await a.say('more news');
    await b.until(() => { const s = document.querySelector('#scroll'); return s.textContent.includes('more news') && s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
  });

  await step('the title counts what arrives while nobody looks', async () => {
    const look = hidden => b.page.evaluate(hidden => {
      Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    }, hidden);
    await look(true);
    await a.say('one');
    await a.say('two');
    await b.until(() => document.title === '(2) wschat');
    await look(false);
    await b.until(() => document.title === 'wschat');
  });

  await step('the page keeps no more than a thousand lines', async () => {
    await a.page.evaluate(() => new Promise(done => {
      const socket = new WebSocket(location.origin.replace('http', 'ws') + '/chat');
      socket.onopen = () => { for (let i = 0; i < 1200; i++) socket.send(`flood ${i}`); };
      let seen = 0;
      socket.onmessage = () => { if (++seen === 1200) { socket.onclose = done; socket.close(); } };
    }));
    await b.sees('flood 1199');
    const kept = await b.page.$eval('#log', log => log.childElementCount);
    expect(kept > 900 && kept <= 1000, true, `${kept} lines kept`);
    await b.until(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2; });
  });

  await step('nothing so far has troubled the console or the content policy', () => expectNoTrouble(a, b));

  await step('closing a page leaves the others undisturbed', async () => {
    const c = await arrive();
    await Promise.all([a.states(), b.states()]);
    await c.say('I am off');
    await a.sees('I am off');
    await c.leave();
    await expectTalk(a, b, 'After the closing');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
  });

  await step('a page whose renderer crashes leaves the others undisturbed', async () => {
    const c = await arrive();
    const crashed = new Promise(done => c.page.once('crash', done));
    c.page.goto('chrome://crash').catch(() => {});
    await within(crashed, 'the crash');
    await expectTalk(a, b, 'After the crash');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
    await c.leave();
  });

  await step('a browser that is killed leaves the others undisturbed', async () => {
    const second = await launch();
    const c = await arrive({}, second.browser);
    await c.say('I shall be killed');
    await a.sees('I shall be killed');
    await second.server.kill();
    browsers.delete(second);
    await expectTalk(a, b, 'After the killing');
    expect([await a.states(), await b.states()], [[], []], 'changes of the connection');
  });

  await step('reloading one page leaves the other undisturbed', async () => {
    await b.page.reload();
    await b.is('connected');
    await expectTalk(a, b, 'After the reload');
    expect(await a.states(), [], 'changes of the connection');
  });

  await step('a page that goes offline says so, keeps what is written, and heals by itself', async () => {
    await b.context.setOffline(true);
    await b.is('offline');
    await b.type('written offline');
    await b.page.waitForSelector('#outbox .message:has-text("Waiting to be sent")');
    await b.context.setOffline(false);
    await b.is('connected');
    await b.sees('written offline', { own: true });
    await a.sees('written offline');
    await expectTalk(a, b, 'After the gap');
    expect([await a.count('written offline'), await b.count('written offline')], [1, 1], 'copies of the message');
  });

  await step('SIGINT closes everybody with 1001 and the server ends with status 0', async () => {
    await a.openSpy();
    const how = await server.stop('SIGINT');
    expect(await a.spyClosed(), { code: 1001, wasClean: true }, 'how the socket was closed');
    expect(how, { status: 0, signal: null }, 'how the server ended');
    await a.until(() => document.body.dataset.state !== 'connected');
    await b.until(() => document.body.dataset.state !== 'connected');
  });

  await step('without a server the page counts down, keeps messages, and fits a phone', async () => {
    await a.is('waiting');
    await a.until(() => /^Reconnecting in \d+ s\.$/.test(document.querySelector('#countdown').textContent));
    await a.type('written in vain?');
    await a.page.waitForSelector('#outbox .message:has-text("Waiting to be sent")');
    await a.page.setViewportSize({ width: 360, height: 740 });
    expect(await a.sidewaysScroll(), [0, 0, 0], 'surplus width of document, body and log');
    await a.page.setViewportSize({ width: 1280, height: 720 });
  });

  await step('the pages heal by themselves when the server is back, and nothing is lost or doubled', async () => {
    server = await start(path, server.port);
    await b.is('connected');
    await a.is('connected');
    await a.seesNotice('Connected again. Messages sent in the meantime may be missing here.');
    await a.sees('written in vain?', { own: true });
    await expectTalk(a, b, 'After the return');
    expect(await a.count('written in vain?'), 1, 'copies of the message');
    expect(await a.page.$$eval('#outbox .message', left => left.length), 0, 'messages still waiting');
  });

  await step('a message that was sent but never came back is marked, and only its writer sends it again', async () => {
    server.child.kill('SIGSTOP');                     // takes the bytes and does not answer
    await a.type('into the void');
    await a.page.waitForSelector('#outbox .message.sent');
    await server.stop('SIGKILL');
    await a.page.waitForSelector('#outbox .message:has-text("It may not have arrived")');
    server = await start(path, server.port);
    await a.is('connected');
    await b.is('connected');
    await expectTalk(a, b, 'After the void');
    expect(await b.count('into the void'), 0, 'copies before the writer decides');
    await a.page.click('#outbox button:has-text("Send again")');
    await b.sees('into the void');
    await a.sees('into the void', { own: true });
    expect(await a.count('into the void'), 1, 'copies of the message');
  });

  await step('after the server is killed, "Retry now" connects at once by keyboard', async () => {
    await server.stop('SIGKILL');
    await a.is('waiting');
    server = await start(path, server.port);
    await a.page.evaluate(() => {                     // as if the next attempt by itself were far away
      const button = document.querySelector('#retry');
      if (!document.querySelector('#trouble').hidden) button.focus();
    });
    await a.page.keyboard.press('Enter');
    await a.is('connected');
    await b.is('connected');
    await expectTalk(a, b, 'After the retry');
  });

  await step('SIGTERM ends the server with status 0 too', async () => {
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
  const arrive = (room, options) => Person.arrive(main.browser, server.address + (room && '#' + room), options);
  const arriveIn = async (room, name, options) => {
    const person = await arrive(room, options);
    await person.page.waitForSelector('body[data-mode="rooms"]');
    await person.renameTo(name);
    return person;
  };

  await step('rooms greets the page, which then shows the room and a name', async () => {
    server = await start(path, undefined, db);
    anna = await arriveIn('tea', 'Anna');
    expect(await anna.page.textContent('#room'), 'tea', 'room');
    expect(await anna.page.title(), 'tea · wschat', 'title');
    bob = await arriveIn('tea', 'Bob');
  });
  if (!bob) return;

  await step('the roster shows everybody in the room', async () => {
    await anna.seesPeople(['Anna', 'Bob']);
    await bob.seesPeople(['Anna', 'Bob']);
  });

  await step('two people in a room chat both ways under their names', async () => {
    await expectTalk(anna, bob, 'Biscuits');
    expect(await bob.page.$$eval('#log .message.hued .name', names => names.map(name => name.textContent)), ['Anna'], 'names over messages');
  });

  await step('joining and leaving are noticed', async () => {
    const carol = await arrive('tea');
    const name = await carol.page.textContent('#name');
    await anna.seesNotice(`${name} joined`);
    await anna.seesPeople(['Anna', 'Bob', name]);
    await carol.leave();
    await anna.seesNotice(`${name} left`);
    await anna.seesPeople(['Anna', 'Bob']);
  });

  await step('two rooms hear nothing of each other', async () => {
    const dora = await arriveIn('coffee', 'Dora');
    await dora.say('only for coffee drinkers');
    await anna.say('only for tea drinkers');
    await bob.sees('only for tea drinkers');
    await dora.say('indeed');
    expect((await dora.everything()).includes('tea drinkers'), false, 'tea heard in coffee');
    expect((await bob.everything()).includes('coffee drinkers'), false, 'coffee heard in tea');
    expect([await dora.people(), await bob.people()], [['Dora'], ['Anna', 'Bob']], 'rosters');
    await dora.leave();
  });

  await step('without a room in the address people meet in the lobby', async () => {
    const eve = await arrive('');
    await eve.page.waitForSelector('body[data-mode="rooms"]');
    expect(await eve.page.textContent('#room'), 'lobby', 'room');
    expect(new URL(eve.page.url()).hash, '', 'hash');
    await eve.leave();
  });

  await step('a name with markup stays text', async () => {
    const markup = '<b>x</b>';
    const fay = await arrive('tea');
    const before = await fay.page.textContent('#name');
    await fay.page.click('#name');
    await fay.page.fill('#ask-input', markup);
    await fay.page.press('#ask-input', 'Enter');
    // A server may refuse such a name; then the sentence is shown instead, and it too is only text.
    await fay.until(({ markup, before }) => document.querySelector('#name').textContent === markup ||
      (document.querySelector('#log .notice.bad') && document.querySelector('#name').textContent === before), { markup, before });
    await fay.say('hello from fay');
    await anna.sees('hello from fay');
    expect(await anna.page.$$eval('#log b, #roster b', found => found.length), 0, 'bold elements');
    await fay.leave();
  });

  await step('a name that is an image with a script stays text', async () => {
    const name = '<img src=x onerror=alert(1)>';
    const fay = await arriveIn('tea', name);
    await fay.say('hello from the image');
    await anna.sees('hello from the image');
    await anna.seesPeople(['Anna', 'Bob', name]);
    expect(await anna.page.$$eval('#log img, #roster img, #typing img', found => found.length), 0, 'images');
    await fay.leave();
    await anna.seesPeople(['Anna', 'Bob']);
  });

  await step('who comes later is shown what was said before, once', async () => {
    const late = await arrive('tea');
    await late.sees('Biscuits, says the one');
    await late.sees('Biscuits, says the other');
    expect(await late.count('Biscuits, says the one'), 1, 'copies of an old message');
    await late.leave();
    await anna.seesPeople(['Anna', 'Bob']);
  });

  await step('who is writing is shown to the others, until the message comes', async () => {
    await bob.page.focus('#message');
    await bob.page.keyboard.type('hm');
    await anna.until(() => document.querySelector('#typing').textContent === 'Bob is writing');
    await bob.page.keyboard.press('Enter');
    await anna.sees('hm');
    await anna.until(() => document.querySelector('#typing').textContent === '');
  });

  await step('/me is an action, /msg is for two alone, /help and /rooms are answered', async () => {
    const carol = await arriveIn('tea', 'Carol');
    await bob.type('/me waves');
    await anna.until(() => [...document.querySelectorAll('#log .action')].some(line => line.textContent.startsWith('Bob waves')));
    await bob.type('/msg Anna psst');
    await anna.sees('psst');
    await bob.sees('psst', { own: true });
    await bob.type('//half');
    await carol.sees('/half');
    expect(await carol.count('psst'), 0, 'private messages that a third person sees');
    await bob.type('/rooms');
    await bob.seesNotice('Rooms: tea (3)');
    await bob.type('/help');
    await bob.seesNotice('/nick NAME: changes your name in this room');
    expect(await bob.page.$$eval('#outbox .message', left => left.length), 0, 'lines still waiting');
    await carol.leave();
    await anna.seesPeople(['Anna', 'Bob']);
  });

  await step('two tabs of one browser are one user', async () => {
    const tab = await bob.context.newPage();
    await tab.goto(server.address + '#tea');
    await tab.waitForFunction(() => document.querySelector('#name').textContent === 'Bob');
    expect(await anna.people(), ['Anna', 'Bob'], 'roster');
    await anna.say('Are there two of you?');
    await tab.waitForSelector('#log .message:has-text("Are there two of you?")');
    await tab.close();
    await expectTalk(anna, bob, 'One tab less');
    expect((await anna.everything()).includes('Bob left'), false, 'notice of leaving');
  });

  await step('who was offline is shown what was missed, and what was written meanwhile arrives once', async () => {
    await bob.context.setOffline(true);
    await bob.is('offline');
    await bob.type('written while offline');
    await anna.say('said while Bob was offline');
    await bob.context.setOffline(false);
    await bob.is('connected');
    await bob.sees('said while Bob was offline');
    await bob.sees('written while offline', { own: true });
    await anna.sees('written while offline');
    const counts = [await anna.count('written while offline'), await bob.count('written while offline'),
                    await bob.count('said while Bob was offline')];
    expect(counts, [1, 1, 1], 'copies of the messages');
    await bob.seesNotice('Connected again.');
  });

  await step('changing the name works by keyboard alone and everybody is told', async () => {
    await bob.page.focus('#message');
    await tabTo(bob, 'name', 'Tab');
    await bob.page.keyboard.press('Enter');
    await bob.page.keyboard.type('Robert');             // the old name is selected, so typing replaces it
    await bob.page.keyboard.press('Enter');
    await bob.calls('Robert');
    await anna.seesNotice('Bob is now Robert');
    await anna.seesPeople(['Anna', 'Robert']);
    expect(await bob.page.evaluate(() => document.activeElement.id), 'message', 'focus after the dialog');
    await expectTalk(anna, bob, 'After the renaming');
  });

  await step('a name that is taken is refused with a sentence, and nothing else changes', async () => {
    await bob.type('/nick Anna');
    await bob.page.waitForSelector('#log .notice.bad');
    expect(await bob.page.textContent('#name'), 'Robert', 'name');
    await expectTalk(anna, bob, 'After the refusal');
  });

  await step('the name is remembered over a reload', async () => {
    await bob.page.reload();
    await bob.is('connected');
    await bob.calls('Robert');
    await anna.seesPeople(['Anna', 'Robert']);
    await expectTalk(anna, bob, 'After the reload');
  });

  await step('another room in the address moves the page there', async () => {
    await bob.page.click('#room');
    await bob.page.fill('#ask-input', 'Grüner Tee & mehr');
    await bob.page.press('#ask-input', 'Enter');
    // The server may write the room's name otherwise or refuse it; it must not leave the page without a room.
    await anna.seesPeople(['Anna']);
    await bob.page.evaluate(() => {
      location.hash = '#tea';                       // and only then comes what greets in the room that was left
      testLog.socket.onmessage(new MessageEvent('message', { data: testLog.hello }));
    });
    await anna.seesPeople(['Anna', 'Robert']);
    await bob.is('connected');
    await bob.calls('Robert');
    await expectTalk(anna, bob, 'After the excursion');
  });

  await step('a phone of 360 by 740 has no sideways scroll and shows who is here', async () => {
    const gil = await arrive('tea', { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    await gil.page.click('#people');
    await gil.page.waitForSelector('#crowd[open] li:has-text("Anna")');
    expect(await gil.sidewaysScroll(), [0, 0, 0], 'surplus width of document, body and log');
    await gil.page.click('#crowd-close');
    await gil.leave();
  });

  await step('nothing so far has troubled the console or the content policy', () => expectNoTrouble(anna, bob));

  await step('SIGINT closes everybody with 1001 and the server ends with status 0', async () => {
    await anna.openSpy();
    const how = await server.stop('SIGINT');
    expect(await anna.spyClosed(), { code: 1001, wasClean: true }, 'how the socket was closed');
    expect(how, { status: 0, signal: null }, 'how the server ended');
  });

  await step('when the server is back, people return to their room under their names', async () => {
    await anna.is('waiting');
    await anna.type('written while it was away');
    server = await start(path, server.port, db);
    await anna.is('connected');
    await bob.is('connected');
    await anna.seesPeople(['Anna', 'Robert']);
    await bob.sees('written while it was away');
    await anna.sees('written while it was away', { own: true });
    expect(await anna.count('written while it was away'), 1, 'copies of the message');
    await expectTalk(anna, bob, 'After the return');
  });

  await step('a message that was sent and not acknowledged is sent again by itself, and is not doubled', async () => {
    server.child.kill('SIGSTOP');                     // takes the bytes and does not answer
    await anna.type('into the void');
    await anna.page.waitForSelector('#outbox .message.sent');
    await server.stop('SIGKILL');
    server = await start(path, server.port, db);
    await anna.is('connected');
    await bob.is('connected');
    await anna.sees('into the void', { own: true });
    await bob.sees('into the void');
    expect([await anna.count('into the void'), await bob.count('into the void')], [1, 1], 'copies of the message');
  });

  if (db.length) await step('with a file, what was said before the server was killed is there for a newcomer', async () => {
    const late = await arrive('tea');
    await late.sees('written while it was away');
    await late.sees('Biscuits, says the one');
    expect(await late.count('written while it was away'), 1, 'copies of the message');
    expect((await anna.everything()).includes('Messages are missing here.'), false, 'notice of a gap');
    await late.leave();
  });

  await server.stop('SIGINT');
  await main.browser.close();
}

// ---- Pictures for the README ---------------------------------------------------------------------------------------

const TALK = [
  [0, 'Tea in the garden today?'],
  [1, 'Gladly. I bring the ginger biscuits.'],
  [1, 'And Chloé, if her train is on time.'],
  [0, 'Then I take the big pot 🫖'],
  [1, 'Here is the way: https://example.org/garden'],
  [0, 'Found it. See you there!'],
];

async function tell(people) {
  for (const [who, line] of TALK) {
    await people[who].say(line);
    await Promise.all(people.filter(person => person !== people[who]).map(person => person.sees(line)));
  }
  await Promise.all(people.map(person => person.page.evaluate(() => document.activeElement.blur())));
}

/// Two pictures side by side on a calm ground, each framed like a window.
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
  const calm = { reducedMotion: 'reduce', timezoneId: 'Europe/Berlin' };
  const desktop = { ...calm, viewport: { width: 900, height: 640 }, colorScheme: 'light' };
  const phone = { ...calm, viewport: { width: 390, height: 780 }, colorScheme: 'dark', deviceScaleFactor: 2, isMobile: true, hasTouch: true };

  async function withServer(path, hash, looks, action) {
    const server = await start(path);
    const people = [];
    for (const look of looks) people.push(await Person.arrive(main.browser, server.address + hash, look));
    await action(people);
    for (const person of people) await person.leave();
    await server.stop('SIGINT');
  }

  if (paths.chat) await step('picture: chat.png, two browsers side by side', () => withServer(paths.chat, '', [desktop, desktop], async people => {
    await tell(people);
    await sideBySide(main.browser, [await people[0].page.screenshot(), await people[1].page.screenshot()], join(folder, 'chat.png'));
  }));
  const named = [{ ...desktop, name: 'Anna' }, { ...desktop, name: 'Bob' }, { ...phone, name: 'Chloé' }];
  if (paths.rooms) await step('picture: rooms.png and phone.png, names and a roster, light and dark', () => withServer(paths.rooms, '#tea', named, async people => {
    for (const person of people) await person.seesPeople(['Anna', 'Bob', 'Chloé']);
    await tell(people);
    await sideBySide(main.browser, [await people[0].page.screenshot(), await people[1].page.screenshot()], join(folder, 'rooms.png'));
    await people[2].say('It is. Keep a cup for me!');
    await people[2].page.evaluate(() => document.activeElement.blur());
    await people[2].page.screenshot({ path: join(folder, 'phone.png') });
  }));
  await main.browser.close();
}

// ---- The run -------------------------------------------------------------------------------------------------------

async function cleanUp() {
  for (const child of children) child.kill('SIGKILL');
  await Promise.allSettled([...browsers].map(({ server }) => server.kill()));
}

async function end() {
  await cleanUp();
  console.log(`${tally.passed} passed, ${tally.failed} failed`);
  process.exit(tally.failed ? 1 : 0);
}

setTimeout(() => {
  tally.failed += 1;
  console.log(`not ok - everything ends within ${LAST_CALL / 1000} s`);
  end();
}, LAST_CALL).unref();
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => { tally.failed += 1; end(); });

const paths = { chat: option('chat'), rooms: option('rooms') };

await step('the page: its policy names the hashes of its script and its style', () => {
  const { status, stderr } = spawnSync(process.execPath, [join(HERE, 'csp.mjs'), PAGE], { encoding: 'utf8' });
  if (status !== 0) throw new Error(stderr);
});
await step('the page: nothing in it parses text as markup or loads anything from outside', () => {
  const page = readFileSync(PAGE, 'utf8');
  const found = page.match(/innerHTML|outerHTML|insertAdjacentHTML|document\.write|unsafe-|\b(?:src|href)="(?!data:)[^"]*"/g);
  expect(found ?? [], [], 'what was found');
});
try {
  if (paths.chat) await testChat(paths.chat);
  if (paths.rooms) await testRooms(paths.rooms);
  if (option('shots')) await makePictures(paths, resolve(option('shots')));
} catch (error) {
  tally.failed += 1;
  console.log('not ok - the run itself\n' + String(error?.stack ?? error).replace(/^/gm, '  # '));
}
await end();
