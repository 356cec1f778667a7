// Tests the examples with two other client libraries: npm's ws and Node's built-in WebSocket.
//
//   node tests/interop/interop_test.mjs --echo BIN --chat BIN --rooms BIN --modules DIR [--zlib]
//
// Starts the programs itself, each on a port that the system selects. --zlib: they are built with compression. DIR is
// the folder of ws: a node_modules or its parent; the default is the folder of this file. Prints one line per check,
// then "N passed, N failed", and ends with status 1 if a check failed.

import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import http from 'node:http';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isDeepStrictEqual, parseArgs } from 'node:util';

const TIMEOUT = 60_000;  // ms for one check; generous, because a machine under load is slow
const TOTAL_TIMEOUT = 540_000;  // ms for all checks

// Node 20 needs a flag for its built-in WebSocket. Later versions do not.
const FLAG = '--experimental-websocket';
if (!globalThis.WebSocket && !process.execArgv.includes(FLAG) && process.allowedNodeEnvironmentFlags.has(FLAG)) {
  const argv = [FLAG, ...process.execArgv, ...process.argv.slice(1)];
  const restarted = spawnSync(process.execPath, argv, { stdio: 'inherit' });
  process.exit(restarted.status ?? 1);
}

// ---- Options
// ---------------------------------------------------------------------------------------------------------

function usage(message) {
  console.error(message);
  process.exit(2);
}

const HERE = dirname(fileURLToPath(import.meta.url));
const text = { type: 'string', default: '' };
const { values: options } = parseArgs({
  options: { echo: text, chat: text, rooms: text, modules: text, only: text, zlib: { type: 'boolean', default: false } },
});
if (!options.echo || !options.chat || !options.rooms)
  usage('Usage: interop_test.mjs --echo BIN --chat BIN --rooms BIN [--modules DIR] [--only TEXT] [--zlib]');

function load(name) {
  for (const folder of [options.modules, HERE].filter(Boolean)) {
    try { return createRequire(join(resolve(folder), 'here.js'))(name); } catch { /* try the next folder */ }
  }
  return usage(`${name} was not found. Run "npm install --no-package-lock" in tests/interop, or pass --modules DIR.`);
}
const { WebSocket: WsSocket } = load('ws');

// ---- Checks ------------------------------------------------------------------------------------------------------

const CHECKS = [];

// Registers a check. The checks run in the order of this file.
function check(title, action) {
  CHECKS.push({ title, action });
}

// The same for a function that takes a client class. It runs once per library.
function checkEachLibrary(title, action) {
  for (const library of LIBRARIES) check(`${library.title}: ${title}`, () => action(library));
}

function short(value) {
  const text = JSON.stringify(value) ?? String(value);
  return text.length <= 300 ? text : `${text.slice(0, 200)}... (${text.length} in total)`;
}

function expect(actual, expected, name = 'the result') {
  const same = Buffer.isBuffer(actual) && Buffer.isBuffer(expected) ? actual.equals(expected)
                                                                  : isDeepStrictEqual(actual, expected);
  if (!same) throw new Error(`${name}: expected ${short(expected)}, got ${short(actual)}`);
}

