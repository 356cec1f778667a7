// Tests examples/wschat.js with a real server through kills and cut lines, and with a server made of scripted events.
//
//   node tests/interop/wschat_js_test.mjs --rooms BIN [--db FILE] [--modules DIR] [--only TEXT]
//
// --db is for a rooms program with SQLite. DIR is the folder of ws and typescript: a node_modules or its parent; the default
// is the folder of this file. Prints one line per check, and ends with status 1 if a check failed.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import net from 'node:net';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const TIMEOUT = 60_000;  // ms for one event; generous, because a machine under load is slow
const HERE = dirname(fileURLToPath(import.meta.url));
const text = { type: 'string', default: '' };
const { values: options } = parseArgs({ options: { rooms: text, db: text, modules: text, only: text } });

function load(name) {
  for (const folder of [options.modules, HERE].filter(Boolean)) {
    try { return createRequire(join(resolve(folder), 'here.js'))(name); } catch { /* try the next folder */ }
  }
  console.error(`${name} was not found. Run "npm install --no-package-lock" in tests/interop, or pass --modules DIR.`);
  return process.exit(2);
}
const { WebSocket, WebSocketServer } = load('ws');
const { ChatClient, ChatRoomState, mentions } = await import(pathToFileURL(join(HERE, '../../examples/wschat.js')).href);

// ---- Checks ------------------------------------------------------------------------------------------------------

const results = { passed: 0, failed: 0 };
const clients = new Set(), servers = new Set();

async function check(title, action) {
  if (!title.includes(options.only)) return;
  try {
    await action();
    results.passed += 1;
    console.log(`ok - ${title}`);
  } catch (error) {
    results.failed += 1;
    console.log(`not ok - ${title}\n${String(error?.stack ?? error).replace(/^/gm, '  # ')}`);
  }
  for (const client of clients) client.close();
  clients.clear();
  for (const server of servers) await server.stop('SIGKILL');
}

async function until(condition, name) {
  const deadline = Date.now() + TIMEOUT;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`waited ${TIMEOUT / 1000} s for ${name}`);
    await new Promise(done => setTimeout(done, 10));
  }
}

function newClient(url, rooms, name, more = {}) {
  const client = new ChatClient({ url, rooms, name, WebSocket, storage: null, deadline: 2000, ...more });
  clients.add(client);
  client.log = [];
  for (const type of ['message', 'change', 'history', 'error', 'kicked', 'outbox', 'join', 'leave', 'state', 'typing'])
    client.addEventListener(type, ({ detail }) => client.log.push({ on: type, ...detail }));
  client.connect();
  return client;
}

async function joined(client, room) { await until(() => client.rooms.get(room)?.joined, `${client.me.name} to be in ${room}`); }
function texts(client, room) { return (client.rooms.get(room)?.messages ?? []).map(message => message.text); }
async function saw(client, room, count) {
  await until(() => texts(client, room).length >= count, `${count} messages in ${room}, not ${texts(client, room).length}`);
}

// ---- The real server, and a line to it that can be cut -----------------------------------------------------------