function withTimeout(promise, name) {
  let timer;
  const expired = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${TIMEOUT / 1000} s for ${name}`)), TIMEOUT);
  });
  return Promise.race([promise, expired]).finally(() => clearTimeout(timer));
}

// ---- Programs: child processes, stopped by their process ids
// --------------------------------------------------------

const programs = [];  // all started programs

// A running example, on its own port.
class Program {
  constructor(path) {
    this.log = '';
    this.output = '';
    this.child = spawn(resolve(path), ['0'], { stdio: ['ignore', 'pipe', 'pipe'] });
    this.child.stderr.setEncoding('utf8').on('data', text => { this.log = (this.log + text).slice(-2000); });
    this.ended = new Promise(done => {
      this.child.once('exit', (status, signal) => done(status ?? signal));
      this.child.once('error', error => done(String(error)));
    });
    programs.push(this);
  }

  static async start(path) {
    const program = new Program(path);
    const ready = new Promise(done => {
      program.child.stdout.setEncoding('utf8').on('data', text => {
        program.output += text;
        const address = program.output.match(/http:\/\/(127\.0\.0\.1:\d+)\//);
        if (address) done(address[1]);
      });
    });
    const died = program.ended.then(how => {
      throw new Error(`${path} ended with ${how} before it was ready: ${program.log}`);
    });
    died.catch(() => {});
    program.host = await withTimeout(Promise.race([ready, died]), `${path} to print its address`);
    return program;
  }

  ws(path = '/') { return `ws://${this.host}${path}`; }
  http(path = '/') { return `http://${this.host}${path}`; }

  // Sends a signal and returns the exit status, or the signal that ended the program.
  stop(signal = 'SIGTERM') {
    this.child.kill(signal);
    return withTimeout(this.ended, `the program to end after ${signal}`);
  }
}

let echo, chat, rooms;

// ---- Clients: the same methods for each library
// ---------------------------------------------------------------------

const openClients = new Set();  // the clients of a check; they are dropped after it

// A queue of received items and of waiting readers.
class AsyncQueue {
  #items = [];
  #waiting = [];
  put(item) {
    if (this.#waiting.length) this.#waiting.shift()(item);
    else this.#items.push(item);
  }
  get() {
    return this.#items.length ? Promise.resolve(this.#items.shift()) : new Promise(done => this.#waiting.push(done));
  }
}

class Client {
  messages = new AsyncQueue();

  // Resolves when the connection is open. `Library` is the WebSocket class.
  async connect(Library, ...args) {
    this.socket = new Library(...args);
    this.socket.binaryType = this.binaryType;
    openClients.add(this);
    this.closing = new Promise(done => this.socket.addEventListener('close', ({ code, reason, wasClean }) =>
      done({ code, reason, clean: wasClean })));
    this.socket.addEventListener('message', ({ data }) =>
      this.messages.put(typeof data === 'string' ? data : Buffer.from(data)));
    await new Promise((done, fail) => {
      this.socket.addEventListener('open', done);
      this.socket.addEventListener('error', e => fail(e.error ?? new Error(e.message || 'the connection failed')));
    });
    return this;
  }
  send(message) { this.socket.send(message); }
  // Returns the next message: a string or a Buffer.
  async receive() {
    const ended = this.closing.then(how => { throw new Error(`closed with ${short(how)} instead of a message`); });
    ended.catch(() => {});
    return Promise.race([this.messages.get(), ended]);
  }
  // Closes the connection. Returns how it ended.
  close(...codeAndReason) {
    this.socket.close(...codeAndReason);
    return this.closing;
  }
}

class WsClient extends Client {
  static title = 'ws';
  binaryType = 'nodebuffer';

  connect(url, { protocols = [], ...rest } = {}) {
    return super.connect(WsSocket, url, protocols, { perMessageDeflate: false, maxPayload: 64 * 1024 * 1024, ...rest });
  }
  drop() { this.socket.terminate(); }
}

class BuiltInClient extends Client {
  static title = 'built-in';
  binaryType = 'arraybuffer';

  connect(url) { return super.connect(globalThis.WebSocket, url); }
  drop() { this.socket.close(); }
}

const LIBRARIES = globalThis.WebSocket ? [WsClient, BuiltInClient] : [WsClient];
if (!globalThis.WebSocket) console.log(`# Node ${process.version} has no built-in WebSocket; only ws is tested`);

// ---- Echo: messages ----------------------------------------------------------------------------------------------

const SIZES = [0, 1, 125, 126, 127, 65535, 65536, 1024 * 1024, 16 * 1024 * 1024];

// A text of the given size in UTF-8, with characters of one to four bytes.
const textOf = size => 'aé€😀'.repeat(size / 10) + 'x'.repeat(size % 10);
const bytesOf = size => Buffer.alloc(size, Buffer.from(Array.from({ length: 256 }, (_, i) => i)));

const formatSize = size => `${size.toLocaleString('en')} bytes`;

// The built-in WebSocket inflates at most 4 MiB, and its compression cannot be switched off.
const tooLarge = (library, size) => options.zlib && library === BuiltInClient && size > 4 * 1024 * 1024;

for (const size of SIZES) {
  checkEachLibrary(`a text and a binary message of ${formatSize(size)} come back unchanged`, async library => {
    if (tooLarge(library, size)) return;
    const client = await new library().connect(echo.ws());
    for (const message of [textOf(size), bytesOf(size)]) {
      client.send(message);
      expect(await client.receive(), message, 'the echo');
    }
  });
}

checkEachLibrary('characters of all lengths, up to the last of Unicode, come back unchanged', async library => {
  const client = await new library().connect(echo.ws('/any/path?and=query'));
  for (const text of ['\x00\x7f', '\x80\u07ff', '\u0800\ud7ff\ue000\ufffe\uffff', '\u{10000}\u{10fffd}\u{10ffff}',
                      'κόσμε', '👩‍👩‍👧‍👦 e\u0301 \u202e\ufeff']) {
    client.send(text);
    expect(await client.receive(), text, 'the echo');
  }
});

checkEachLibrary('10,000 small messages, sent without a pause, come back in order', async library => {
  const client = await new library().connect(echo.ws());
  for (let number = 0; number < 10_000; ++number) client.send(`message ${number}`);
  for (let number = 0; number < 10_000; ++number) expect(await client.receive(), `message ${number}`, 'the echo');
});

checkEachLibrary('200 concurrent connections each get their own echo', async library => {
  const clients = await Promise.all(Array.from({ length: 200 }, () => new library().connect(echo.ws())));
  clients.forEach((client, number) => client.send(`I am ${number}`));
  for (const [number, client] of clients.entries()) expect(await client.receive(), `I am ${number}`, 'the echo');
  const ends = await Promise.all(clients.map(client => client.close(1000)));
  expect(ends.filter(({ code }) => code !== 1000), [], 'the connections that did not close with 1000');
});

check('ws: fragments, including empty ones and ones that split a character, come back as one message', async () => {
  const client = await new WsClient().connect(echo.ws());
  const sendParts = (binary, parts) => parts.forEach((part, i) =>
    client.socket.send(part, { binary, fin: i === parts.length - 1 }));
  const smile = Buffer.from('😀');
  sendParts(false, ['one ', '', 'two ', smile.subarray(0, 1), smile.subarray(1), '']);
  expect(await client.receive(), 'one two 😀', 'the echo');
  const parts = [Buffer.from([0]), Buffer.alloc(70_000, 255), Buffer.alloc(0), Buffer.from([1])];
  sendParts(true, parts);
  expect(await client.receive(), Buffer.concat(parts), 'the echo');
});

check('ws: pings between the fragments of a message are answered before the message is complete', async () => {
  const client = await new WsClient().connect(echo.ws());
  const pongs = new AsyncQueue();
  client.socket.on('pong', payload => pongs.put(payload.toString()));
  for (let number = 0; number < 5; ++number) {
    client.socket.send(`part ${number} `, { fin: false });
    client.socket.ping(`ping ${number}`);
    expect(await pongs.get(), `ping ${number}`, 'the payload of the pong');
  }
  client.socket.send('end', { fin: true });
  expect(await client.receive(), 'part 0 part 1 part 2 part 3 part 4 end', 'the echo');
});

// ---- Echo: control frames ----------------------------------------------------------------------------------------

check('ws: the pong has the payload of the ping, of 0 to 125 bytes', async () => {
  const client = await new WsClient().connect(echo.ws());
  const pongs = new AsyncQueue();
  client.socket.on('pong', payload => pongs.put(payload));
  for (const payload of [Buffer.alloc(0), Buffer.from([0, 255]), Buffer.from('ping 😀'), bytesOf(125)]) {
    client.socket.ping(payload);
    expect(await pongs.get(), payload, 'the payload of the pong');
  }
});

check('ws: an unsolicited pong has no effect', async () => {
  const client = await new WsClient().connect(echo.ws());
  client.socket.pong('unasked');
  client.send('still here');
  expect(await client.receive(), 'still here', 'the echo');
});

checkEachLibrary('the reply to a close with a code and a reason has the same code', async library => {
  for (const [code, reason] of [[1000, ''], [1000, 'done'], [3000, 'x'.repeat(123)], [4999, 'до свидания 😀']]) {
    const client = await new library().connect(echo.ws());
    const how = await client.close(code, reason);
    expect([how.code, how.clean], [code, true], 'the code of the reply, and whether the close was clean');
  }
});

checkEachLibrary('the reply to a close without a code is a Close frame without a code', async library => {
  const client = await new library().connect(echo.ws());
  expect(await client.close(), { code: 1005, reason: '', clean: true }, 'the end');  // RFC 6455 7.1.5: 1005 means no code
});

check('ws: messages before a close come back before the reply to the close', async () => {
  const client = await new WsClient().connect(echo.ws());
  const message = bytesOf(8 * 1024 * 1024);
  client.send(message);
  client.send('last');
  const closing = client.close(1000);
  expect(await client.receive(), message, 'the echo');
  expect(await client.receive(), 'last', 'the echo');
  expect((await closing).code, 1000, 'the code of the reply');
});

checkEachLibrary('a stopping server closes with 1001 and ends with status 0', async library => {
  const program = await Program.start(options.echo);
  const clients = await Promise.all([1, 2, 3].map(() => new library().connect(program.ws())));
  clients[0].send('hello');
  expect(await clients[0].receive(), 'hello', 'the echo');
  const status = program.stop('SIGINT');
  for (const client of clients) {
    const { code, reason, clean } = await client.closing;
    expect([code, reason !== '', clean], [1001, true, true], 'the close code, whether there is a reason, whether the close was clean');
  }
  expect(await status, 0, 'the status of the server');
});

// ---- Compression -------------------------------------------------------------------------------------------------

const both = [false, true];
const parameterSets = both.flatMap(serverNo => both.flatMap(clientNo => [undefined, 9, 12, 15].flatMap(serverBits =>
  [undefined, true, 9, 13].map(clientBits => ({ serverNo, clientNo, serverBits, clientBits })))));

if (options.zlib) {
  check('ws: messages work with all parameters of permessage-deflate', async () => {
    for (const { serverNo, clientNo, serverBits, clientBits } of parameterSets) {
      const client = await new WsClient().connect(echo.ws(), { perMessageDeflate: {
        threshold: 0, serverNoContextTakeover: serverNo, clientNoContextTakeover: clientNo,
        serverMaxWindowBits: serverBits, clientMaxWindowBits: clientBits } });
      expect(client.socket._extensions?.['permessage-deflate'] !== undefined, true, 'whether compression was accepted');
      for (const message of ['', 'x', 'hello hello hello', textOf(10_000), bytesOf(70_000), 'hello hello hello',
                             textOf(10_000)]) {
        client.send(message);
        expect(await client.receive(), message, 'the echo');
      }
      expect((await client.close(1000)).code, 1000, 'the code of the reply');
    }
  });

  checkEachLibrary('compressed messages of all sizes come back unchanged', async library => {
    const client = await new library().connect(echo.ws(), { perMessageDeflate: { threshold: 0 } });
    for (const size of SIZES.filter(size => !tooLarge(library, size)))
      for (const message of [textOf(size), bytesOf(size)]) {
        client.send(message);
        expect(await client.receive(), message, 'the echo');
      }
  });

  check('ws: a compressed message in fragments, with pings between them, comes back as one message', async () => {
    const client = await new WsClient().connect(echo.ws(), { perMessageDeflate: { threshold: 0 } });
    for (let number = 0; number < 100; ++number) {
      client.socket.send(`part ${number} `, { fin: false, compress: true });
      client.socket.ping();
    }
    client.socket.send('end', { fin: true, compress: true });
    expect(await client.receive(), Array.from({ length: 100 }, (_, number) => `part ${number} `).join('') + 'end',
           'the echo');
  });
}

// ---- The handshake -----------------------------------------------------------------------------------------------

checkEachLibrary('an offer of permessage-deflate is accepted if the program is built with zlib', async library => {
  // The built-in WebSocket always offers it.
  const client = await new library().connect(echo.ws(), { perMessageDeflate: { threshold: 0 } });
  const accepted = client.socket.extensions.split(';')[0];
  expect([accepted, client.socket.protocol], [options.zlib ? 'permessage-deflate' : '', ''], 'the extension, the subprotocol');
  client.send('a'.repeat(1000));
  expect(await client.receive(), 'a'.repeat(1000), 'the echo');
});

check('ws: the server selects no subprotocol', async () => {
  // ws then fails the connection, as a browser does. The test reads the server's response before that.
  const client = new WsClient();
  const connecting = client.connect(echo.ws(), { protocols: ['chat.v2', 'chat'] });
  const upgraded = once(client.socket, 'upgrade');
  const message = await connecting.then(() => 'it is open', error => error.message);
  expect(message, 'Server sent no subprotocol', 'the error of ws');
  const [response] = await upgraded;
  expect(response.statusCode, 101, 'the status');
  expect(response.headers['sec-websocket-protocol'], undefined, 'the subprotocol');
});

// Returns the server's response to a rejected handshake of ws.
async function rejectedHandshake(url, wsOptions) {
  const socket = new WsSocket(url, { perMessageDeflate: false, ...wsOptions });
  const accepted = once(socket, 'open').then(() => { throw new Error('the connection was accepted'); });
  accepted.catch(() => {});
  const [, response] = await Promise.race([once(socket, 'unexpected-response'), accepted]);
  return readResponse(response);
}

async function readResponse(response) {
  let body = '';
  for await (const part of response.setEncoding('utf8')) body += part;
  const { date, ...headers } = response.headers;
  return { status: response.statusCode, headers, body };
}

check('ws: a page of the same host may connect', async () => {
  const client = await new WsClient().connect(chat.ws('/chat'), { origin: chat.http().slice(0, -1) });
  client.send('hello');
  expect(await client.receive(), 'hello', 'the message');
});

const REJECTIONS = [
  ['an origin of another host', '/chat', { origin: 'http://evil.example' }, 403, 'http://evil.example'],
  ['the origin null', '/chat', { origin: 'null' }, 403, 'null'],
  ['version 8', '/chat', { protocolVersion: 8 }, 426, '13'],
  ['an unknown path', '/nowhere', {}, 404, 'path'],
];
for (const [name, path, wsOptions, status, word] of REJECTIONS) {
  check(`ws: ${name} is rejected with ${status} and an error text`, async () => {
    const response = await rejectedHandshake(chat.ws(path), wsOptions);
    expect(response.status, status, 'the status');
    expect([response.body.includes(word), response.body.endsWith('.\n')], [true, true],
           `whether "${response.body}" is an error text with "${word}"`);
    if (status === 426) expect(response.headers['sec-websocket-version'], '13', 'Sec-WebSocket-Version');
  });
}

// ---- Pages -------------------------------------------------------------------------------------------------------

check('pages: GET, HEAD and a conditional GET on one connection of node:http', async () => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const ports = new Set();
  const ask = async (method, path, headers = {}) => {
    const request = http.request(chat.http(path), { method, headers, agent }).end();
    const [response] = await once(request, 'response');
    ports.add(response.socket.localPort);
    return readResponse(response);
  };
  try {
    const page = await ask('GET', '/');
    expect([page.status, page.headers['content-type']], [200, 'text/html; charset=utf-8'], 'the page');
    expect(page.body.includes('</html>'), true, 'whether the page is complete');
    const head = await ask('HEAD', '/');
    expect([head.status, head.body, head.headers], [200, '', page.headers], 'the response to HEAD');
    const known = await ask('GET', '/', { 'If-None-Match': page.headers.etag });
    expect([known.status, known.body], [304, ''], 'the response to a conditional GET');
    expect((await ask('GET', '/nothing')).status, 404, 'the status of an unknown path');
    expect((await ask('GET', '/chat')).status, 426, 'the status of a WebSocket without an upgrade');
    expect((await ask('GET', '/')).body, page.body, 'the page on a second request');
    expect(ports.size, 1, 'the number of connections');
  } finally {
    agent.destroy();
  }
});