class Rooms {
  constructor(port = 0, more = []) {
    servers.add(this);
    this.child = spawn(resolve(options.rooms), [String(port), ...more], { stdio: ['ignore', 'pipe', 'ignore'] });
    this.ended = once(this.child, 'exit').finally(() => servers.delete(this));
  }
  async ready() {
    let output = '';
    this.child.stdout.on('data', data => { output += data; });
    await until(() => /http:\/\/127\.0\.0\.1:(\d+)/.test(output), 'the server');
    this.port = Number(output.match(/:(\d+)\//)[1]);
    this.url = `ws://127.0.0.1:${this.port}/chat`;
    return this;
  }
  async stop(signal) {
    this.child.kill(signal);
    await this.ended;
  }
}
function start(port, more) { return new Rooms(port, more).ready(); }

// Forwards TCP. cut() ends all connections; while `deaf`, bytes of both sides are thrown away.
class Line {
  constructor(port) {
    this.sockets = new Set();
    this.deaf = false;
    this.server = net.createServer(near => {
      const far = net.connect(port, '127.0.0.1');
      for (const [from, to] of [[near, far], [far, near]]) {
        this.sockets.add(from);
        from.on('data', data => { if (!this.deaf) to.write(data); });
        from.on('error', () => {});
        from.on('close', () => { this.sockets.delete(from); to.destroy(); });
      }
    });
    servers.add(this);
  }
  async ready() {
    this.server.listen(0, '127.0.0.1');
    await once(this.server, 'listening');
    this.url = `ws://127.0.0.1:${this.server.address().port}/chat`;
    return this;
  }
  cut() { for (const socket of this.sockets) socket.destroy(); }
  async stop() {
    servers.delete(this);
    this.cut();
    this.server.close();
  }
}

function database() {
  for (const end of ['', '-wal', '-shm', '-lock', '-journal']) rmSync(options.db + end, { force: true });
  return ['--db', options.db];
}

if (options.rooms) {
  await check('two clients talk, and each knows its own messages', async () => {
    const server = await start();
    const anna = newClient(server.url, ['tea'], 'Anna'), bob = newClient(server.url, ['tea'], 'Bob');
    await joined(anna, 'tea');
    await joined(bob, 'tea');
    anna.say('tea', 'hello');
    await saw(bob, 'tea', 1);
    bob.say('tea', '/slash', {});
    await saw(anna, 'tea', 2);
    assert.deepEqual(anna.rooms.get('tea').messages.map(each => [each.text, each.own]), [['hello', true], ['/slash', false]]);
    assert.deepEqual(anna.outbox, []);
    await until(() => anna.rooms.get('tea').users.size === 2, 'both users');
  });

  await check('the key goes in a subprotocol: two connections with one key are one user', async () => {
    const server = await start();
    const key = 'a secret with \u00FC of a user';
    const one = newClient(server.url, ['tea'], 'Anna', { key }), two = newClient(server.url, ['tea'], 'Anna', { key });
    const other = newClient(server.url, ['tea'], 'Anna', { key: 'another secret' });
    for (const each of [one, two, other]) await joined(each, 'tea');
    await until(() => one.rooms.get('tea').users.size === 2, 'two users');
    assert.equal(one._socket.protocol, 'wschat');
    assert.ok(!one._socket.url.includes('secret'), 'the address has the secret');
    assert.deepEqual([one.me.name, two.me.name], ['Anna', 'Anna']);
    assert.notEqual(other.me.name, 'Anna');
  });

  await check('sixty messages at once arrive in their order, at the pace of the server', async () => {
    const server = await start();
    const anna = newClient(server.url, ['tea'], 'Anna'), bob = newClient(server.url, ['tea'], 'Bob');
    await joined(bob, 'tea');
    const sent = Array.from({ length: 60 }, (_, i) => `number ${i}`);
    for (const each of sent) anna.say('tea', each);
    await saw(bob, 'tea', 60);
    assert.deepEqual(texts(bob, 'tea'), sent);
  });

  await check('older messages are loaded page by page', async () => {
    const server = await start();
    const anna = newClient(server.url, ['tea'], 'Anna');
    await joined(anna, 'tea');
    const sent = Array.from({ length: 70 }, (_, i) => `number ${i}`);
    for (const each of sent) anna.say('tea', each);
    await saw(anna, 'tea', 70);
    const late = newClient(server.url, ['tea'], 'Late');
    await joined(late, 'tea');
    const first = texts(late, 'tea').length;
    assert.ok(first > 0 && first < 70 && late.rooms.get('tea').more, `${first} messages at first`);
    while (late.rooms.get('tea').more) assert.ok(await late.before('tea', 30) > 0, 'a page without messages');
    assert.deepEqual(texts(late, 'tea'), sent);
    assert.equal(await late.before('tea'), 0);
  });

  await check('several rooms: one connection, resumed in each after the line was cut', async () => {
    const server = await start(), line = await new Line(server.port).ready();
    const anna = newClient(line.url, ['tea', 'milk and sugar'], 'Anna'), bob = newClient(server.url, ['tea', 'milk and sugar'], 'Bob');
    for (const each of [anna, bob]) for (const room of ['tea', 'milk and sugar']) await joined(each, room);
    anna.say('milk and sugar', 'one');
    anna.say('tea', 'two');
    await saw(bob, 'tea', 1);
    await saw(bob, 'milk and sugar', 1);
    line.deaf = true;
    bob.say('tea', 'three');
    bob.say('milk and sugar', 'four');
    await until(() => bob.outbox.length === 0, 'the messages of Bob');
    line.cut();
    line.deaf = false;
    await saw(anna, 'tea', 2);
    await saw(anna, 'milk and sugar', 2);
    assert.deepEqual(texts(anna, 'tea'), ['two', 'three']);
    assert.deepEqual(texts(anna, 'milk and sugar'), ['one', 'four']);
    assert.ok(!anna.log.some(each => each.on === 'history' && each.gap), 'no gap');
    assert.equal(anna.rooms.get('tea').unread, 1);
  });

  await check('a client notices a dead line, and what it said meanwhile arrives once', async () => {
    const server = await start(), line = await new Line(server.port).ready();
    const anna = newClient(line.url, ['tea'], 'Anna'), bob = newClient(server.url, ['tea'], 'Bob');
    await joined(anna, 'tea');
    await joined(bob, 'tea');
    line.deaf = true;
    const sent = ['into the void', 'and again', 'and once more'];
    for (const each of sent) anna.say('tea', each);
    await until(() => anna.state === 'waiting', 'the client to notice');
    line.deaf = false;
    await saw(bob, 'tea', 3);
    await until(() => anna.outbox.length === 0, 'the answers');
    assert.deepEqual([texts(anna, 'tea'), texts(bob, 'tea')], [sent, sent]);
  });

  await check('a line that is cut again and again neither loses, repeats nor reorders a message', async () => {
    const server = await start(), line = await new Line(server.port).ready();
    const anna = newClient(line.url, ['tea'], 'Anna'), bob = newClient(line.url, ['tea'], 'Bob');
    const sent = { Anna: [], Bob: [] };
    for (let round = 0; round < 8; round++) {
      for (const client of [anna, bob]) for (let i = 0; i < 5; i++) {
        const said = `${client.options.name} ${round}.${i}`;
        sent[client.options.name].push(said);
        client.say('tea', said);
      }
      const most = 10 * round + 1;
      await until(() => (anna.rooms.get('tea')?.messages.length ?? 0) >= Math.min(most, 10 * round + 3), 'some progress');
      line.cut();
    }
    for (const client of [anna, bob]) await saw(client, 'tea', 80);
    for (const client of [anna, bob]) for (const name of ['Anna', 'Bob'])
      assert.deepEqual(texts(client, 'tea').filter(each => each.startsWith(name)), sent[name]);
    assert.deepEqual(texts(anna, 'tea'), texts(bob, 'tea'));
  });
}

// Ids of users, epochs and times differ in each run.
function masked(event) {
  return event.replace(/"(user|epoch)":"[^"]*"/g, '"$1":"?"').replace(/"time":\d+/g, '"time":0');
}

if (options.rooms) {
  await check('the session in examples/README.md is what the server and a client exchange', async () => {
    const readme = readFileSync(join(HERE, '../../examples/README.md'), 'utf8');
    const lines = readme.match(/```text\n(< \{"type":"hello"[^]*?)```/)[1].trim().split('\n');
    const server = await start(), events = [];
    const socket = new WebSocket(`${server.url}/tea?name=Anna&key=a-key-of-Anna`);
    socket.on('message', data => events.push(String(data)));
    for (const line of lines) {
      if (line.startsWith('> ')) socket.send(line.slice(2));
      else {
        await until(() => events.length > 0, line);
        assert.equal(masked(events.shift()), masked(line.slice(2)));
      }
    }
    assert.deepEqual(events, []);
    socket.terminate();
  });
}

if (options.rooms && options.db) {
  await check('with a database, a server that is killed and started again loses nothing', async () => {
    const db = database();
    let server = await start(0, db);
    const { port, url } = server;
    const anna = newClient(url, ['tea'], 'Anna'), bob = newClient(url, ['tea'], 'Bob');
    await joined(anna, 'tea');
    await joined(bob, 'tea');
    const sent = [];
    for (let round = 0; round < 4; round++) {
      for (let i = 0; i < 6; i++) {
        sent.push(`${round}.${i}`);
        anna.say('tea', sent.at(-1));
      }
      await until(() => texts(bob, 'tea').length >= 6 * round + 2, 'some progress');
      await server.stop('SIGKILL');
      server = await start(port, db);
    }
    await saw(bob, 'tea', sent.length);
    await until(() => anna.outbox.length === 0, 'the answers');
    assert.deepEqual(texts(bob, 'tea'), sent);
    assert.deepEqual(texts(anna, 'tea'), sent);
  });

  await check('private messages to a user who is away wait for him, and a restart does not lose the conversation', async () => {
    const db = database(), keys = { Anna: 'the secret of Anna', Bob: 'the secret of Bob' };
    let server = await start(0, db);
    const anna = newClient(server.url, ['tea'], 'Anna', { key: keys.Anna });
    let bob = newClient(server.url, ['tea'], 'Bob', { key: keys.Bob });
    const phone = newClient(server.url, ['tea'], 'Bob', { key: keys.Bob });
    for (const each of [anna, bob, phone]) await joined(each, 'tea');
    await until(() => anna.rooms.get('tea').users.size === 2, 'both users');
    const toBob = anna.converse({ user: bob.me.user, name: 'Bob' }).name, toAnna = '@' + anna.me.user;
    anna.say(toBob, 'are you there?');
    for (const each of [bob, phone]) await saw(each, toAnna, 1);
    assert.equal(phone.rooms.get(toAnna).unread, 1);
    bob.markRead(toAnna);
    await until(() => phone.rooms.get(toAnna).unread === 0, 'the marker on the other device');
    for (const each of [bob, phone]) each.close();
    anna.say(toBob, 'read this later');
    await until(() => anna.outbox.length === 0, 'the message');
    await server.stop('SIGKILL');
    server = await start(server.port, db);
    await until(() => anna.state === 'connected', 'Anna');
    bob = newClient(server.url, ['tea'], 'Bob', { key: keys.Bob });
    await saw(bob, toAnna, 1);  // what he has read comes with /before
    await until(() => bob.rooms.get(toAnna).unread === 1, 'the marker');
    assert.deepEqual(bob.rooms.get(toAnna).messages.map(each => [each.text, each.own]), [['read this later', false]]);
    assert.deepEqual([bob.rooms.get(toAnna).title, bob.rooms.get(toAnna).mentions], ['Anna', 1]);
    bob.say(toAnna, 'I do');
    await saw(anna, toBob, 3);
    assert.deepEqual(anna.rooms.get(toBob).messages.map(each => [each.text, each.own]), [['are you there?', true], ['read this later', true], ['I do', false]]);
  });

  await check('read markers are those of the user on each device; a newcomer has nothing unread', async () => {
    const server = await start(0, database());
    const device = () => newClient(server.url, ['tea'], 'Anna', { key: 'the secret of Anna' });
    const writer = newClient(server.url, ['tea'], 'Bob'), desk = device(), tablet = device();
    for (const each of [desk, tablet, writer]) await joined(each, 'tea');
    writer.say('tea', 'one');
    for (const each of [desk, tablet]) await saw(each, 'tea', 1);
    assert.equal(tablet.rooms.get('tea').unread, 1);
    desk.markRead('tea');
    await until(() => tablet.rooms.get('tea').unread === 0, 'the marker on the other device');
    for (const each of [desk, tablet]) each.close();
    for (const each of ['two', 'for @Anna']) writer.say('tea', each);
    await until(() => writer.outbox.length === 0, 'the messages');
    const phone = device(), newcomer = newClient(server.url, ['tea'], 'Cy');
    await saw(phone, 'tea', 3);
    await until(() => phone.rooms.get('tea').unread === 2, 'the marker');
    assert.equal(phone.rooms.get('tea').mentions, 1);
    await saw(newcomer, 'tea', 3);
    assert.equal(newcomer.rooms.get('tea').unread, 0);
    writer.say('tea', 'four');
    await until(() => newcomer.rooms.get('tea').unread === 1, 'the new message');
  });

  await check('another database under a client is a gap: it forgets what it knew, and repeats nothing', async () => {
    let server = await start(0, database());
    const { port, url } = server;
    const anna = newClient(url, ['tea'], 'Anna');
    await joined(anna, 'tea');
    for (const each of ['a', 'b', 'c']) anna.say('tea', each);
    await saw(anna, 'tea', 3);
    await server.stop('SIGKILL');
    server = await start(port, database());
    const writer = newClient(url, ['tea'], 'Writer');
    await joined(writer, 'tea');
    writer.say('tea', 'a new beginning');
    await until(() => anna.log.some(each => each.on === 'history' && each.gap), 'the gap');
    await until(() => texts(anna, 'tea').includes('a new beginning'), 'the new message');
    assert.deepEqual(texts(anna, 'tea'), ['a new beginning']);
  });
}

// ---- A server made of scripted events ----------------------------------------------------------------------------

class Script {
  constructor(answer = () => {}) {
    servers.add(this);
    this.lines = [];
    this.connections = 0;
    this.server = new WebSocketServer({ port: 0, host: '127.0.0.1', handleProtocols: () => 'wschat' });
    this.server.on('connection', (socket, request) => {
      this.socket = socket;
      this.address = request.url;
      this.connections += 1;
      this.send({ type: 'hello', version: 3, room: 'tea', name: 'Anna', user: 'ANNA', features: ['read', 'edit', 'react', 'topic'], may: ['say', 'kick'], limits: { text: 100, per_second: 100, burst: 200 } });
      this.send({ type: 'users', room: 'tea', count: 2, users: [{ user: 'ANNA', name: 'Anna' }, { user: 'BOB', name: 'Bob' }] });
      this.send({ type: 'history', room: 'tea', epoch: 'e'.repeat(16), last: 10, gap: false, more: false, entries: this.connections > 1 ? [] : [
        { type: 'said', room: 'tea', id: 9, user: 'BOB', name: 'Bob', text: 'nine', time: 1, reactions: [{ emoji: '+', count: 1, users: ['BOB'] }] },
        { type: 'said', room: 'tea', id: 10, user: 'ANNA', name: 'Anna', text: 'ten', time: 2 }] });
      socket.on('message', data => {
        const line = String(data), [, tag, rest] = line.match(/^\/tag (\S+) ([^]*)$/) ?? [, undefined, line];
        this.lines.push(rest);
        answer(this, rest, tag);
      });
    });
  }
  async ready() {
    await once(this.server, 'listening');
    this.url = `ws://127.0.0.1:${this.server.address().port}/chat`;
    return this;
  }
  send(event) { this.socket.send(JSON.stringify(event)); }
  async stop() {
    servers.delete(this);
    for (const socket of this.server.clients) socket.terminate();
    this.server.close();
  }
}

async function scripted(answer) {
  const script = await new Script(answer).ready();
  const client = newClient(script.url, ['tea'], 'Anna');
  await joined(client, 'tea');
  return { script, client, room: client.rooms.get('tea') };
}

await check('an amendment changes its message once, however often it comes', async () => {
  const { script, client, room } = await scripted();
  const edit = { type: 'edit', room: 'tea', id: 11, target: 9, user: 'BOB', name: 'Bob', text: 'NINE for @anna', mentions: ['ANNA'], time: 3 };
  const on = { type: 'react', room: 'tea', id: 12, target: 9, emoji: '+', on: true, user: 'ANNA', name: 'Anna', time: 4 };
  const off = { type: 'react', room: 'tea', id: 13, target: 9, emoji: '+', on: false, user: 'BOB', name: 'Bob', time: 5 };
  for (const event of [edit, on, on, off, off, edit, on]) script.send(event);
  script.send({ type: 'remove', room: 'tea', id: 14, target: 10, user: 'ANNA', name: 'Anna', time: 6 });
  await until(() => room.last === 14, 'the last amendment');
  const [nine, ten] = room.messages;
  assert.deepEqual([nine.text, nine.edited, nine.mention, nine.reactions], ['NINE for @anna', 3, true, [{ emoji: '+', count: 1, users: ['ANNA'], me: true }]]);
  assert.deepEqual([ten.text, ten.removed, ten.own], ['', true, true]);
  assert.equal(client.log.filter(each => each.on === 'change').length, 4);
});

await check('a message in its present state includes the amendments that the same history lists', async () => {
  const { script, room } = await scripted();
  script.send({ type: 'history', room: 'tea', epoch: 'e'.repeat(16), last: 13, gap: false, more: false, entries: [
    { type: 'said', room: 'tea', id: 11, user: 'BOB', name: 'Bob', text: 'eleven', time: 7, reactions: [{ emoji: '+', count: 25, users: ['C'] }] },
    { type: 'react', room: 'tea', id: 12, target: 11, emoji: '+', on: true, user: 'D', name: 'D', time: 8 },
    { type: 'react', room: 'tea', id: 13, target: 9, emoji: '+', on: false, user: 'BOB', name: 'Bob', time: 9 }] });
  await until(() => room.last === 13, 'the history');
  assert.equal(room.messages[2].reactions[0].count, 25);
  assert.deepEqual(room.messages[0].reactions, []);
});

await check('unread messages and mentions are counted in rooms that are not on the screen, and read markers reset them', async () => {
  const { script, client, room } = await scripted();
  for (const [id, said, mentions] of [[11, 'one'], [12, 'for @Anna', ['ANNA']], [13, 'for the other @Anna', ['OTHER']]])
    script.send({ type: 'said', room: 'tea', id, user: 'BOB', name: 'Bob', text: said, mentions, time: id });
  await until(() => room.last === 13, 'the messages');
  assert.deepEqual(room.messages.slice(-3).map(each => each.mention), [false, true, false]);
  assert.deepEqual([room.unread, room.mentions], [3, 1]);
  script.send({ type: 'read', room: 'tea', id: 12 });
  await until(() => room.read === 12, 'the marker of another device');
  assert.deepEqual([room.unread, room.mentions], [1, 0]);
  client.visible = 'tea';
  client.markRead('tea');
  assert.equal(room.unread, 0);
  await until(() => script.lines.some(line => /\/read 13$/.test(line)), 'the marker');
});

await check('a line to another room goes through /in', async () => {
  const { script, client } = await scripted((self, rest, tag) => {
    if (rest === '/join milk') {
      self.send({ type: 'room', room: 'milk', name: 'Anna', topic: 'white', tag });
      self.send({ type: 'history', room: 'milk', epoch: 'e'.repeat(16), last: 0, gap: false, more: false, entries: [] });
    }
  });
  await client.join('milk');
  await joined(client, 'milk');
  assert.equal(client.rooms.get('milk').topic, 'white');
  client.say('tea', 'hello');
  client.say('tea', 'later');
  await until(() => script.lines.includes('/in tea hello'), 'the line');
  assert.ok(!script.lines.includes('/in tea later'), 'the second message waits for the answer to the first');
});

await check('a message that was refused as flood is sent again, before the later ones; another refusal is final', async () => {
  let floods = 2;
  const { script, client } = await scripted((self, rest, tag) => {
    if (rest === 'first' && floods-- > 0) self.send({ type: 'error', code: 'flood', text: 'Wait.', tag });
    else if (rest === 'bad') self.send({ type: 'error', code: 'refused', text: 'No.', tag });
    else self.send({ type: 'said', room: 'tea', id: 20 + self.lines.length, user: 'ANNA', name: 'Anna', text: rest, time: 5, tag });
  });
  const bad = client.say('tea', 'bad');
  for (const each of ['first', 'second']) client.say('tea', each);
  await saw(client, 'tea', 4);
  assert.deepEqual(script.lines, ['bad', 'first', 'first', 'first', 'second']);
  assert.deepEqual([client.outbox, bad.state, bad.code, bad.reason], [[bad], 'refused', 'refused', 'No.']);
  client.discard(bad);
  assert.deepEqual(client.outbox, []);
});

await check('private messages are conversations', async () => {
  const { script, client } = await scripted((self, rest, tag) => {
    if (rest.startsWith('/msg Bob ')) self.send({ type: 'private', peer: 'BOB', id: 2, from: 'ANNA', name: 'Anna', to: 'Bob', text: rest.slice(9), time: 2, tag });
  });
  script.send({ type: 'private', peer: 'BOB', id: 1, from: 'BOB', name: 'Bob', to: 'Anna', text: 'psst', time: 1 });
  await until(() => client.rooms.has('@BOB'), 'the conversation');
  client.say('@BOB', 'yes?');
  await saw(client, '@BOB', 2);
  assert.deepEqual(client.rooms.get('@BOB').messages.map(each => [each.text, each.own]), [['psst', false], ['yes?', true]]);
  assert.deepEqual([client.rooms.get('@BOB').title, client.rooms.get('@BOB').mentions], ['Bob', 1]);
});

await check('a history has the topic; an older topic on a page of older messages changes nothing', async () => {
  const { script, room } = await scripted();
  const history = { type: 'history', room: 'tea', gap: false, more: false };
  script.send({ ...history, epoch: 'e'.repeat(16), last: 11, topic: 'milk', entries: [{ type: 'topic', room: 'tea', id: 11, user: 'BOB', name: 'Bob', text: 'milk', time: 3 }] });
  await until(() => room.last === 11, 'the history');
  script.send({ ...history, before: 9, entries: [{ type: 'topic', room: 'tea', id: 3, user: 'BOB', name: 'Bob', text: 'cheese', time: 1 }] });
  await until(() => room.messages.length === 4, 'the older page');
  assert.equal(room.topic, 'milk');
});

await check('several people join and leave in one event, and names change', async () => {
  const { script, client, room } = await scripted();
  script.send({ type: 'join', room: 'tea', count: 300, users: [{ user: 'C', name: 'Cy' }, { user: 'D', name: 'Di' }], time: 1 });
  script.send({ type: 'leave', room: 'tea', count: 299, users: [{ user: 'BOB', name: 'Bob' }], time: 2 });
  script.send({ type: 'nick', room: 'tea', user: 'ANNA', old: 'Anna', name: 'Anne', time: 3 });
  await until(() => client.me.name === 'Anne', 'the new name');
  assert.deepEqual([[...room.users.values()].map(each => each.name).sort(), room.count], [['Anne', 'Cy', 'Di'], 299]);
});

await check('who was asked to leave stays away until connect()', async () => {
  const { script, client } = await scripted();
  script.send({ type: 'kicked', code: 'ban', text: 'You are banned.', seconds: 60 });
  script.socket.close(1008);
  await until(() => client.state === 'closed', 'the end');
  assert.equal(client.log.filter(each => each.on === 'state').at(-1).reason, 'You are banned.');
  client.connect();
  await until(() => client.state === 'connected', 'the new connection');
  assert.equal(script.connections, 2);
});

await check('a command resolves to its answer, and is rejected with its error or when the line is lost', async () => {
  const { script, client } = await scripted((self, rest, tag) => {
    if (rest === '/rooms') self.send({ type: 'rooms', rooms: [{ room: 'tea', users: 2 }], tag });
    if (rest.startsWith('/edit')) self.send({ type: 'error', code: 'too_late', text: 'Too late.', tag });
  });
  assert.deepEqual(await client.list(), [{ room: 'tea', users: 2 }]);
  await assert.rejects(client.edit('tea', 10, 'x'), { code: 'too_late', message: 'Too late.' });
  const lost = client.command('/silence');
  script.socket.terminate();
  await assert.rejects(lost, { code: 'offline' });
  client.close();
  await assert.rejects(client.command('/rooms'), { code: 'offline' });
});

await check('nonsense from a server breaks nothing', async () => {
  const { script, client, room } = await scripted();
  script.socket.send('not JSON');
  script.socket.send(Buffer.from([1, 2, 3]));
  for (const event of [{}, { type: 'said' }, { type: 'said', room: 'nowhere', id: 1 }, { type: 'edit', room: 'tea', target: 77 }, { type: 'history' },
                       { type: 'users', room: 'tea', users: [null, 7] }, { type: 'unheard of', room: 'tea' }, { type: 'error' }, [], null])
    script.send(event);
  script.send({ type: 'said', room: 'tea', id: 11, user: 'BOB', name: 'Bob', text: 'still here', time: 3 });
  await until(() => room.last === 11, 'the message after the nonsense');
  assert.equal(client.state, 'connected');
});

await check('the address resumes each room, and has no key', async () => {
  const { script, client } = await scripted();
  client._room('milk and sugar');
  client._room('..');
  script.socket.terminate();
  await until(() => script.connections === 2, 'the second connection');
  const url = new URL(script.address, 'ws://x');
  assert.equal(url.pathname, '/chat/tea');
  assert.equal(url.searchParams.get('last'), `${'e'.repeat(16)}-10`);
  assert.deepEqual(url.searchParams.getAll('join'), ['milk and sugar', '..']);
  assert.equal(url.searchParams.has('key'), false);
});

await check('the options of a room say who may speak; moderators may always', async () => {
  const { script, client, room } = await scripted();
  assert.deepEqual([room.private, room.readOnly, room.slow, client.can('say', 'tea')], [false, false, 0, true]);
  script.send({ type: 'options', room: 'tea', private: true, read_only: true, slow: 7 });
  await until(() => room.slow === 7, 'the options');
  assert.deepEqual([room.private, room.readOnly, client.can('say', 'tea'), client.can('edit', 'tea')], [true, true, false, false]);
  script.send({ type: 'room', room: 'tea', read_only: true, may: ['say', 'edit', 'readonly', 'slow'] });
  await until(() => client.can('say', 'tea'), 'the rights of a moderator');
  assert.deepEqual([room.private, room.readOnly, room.slow, client.can('edit', 'tea')], [false, true, 0, true]);
  script.send({ type: 'room', room: 'tea' });
  await until(() => !room.readOnly, 'the end of it');
  assert.deepEqual([client.can('say', 'tea'), client.can('readonly', 'tea')], [true, false]);
});

await check('in a slow room a message waits for its time, and delays no other room', async () => {
  let slow = 1;
  const { script, client, room } = await scripted((self, rest, tag) => {
    if (rest === '/join milk') {
      self.send({ type: 'room', room: 'milk', name: 'Anna', tag });
      self.send({ type: 'history', room: 'milk', epoch: 'e'.repeat(16), last: 0, gap: false, more: false, entries: [] });
    } else if (rest.endsWith('early') && slow-- > 0) self.send({ type: 'error', code: 'slow', text: 'Wait.', seconds: 1, tag });
    else self.send({ type: 'said', room: rest.startsWith('/in tea') ? 'tea' : 'milk', id: 20 + self.lines.length, user: 'ANNA', name: 'Anna', text: rest, time: 5, tag });
  });
  await client.join('milk');
  await joined(client, 'milk');
  script.send({ type: 'options', room: 'tea', slow: 60 });
  await until(() => room.slow === 60, 'the options');
  const early = client.say('tea', 'early');
  client.say('milk', 'at once');
  await until(() => script.lines.includes('at once'), 'the line in the other room');
  assert.deepEqual([early.state, early.code], ['waiting', '']);
  await until(() => script.lines.filter(line => line.endsWith('early')).length === 2, 'the second attempt');
  await until(() => client.outbox.length === 0, 'its answer');
  assert.ok(room.slowUntil > Date.now() + 30_000, 'the next message waits');
  const late = client.say('tea', 'late');
  client.say('milk', 'at once again');
  await until(() => script.lines.includes('at once again'), 'the second line in the other room');
  assert.equal(late.state, 'waiting');
  script.send({ type: 'options', room: 'tea' });
  await until(() => client.outbox.length === 0, 'the message, as the room is not slow any more');
});

await check('a room that lets nobody in says why, and stays until it is left', async () => {
  const { script, client } = await scripted((self, rest, tag) => {
    if (rest.startsWith('/join')) self.send({ type: 'error', code: 'room_full', text: 'That room is full.', room: rest.slice(6), tag });
  });
  const milk = client._room('milk');
  script.send({ type: 'error', code: 'not_invited', text: 'That room is private.', room: 'Milk' });
  await until(() => milk.refused, 'the refusal');
  assert.deepEqual([milk.refused.code, milk.refused.message, milk.joined], ['not_invited', 'That room is private.', false]);
  await assert.rejects(client.join('milk'), { code: 'room_full' });
  assert.deepEqual([client.rooms.get('milk').refused.code, client.log.filter(each => each.on === 'error').length], ['room_full', 0]);
  await assert.rejects(client.join('cake'), { code: 'room_full' });
  assert.equal(client.rooms.has('cake'), false);
  assert.equal(client.rooms.get('tea').joined, true);
  script.send({ type: 'error', code: 'room_full', text: 'That room is full.', room: 'tea' });
  script.send({ type: 'room', room: null, name: 'Anna' });
  await until(() => client.rooms.get('tea').refused, 'the refusal of a room that was entered');
  assert.deepEqual([client.rooms.get('tea').joined, client.rooms.get('tea').refused.code], [false, 'room_full']);
});

await check('an invitation is an event, unless the user is in the room', async () => {
  const { script, client } = await scripted();
  const invitations = [];
  client.addEventListener('invited', ({ detail }) => invitations.push(detail));
  for (const [room, user] of [['tea', 'ANNA'], ['milk', 'BOB'], ['milk', 'ANNA']]) script.send({ type: 'invited', room, user, by: 'Bob' });
  await until(() => invitations.length > 0, 'the invitation');
  assert.deepEqual(invitations, [{ room: 'milk', by: 'Bob' }]);
});

await check('conversations without anything new are there, and their messages come on request', async () => {
  const { script, client } = await scripted((self, rest, tag) => {
    const entry = { type: 'private', peer: 'BOB', id: 4, user: 'BOB', name: 'Bob', to: 'Anna', text: 'earlier', time: 1 };
    if (rest === '/before @BOB 999999999999999999 50') self.send({ type: 'history', peer: 'BOB', before: 10 ** 18, gap: false, more: false, entries: [entry], tag });
  });
  script.send({ type: 'peers', peers: [null, { user: 'BOB', name: 'Bob', read: 4 }] });
  await until(() => client.rooms.has('@BOB'), 'the conversation');
  const room = client.rooms.get('@BOB');
  assert.deepEqual([room.title, room.unread, room.more, room.messages.length], ['Bob', 0, true, 0]);
  assert.equal(await client.before('@BOB', 50), 1);
  assert.deepEqual([room.messages[0].text, room.more, room.unread], ['earlier', false, 0]);
});

await check('the reference names each call, each property and each event', () => {
  const reference = readFileSync(join(HERE, '../../examples/README.md'), 'utf8').split('### Reference of wschat.js')[1];
  const isPublic = name => !name.startsWith('_') && !['constructor', 'forget', 'insert', 'setOptions', 'readKnown', 'unsent'].includes(name);
  const names = [ChatClient.prototype, new ChatClient({ storage: null }), ChatRoomState.prototype, new ChatRoomState('tea')]
    .flatMap(each => Object.getOwnPropertyNames(each)).filter(isPublic);
  const source = readFileSync(join(HERE, '../../examples/wschat.js'), 'utf8');
  names.push(...[...source.matchAll(/_tell\('(\w+)'/g)].map(([, name]) => name));
  assert.ok(names.length > 50, 'the names were found');
  assert.deepEqual([...new Set(names)].filter(name => !new RegExp(`\`${name}\\b`).test(reference)), []);
});

await check('a mention is a whole name, in any case', () => {
  assert.ok(mentions('hi @anna!', 'Anna') && mentions('@Anna', 'Anna') && mentions('(@ANNA)', 'Anna'));
  assert.ok(!mentions('@annabel', 'Anna') && !mentions('x@anna', 'Anna') && !mentions('anna', 'Anna') && !mentions('@', ''));
});

await check('the JSDoc types of the module are right, and find mistakes of an application', () => {
  const typescript = load('typescript');
  const { ModuleKind, ModuleResolutionKind, ScriptTarget } = typescript;
  const program = typescript.createProgram([join(HERE, '../../examples/wschat.js'), join(HERE, 'wschat_js_types.ts')], {
    allowJs: true, checkJs: true, strict: true, noImplicitAny: false, noEmit: true, types: [], target: ScriptTarget.ES2022,
    module: ModuleKind.ESNext, moduleResolution: ModuleResolutionKind.Bundler, lib: ['lib.es2022.d.ts', 'lib.dom.d.ts'] });
  const found = typescript.getPreEmitDiagnostics(program).map(({ file, start, messageText }) => {
    const line = file ? file.getLineAndCharacterOfPosition(start).line + 1 : 0;
    return `${file?.fileName ?? ''}:${line}: ${typescript.flattenDiagnosticMessageText(messageText, ' ')}`;
  });
  assert.deepEqual(found, []);
});

console.log(`${results.passed} passed, ${results.failed} failed`);
process.exit(results.failed ? 1 : 0);