check('pages: fetch() gets the page', async () => {
  const response = await fetch(chat.http());
  expect([response.status, (await response.text()).includes('</html>')], [200, true], 'the page');
});

// ---- Chat --------------------------------------------------------------------------------------------------------

const [FIRST, SECOND] = [LIBRARIES[0], LIBRARIES.at(-1)];

check('chat: clients of two libraries receive all messages of the room in the same order', async () => {
  const anna = await new FIRST().connect(chat.ws('/chat')), bert = await new SECOND().connect(chat.ws('/chat'));
  for (const [speaker, line] of [[anna, 'hello, Bert 😀'], [bert, 'hello, Anna'], [anna, bytesOf(3)], [bert, '']]) {
    speaker.send(line);
    expect([await anna.receive(), await bert.receive()], [line, line], 'what both receive');
  }
});

check('chat: connections that end with a FIN or a reset do not disturb the others', async () => {
  const anna = await new FIRST().connect(chat.ws('/chat')), bert = await new SECOND().connect(chat.ws('/chat'));
  for (let number = 0; number < 10; ++number) {
    const gone = await new WsClient().connect(chat.ws('/chat'));
    anna.send(`line ${number}`);
    if (number % 2) gone.socket._socket.resetAndDestroy();
    else gone.socket.terminate();
    expect([await anna.receive(), await bert.receive()], [`line ${number}`, `line ${number}`], 'what the others receive');
  }
});

checkEachLibrary('chat: a message over the limit gets 1009, and the other members stay', async library => {
  const other = await new library().connect(chat.ws('/chat'));
  // The server closes while most of the message is unsent. A reset must not overtake its Close frame.
  for (const size of [1024 * 1024 + 1, 2 * 1024 * 1024, ...Array(3).fill(16 * 1024 * 1024)]) {
    const client = await new library().connect(chat.ws('/chat'));
    client.send(bytesOf(size));
    expect((await client.closing).code, 1009, `the close code for ${formatSize(size)}`);
  }
  other.send('still here');
  expect(await other.receive(), 'still here', 'the message');
});

// ---- Rooms -------------------------------------------------------------------------------------------------------

// Expects the next event to have exactly these fields. Some events also have a time and an id.
async function event(client, expected) {
  let next = JSON.parse(await client.receive());
  // A join may come at any time in the half second after another one.
  while (next.type === 'join' && expected.type !== 'join') next = JSON.parse(await client.receive());
  const { time, id, user, count, ...got } = next;
  if (expected.type === 'users') got.users = got.users.map(each => each.name);
  expect(got, expected, 'the event');
  expect(count, expected.users?.length, 'the count of users');
  expect(user?.length, 'name' in expected ? 16 : undefined, "the length of the user's id");
  expect(Number.isInteger(time), ['said', 'join', 'leave', 'nick'].includes(expected.type), 'whether there is a time');
  expect(Number.isInteger(id), expected.type === 'said', 'whether there is an id');
}

async function joinRoom(library, room, query, name, users) {
  const client = await new library().connect(rooms.ws(`/chat/${encodeURIComponent(room)}${query}`));
  const hello = JSON.parse(await client.receive());
  expect([hello.type, hello.version, hello.server, hello.room, hello.name], ['hello', 3, 'wschat', room, name], 'the first event');
  await event(client, { type: 'users', room, users });
  expect(JSON.parse(await client.receive()).type, 'history', 'the third event');
  return client;
}

check('rooms: joining, messages, renaming, errors and leaving are JSON events', async () => {
  const anna = await joinRoom(FIRST, 'Grüner Tee 🍵', '?name=Anna', 'Anna', ['Anna']);
  const bert = await joinRoom(SECOND, 'Grüner Tee 🍵', '?name=Anna', 'Anna-2', ['Anna', 'Anna-2']);
  const room = 'Grüner Tee 🍵';
  await event(anna, { type: 'join', room, name: 'Anna-2' });

  const text = 'said "so" \\ </script> \u2028 😀';
  anna.send(text);
  for (const client of [anna, bert]) await event(client, { type: 'said', room, name: 'Anna', text });

  bert.send('/nick Bert');
  for (const client of [anna, bert]) {
    await event(client, { type: 'nick', room, old: 'Anna-2', name: 'Bert' });
  }

  for (const [line, code] of [['/nick Anna', 'name_taken'], ['/nick ', 'name_bad'], ['/dance', 'unknown_command'],
                              [Buffer.from([0]), 'bad_line']]) {
    bert.send(line);
    const error = JSON.parse(await bert.receive());
    expect([error.type, error.code, error.text !== ''], ['error', code, true], 'the error');
  }

  expect((await bert.close(1000)).code, 1000, 'the close code');
  await event(anna, { type: 'leave', room, name: 'Bert' });
});

check('rooms: a disconnected member leaves the list of users after the grace period', async () => {
  const room = 'tea';
  const anna = await joinRoom(FIRST, room, '?name=Anna', 'Anna', ['Anna']);
  const bert = await joinRoom(WsClient, room, '?name=Bert', 'Bert', ['Anna', 'Bert']);
  await event(anna, { type: 'join', room, name: 'Bert' });
  bert.socket.terminate();
  await event(anna, { type: 'leave', room, name: 'Bert' });
});

// ---- Keepalive and shutdown
// -----------------------------------------------------------------------------------------

const silent = {};  // connected at the start of the run and silent until its check

check('keepalive: the server pings a silent client, and the connection stays open', async () => {
  expect((await silent.pinged).length, 0, 'the length of the payload of the ping');
  for (const client of silent.clients) {
    client.send('still here');
    expect(await client.receive(), 'still here', 'the echo');
    expect((await client.close(1000)).code, 1000, 'the close code');
  }
});

check('the three programs still run and end with status 0 on SIGTERM', async () => {
  for (const program of [echo, chat, rooms]) {
    expect(program.child.exitCode ?? program.child.signalCode, null, 'the status before the signal');
    expect(await program.stop('SIGTERM'), 0, 'the status');
  }
});

// ---- The run
// --------------------------------------------------------------------------------------------------------

const results = { passed: 0, failed: 0 };

async function run({ title, action }) {
  try {
    await withTimeout(action(), 'this check to end');
    results.passed += 1;
    console.log(`ok - ${title}`);
  } catch (error) {
    results.failed += 1;
    console.log(`not ok - ${title}: ${error.message}`);
  }
  for (const client of openClients) client.drop();
  openClients.clear();
}

function finish() {
  for (const program of programs) program.child.kill('SIGKILL');
  if (results.failed) for (const { log } of [echo, chat, rooms]) console.log(`# end of the log: ${log}`);
  console.log(`${results.passed} passed, ${results.failed} failed`);
  process.exit(results.failed || !results.passed ? 1 : 0);
}

process.once('SIGTERM', () => process.exit(1));
process.on('exit', () => { for (const program of programs) program.child.kill('SIGKILL'); });
setTimeout(() => {
  results.failed += 1;
  console.log(`not ok - all checks end within ${TOTAL_TIMEOUT / 1000} s`);
  finish();
}, TOTAL_TIMEOUT);

[echo, chat, rooms] = await Promise.all([options.echo, options.chat, options.rooms].map(path => Program.start(path)));
silent.clients = await Promise.all(LIBRARIES.map(library => new library().connect(echo.ws())));
silent.pinged = new Promise(done => silent.clients[0].socket.on('ping', done));
openClients.clear();  // silent clients stay open
for (const item of CHECKS) if (item.title.includes(options.only)) await run(item);
finish();
