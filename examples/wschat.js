// A client of the chat in wschat.hpp: one ES module that loads nothing else, for browsers and for Node.
//
//   import { ChatClient } from './wschat.js';
//   const chat = new ChatClient({ url: 'ws://127.0.0.1:8888/chat', rooms: ['tea'], name: 'Anna' });
//   chat.addEventListener('message', ({ detail }) => console.log(detail.message.name, detail.message.text));
//   chat.connect();
//   chat.say('tea', 'Hello');
//
// It reconnects, gets what it missed, sends what was written offline, and keeps messages and users of each room.
// examples/README.md is the reference. The chat's protocol is there as well: version 3.

const FIRST_DELAY = 500;          // ms before the second attempt to connect, like the next times; the first is at once
const LONGEST_DELAY = 30000;
const CONNECT_DEADLINE = 10000;
const STABLE_AFTER = 5000;        // a connection of this age resets the delays
const ANSWER_DEADLINE = 15000;    // the server answers each line with a tag; the option `deadline`
const SILENCE = 45000;            // after this silence, the client asks whether the server is alive
const TYPING_EVERY = 3000;
const MOST_MESSAGES = 10000;      // of a room in memory; older ones can be loaded again
const MODERATION = ['kick', 'ban', 'mute', 'slow', 'invite', 'remove', 'topic'];
const RESTRICTED = ['react', 'edit'];
const SENDS = 6;                  // how often a message is sent before it counts as refused

/**
 * @typedef {{ emoji: string, count: number, users: string[], me: boolean }} Reaction
 * @typedef {{ id: number, kind: 'said' | 'topic', user: string, name: string, text: string, time: number, own: boolean, me: boolean,
 *   mention: boolean, data: object | null, edited: number, removed: boolean, reactions: Reaction[], asOf: number }} ChatMessage
 *   id: 0 if the server does not keep it; user: the public id of the author; name: '' if the chat itself speaks; time: Unix time in
 *   ms; edited: when, or 0; asOf: amendments with this id, and older ones, are included
 * @typedef {{ user: string, name: string, about?: any }} Person
 * @typedef {{ tag: string, room: string, text: string, line: string, state: 'waiting' | 'sent' | 'refused', code: string,
 *   reason: string, sends: number, time: number }} Outgoing  a message in the outbox; code and reason: of the error that refused it
 *
 * @typedef {object} ClientOptions
 * @property {string} [url]  of the lobby, without a query; default: "chat" beside the page
 * @property {string[]} [rooms]  to enter; default: the room that the server selects
 * @property {string} [name]
 * @property {string} [key]  the secret of the user, 8 to 128 characters; default: from the storage, or a random one
 * @property {{ getItem(name: string): string | null, setItem(name: string, value: string): void } | null} [storage]
 *   where the key is kept; default: localStorage; null: nowhere
 * @property {any} [WebSocket]  a class with the interface of browsers; default: the global one
 * @property {number} [deadline]  ms that the server has for an answer
 * @property {() => number} [random]  for tests; default: Math.random
 */

/** An event of ChatClient. `detail` depends on the type. */
export class ChatClientEvent extends Event {
  /** @param {string} type @param {any} detail */
  constructor(type, detail) {
    super(type);
    this.detail = detail;
  }
}

/** What a promise of ChatClient is rejected with. `code` is one of the protocol, or "offline", "timeout", "closed". */
export class ChatError extends Error {
  /** @param {string} code @param {string} text */
  constructor(code, text) {
    super(text || code);
    this.code = code;
  }
}

/** A room, or a private conversation: its name is then "@" and `peer`. The client changes it; read it only. */
export class ChatRoomState {
  /** @param {string} name @param {string} title */
  constructor(name, title = name) {
    this.name = name;
    this.title = title;
    this.peer = name.startsWith('@') ? name.slice(1) : '';
    this.topic = '';
    /** @type {ChatMessage[]} in the order of their ids */
    this.messages = [];
    /** @type {Map<number, ChatMessage>} */
    this.byId = new Map();
    /** @type {Map<string, Person>} by user id, or by name where there is none */
    this.users = new Map();
    this.count = 0;
    this.joined = false;
    this.more = false;                // the server has older messages
    this.unread = 0;
    this.mentions = 0;
    this.read = 0;                    // the id of the newest message that was read
    this.slow = 0;                    // seconds between two messages of a user
    /** @type {Set<string> | null} what this user may do here; null: the server did not say */
    this.may = null;
    this.epoch = '';
    this.last = 0;
  }
  /** Where a later connection resumes, or ''. */
  get position() { return this.epoch ? `${this.epoch}-${this.last}` : ''; }
  forget() {
    this.messages = [];
    this.byId.clear();
    this.epoch = '';
    this.last = this.read = this.unread = this.mentions = 0;
    this.more = false;
  }
}

export function randomToken() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, '0')).join('');
}

/** The size in bytes, in which the limits of the server are. @param {string} text */
export function byteLength(text) { return new TextEncoder().encode(text).length; }

/** Whether "@name" stands in the text. @param {string} text @param {string} name */
export function mentions(text, name) {
  if (!name) return false;
  const folded = text.toLocaleLowerCase(), wanted = '@' + name.toLocaleLowerCase();
  for (let at = folded.indexOf(wanted); at >= 0; at = folded.indexOf(wanted, at + 1)) {
    const before = folded.slice(0, at), after = folded.slice(at + wanted.length);
    if (!/[\p{L}\p{N}_]$/u.test(before) && !/^[\p{L}\p{N}_]/u.test(after)) return true;
  }
  return false;
}

/** @param {any} value @returns {Person} */
function personOf(value) {
  if (typeof value === 'string') return { user: '', name: value };
  return { ...value, user: String(value?.user ?? ''), name: String(value?.name ?? '') };
}
/** @param {Person} person */
const keyOf = person => person.user || person.name;

/** A chat. See examples/README.md for its events. */
export class ChatClient extends EventTarget {
  /** @param {ClientOptions} [options] */
  constructor(options = {}) {
    super();
    this.options = options;
    this.WebSocket = options.WebSocket ?? globalThis.WebSocket;
    this.random = options.random ?? Math.random;
    this._deadline = options.deadline ?? ANSWER_DEADLINE;
    /** @type {Map<string, ChatRoomState>} rooms and conversations, in the order of entering */
    this.rooms = new Map();
    /** @type {Outgoing[]} in the order of writing */
    this.outbox = [];
    this.state = 'closed';            // closed, connecting, connected, waiting
    this.reason = '';                 // why it is closed
    this.retryAt = 0;
    this.me = { name: options.name ?? '', user: '' };
    this.version = 0;
    /** @type {Set<string>} */
    this.features = new Set();
    /** @type {Record<string, number>} */
    this.limits = {};
    /** @type {Set<string> | null} */
    this.may = null;
    this.visible = '';                // the room on the screen: its messages are read
    this._key = this._findKey();
    for (const name of options.rooms ?? []) this._room(name);
    /** @type {any} */
    this._socket = null;
    this._ready = false;
    this._at = '';                    // the room in which the server understands lines
    this._failures = this._heard = this._tokens = this._filled = this._typed = this._pausedUntil = this._floods = 0;
    /** @type {Record<string, any>} */
    this._timers = {};
    /** @type {Map<string, { resolve: (event: any) => void, reject: (error: ChatError) => void, timer: any, room: string }>} */
    this._asked = new Map();
    this._listeners = new AbortController();
    /** @type {any} */
    this._watched = null;
  }

  // ---- connecting --------------------------------------------------------------------------------------------------

  /** Connects, and again whenever the connection ends, until close(). */
  connect() {
    if (this._listeners.signal.aborted) this._listeners = new AbortController();
    this._watchPage();
    this._failures = 0;
    this.reason = '';
    this._connect();
  }

  /** Leaves the chat. Messages of the outbox stay in it. */
  close() {
    this._listeners.abort();
    this._drop(1000);
    this._setState('closed');
  }

  /** Whether the server knows a command, and this user may use it. @param {string} action @param {string} [room] */
  can(action, room) {
    const may = (room && this.rooms.get(room)?.may) || this.may;
    if (MODERATION.includes(action)) return may?.has(action) === true;
    return this.features.has(action) && (!may || !RESTRICTED.includes(action) || may.has(action));
  }

  // ---- speaking ----------------------------------------------------------------------------------------------------

  /**
   * Says a text. Without a connection it waits in the outbox. The order is kept, and it arrives once.
   * @param {string} room @param {string} text @param {{ data?: object, me?: boolean }} [more] @returns {Outgoing}
   */
  say(room, text, more = {}) {
    const state = this.rooms.get(room);
    const plain = more.data ? `/data ${JSON.stringify(more.data)} ${text}` : more.me ? `/me ${text}` : text.startsWith('/') ? '/' + text : text;
    const line = state?.peer ? '' : plain;         // for a conversation it is made when it is sent
    /** @type {Outgoing} */
    const entry = { tag: randomToken(), room, text, line, state: 'waiting', code: '', reason: '', sends: 0, time: Date.now() };
    this.outbox.push(entry);
    this._typed = 0;
    this._tell('outbox', { entry });
    this._flush();
    return entry;
  }

  /** Sends a refused message again. @param {Outgoing} entry */
  retry(entry) {
    Object.assign(entry, { state: 'waiting', sends: 0, code: '', reason: '' });
    this._tell('outbox', { entry });
    this._flush();
  }

  /** Forgets a message of the outbox. @param {Outgoing} entry */
  discard(entry) {
    this.outbox = this.outbox.filter(each => each !== entry);
    this._tell('outbox', { entry, done: true });
    this._flush();
  }

  /**
   * Sends any line, such as "/rooms", and resolves to the event that answers it.
   * @param {string} line @param {string} [room] @returns {Promise<any>}
   */
  command(line, room) {
    if (!this._ready) return Promise.reject(new ChatError('offline', 'There is no connection.'));
    const tag = randomToken();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => this._answer(tag, null, new ChatError('timeout', 'The server did not answer.')), this._deadline);
      this._asked.set(tag, { resolve, reject, timer, room: room ?? '' });
      this._write(line, room, tag);
    });
  }

  /** @param {string} room @param {number} id @param {string} text */
  edit(room, id, text) { return this.command(`/edit ${id} ${text}`, room); }
  /** @param {string} room @param {number} id */
  remove(room, id) { return this.command(`/delete ${id}`, room); }
  /** Reacts, or takes the reaction back. @param {string} room @param {number} id @param {string} emoji */
  react(room, id, emoji) { return this.command(`/react ${id} ${emoji}`, room); }
  /** @param {string} room @param {string} text */
  topic(room, text) { return this.command(`/topic ${text}`, room); }
  /** @param {string} name */
  nick(name) {
    this.me.name = name;
    return this._ready ? this.command(`/nick ${name}`) : Promise.resolve(null);
  }

  /** Loads older messages into the room. Resolves to how many came. @param {string} room @param {number} [limit] */
  async before(room, limit = 100) {
    const state = this.rooms.get(room);
    const first = state?.messages.find(each => each.id > 0);
    if (!state || !first || !state.more) return 0;
    const count = state.messages.length;
    await this.command(`/before ${first.id} ${limit}`, room);
    return state.messages.length - count;
  }

  /** The user has seen everything in the room. @param {string} room */
  markRead(room) {
    const state = this.rooms.get(room);
    if (!state) return;
    const changed = state.unread > 0 || state.read < state.last;
    state.unread = state.mentions = 0;
    if (state.read < state.last && this.features.has('read') && this._ready) this._soon('read ' + room, 1000, () => this._write(state.peer ? `/read @${state.peer} ${state.last}` : `/read ${state.last}`, room));
    state.read = Math.max(state.read, state.last);
    if (changed) this._tell('room', { room: state });
  }

  /** Tells the others that this user writes; call it for each change of the input. @param {string} room @param {boolean} [stop] */
  typing(room, stop = false) {
    if (!this._ready || this.rooms.get(room)?.peer || !this.rooms.get(room)?.joined) return;
    if (stop ? this._typed === 0 : Date.now() - this._typed < TYPING_EVERY) return;
    this._typed = stop ? 0 : Date.now();
    this._write(stop ? '/typing stop' : '/typing', room);
  }

  // ---- rooms -------------------------------------------------------------------------------------------------------

  /** Enters a room, now and after each reconnection. @param {string} name */
  async join(name) {
    const known = this.rooms.get(name);
    if (known?.joined || known?.peer) return known;
    const state = this._room(name);
    if (!this._ready) return state;
    try {
      const { room } = await this.command(`/join ${name}`);
      return this.rooms.get(room) ?? state;
    } catch (error) {
      if (error instanceof ChatError && !['offline', 'timeout', 'closed'].includes(error.code)) this._forgetRoom(name);
      throw error;
    }
  }

  /** Leaves a room, or closes a conversation. @param {string} name */
  async leave(name) {
    const state = this.rooms.get(name);
    this._forgetRoom(name);
    if (state?.joined && this._ready) await this.command(`/leave ${name}`);
  }

  /** Opens the conversation with a user. @param {Person} person */
  converse(person) {
    const state = this._room('@' + keyOf(person), person.name);
    state.joined = true;
    this._tell('room', { room: state });
    return state;
  }

  /** The rooms of the server. @returns {Promise<{ room: string, users: number, topic?: string }[]>} */
  async list() { return (await this.command('/rooms')).rooms ?? []; }

  // ---- the connection, inside --------------------------------------------------------------------------------------

  _findKey() {
    const { storage = globalThis.localStorage, key } = this.options;
    if (key) return key;
    try {
      const made = storage?.getItem('wschat.key') || randomToken();
      storage?.setItem('wschat.key', made);
      return made;
    } catch { return randomToken(); }              // a browser may forbid storage
  }
  _watchPage() {
    const { signal } = this._listeners;
    const retry = () => { if (this.state === 'waiting') { this._failures = 0; this._connect(); } };
    const target = /** @type {any} */ (globalThis);
    if (this._watched === signal || typeof target.addEventListener !== 'function') return;
    this._watched = signal;
    target.addEventListener('online', retry, { signal });
    target.addEventListener('offline', () => this._lost(), { signal });
    target.addEventListener('pageshow', (/** @type {any} */ event) => { if (event.persisted && this.state !== 'closed') this._connect(); }, { signal });
    target.document?.addEventListener('visibilitychange', () => {
      if (target.document.hidden) return;
      if (this.state === 'waiting') retry();
      else if (this._ready && Date.now() - this._heard > SILENCE / 2) this._probe();
    }, { signal });
  }
  _address() {
    const page = /** @type {any} */ (globalThis).document?.baseURI;
    const url = new URL(this.options.url ?? 'chat', page);
    url.protocol = url.protocol.replace('http', 'ws');
    const wanted = [...this.rooms.values()].filter(each => !each.peer);
    if (/^\.\.?$/.test(wanted[0]?.name)) wanted.unshift(new ChatRoomState('lobby'));   // a path cannot end in ".."
    const [first, ...rest] = wanted;
    if (first) url.pathname = url.pathname.replace(/\/$/, '') + '/' + encodeURIComponent(first.name);
    if (this.me.name) url.searchParams.set('name', this.me.name);
    if (first?.position) url.searchParams.set('last', first.position);
    for (const each of rest) url.searchParams.append('join', each.position ? `${each.name} ${each.position}` : each.name);
    for (const each of this.rooms.values()) if (each.peer && each.position) url.searchParams.append('peer', `${each.peer} ${each.position}`);
    return url.href;
  }
  _connect() {
    this._drop();
    this._setState('connecting');
    const key = btoa(String.fromCharCode(...new TextEncoder().encode(this._key))).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');
    const socket = new this.WebSocket(this._address(), ['wschat', 'wschat.key.' + key]);
    this._socket = socket;
    const ours = (/** @type {(event: any) => void} */ action) => (/** @type {any} */ event) => { if (this._socket === socket) action(event); };
    socket.onmessage = ours(event => this._received(event.data));
    socket.onerror = () => {};                     // a close follows
    socket.onclose = ours(event => this._lost(event));
    this._soon('connect', CONNECT_DEADLINE, () => this._lost());
  }
  // Ends the connection, without an event.
  _drop(code) {
    const socket = this._socket;
    this._socket = null;
    this._ready = false;
    this._at = '';
    for (const name of Object.keys(this._timers)) clearTimeout(this._timers[name]);
    this._timers = {};
    for (const state of this.rooms.values()) if (!state.peer) state.joined = false;
    for (const entry of this.outbox) if (entry.state === 'sent') entry.state = 'waiting';
    for (const tag of [...this._asked.keys()]) this._answer(tag, null, new ChatError('offline', 'The connection was lost.'));
    try { socket?.close(...(code ? [code] : [])); } catch { /* it was not open yet */ }
  }
  _lost(/** @type {{ reason?: string }} */ event = {}) {
    if (this.state === 'closed' || !this._socket && this.state === 'waiting') return;
    this._drop();
    if (this.reason) return this._setState('closed');       // the user was asked to leave
    // The delay doubles, and is random, so the clients of a restarted server do not all connect at once.
    const longest = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** Math.min(this._failures, 10));
    const delay = longest * (this._failures === 0 ? this.random() : 0.5 + this.random() / 2);
    this._failures += 1;
    this.retryAt = Date.now() + delay;
    this._setState('waiting', event.reason);
    this._soon('retry', delay, () => this._connect());
  }
  _setState(state, reason) {
    this.state = state;
    this._tell('state', { state, retryAt: this.retryAt, reason: reason || this.reason });
  }
  _soon(name, ms, action) {
    clearTimeout(this._timers[name]);
    this._timers[name] = setTimeout(action, ms);
  }
  // Asks something small whose answer also shows whether anything was missed.
  _probe() {
    const state = [...this.rooms.values()].find(each => each.joined && each.position);
    this._write(state ? `/since ${state.position}` : '/rooms', state?.name);
    const asked = Date.now();
    this._soon('dead', CONNECT_DEADLINE, () => { if (this._heard < asked) this._lost(); });
  }
  _write(line, room, tag) {
    const spoken = room && !this.rooms.get(room)?.peer && room !== this._at ? `/in ${encodeURIComponent(room)} ${line}` : line;
    this._tokens -= 1;
    this._socket.send(tag ? `/tag ${tag} ${spoken}` : spoken);
  }

  // ---- the outbox, inside ------------------------------------------------------------------------------------------

  // One message is on its way at a time. So the order is kept even if the server refuses one for a while.
  _flush() {
    if (!this._ready || this._socket?.readyState !== 1 || this.outbox.some(each => each.state === 'sent')) return;
    const entry = this.outbox.find(each => each.state === 'waiting' && this._canSpeak(each.room));
    if (!entry) return;
    const wait = Math.max(this._pausedUntil - Date.now(), this._untilToken());
    if (wait > 0) return this._soon('flush', wait, () => this._flush());
    entry.state = 'sent';
    entry.sends += 1;
    this._speak(entry);
    this._tell('outbox', { entry });
    const sentAt = Date.now();
    this._soon('answer', this._deadline, () => {
      if (entry.state !== 'sent') return;
      if (this._heard < sentAt) return this._lost();         // the connection is dead
      this._again(entry, 'timeout', 'The server did not answer.');
    });
  }
  // A private message goes through a room in which the other one is; else to the user's id, where the server keeps it.
  _speak(entry) {
    const peer = this.rooms.get(entry.room)?.peer;
    if (!peer) return this._write(entry.line, entry.room, entry.tag);
    const room = [...this.rooms.values()].find(each => each.joined && each.users.has(peer));
    this._write(`/msg ${room?.users.get(peer)?.name ?? '@' + peer} ${entry.text}`, room?.name, entry.tag);
  }
  _canSpeak(room) { return this.rooms.get(room)?.joined === true || this.rooms.get(room)?.peer !== undefined && room.startsWith('@'); }
  // How long the pace that the server allows demands to wait, in ms.
  _untilToken() {
    const rate = (this.limits.per_second || 5) * 0.8, burst = Math.max(1, (this.limits.burst || 20) * 0.8), now = Date.now();
    this._tokens = Math.min(burst, this._tokens + (now - this._filled) / 1000 * rate);
    this._filled = now;
    return this._tokens >= 1 ? 0 : (1 - this._tokens) / rate * 1000;
  }
  _again(entry, code, reason) {
    if (entry.sends >= SENDS) return this._refuse(entry, code, reason);
    entry.state = 'waiting';
    this._tell('outbox', { entry });
    this._flush();
  }
  _refuse(entry, code, reason) {
    Object.assign(entry, { state: 'refused', code, reason });
    this._tell('outbox', { entry });
    this._flush();
  }
  _confirm(tag) {
    const entry = tag === undefined ? undefined : this.outbox.find(each => each.tag === tag);
    if (!entry) return undefined;
    this._floods = 0;
    this.outbox = this.outbox.filter(each => each !== entry);
    this._tell('outbox', { entry, done: true });
    this._flush();
    return entry;
  }
  _answer(tag, event, error) {
    const asked = this._asked.get(tag);
    if (!asked) return false;
    this._asked.delete(tag);
    clearTimeout(asked.timer);
    if (error) asked.reject(error);
    else asked.resolve(event);
    return true;
  }

  // ---- events of the server, inside --------------------------------------------------------------------------------

  _tell(type, detail) { this.dispatchEvent(new ChatClientEvent(type, detail)); }
  _received(data) {
    let event;
    try { event = JSON.parse(data); } catch { return; }
    if (typeof event?.type !== 'string') return;
    this._heard = Date.now();
    if (this._ready) this._soon('silence', SILENCE, () => this._probe());
    const handler = HANDLERS[event.type];
    if (handler) handler.call(this, event);
    else this._tell('event', event);
    if (event.type !== 'error' && event.tag !== undefined) this._answer(event.tag, event);
  }
  _room(name, title) {
    let state = this.rooms.get(name);
    if (!state) {
      state = new ChatRoomState(name, title);
      this.rooms.set(name, state);
    }
    return state;
  }
  _forgetRoom(name) {
    const state = this.rooms.get(name);
    if (!state) return;
    this.rooms.delete(name);
    this.outbox = this.outbox.filter(each => each.room !== name || each.state === 'refused');
    this._tell('left', { room: state });
  }
  // The server decides how a room is written.
  _rename(asked, name) {
    const state = this.rooms.get(asked);
    if (!state || asked === name || this.rooms.has(name)) return;
    this.rooms.delete(asked);
    state.name = state.title = name;
    this.rooms.set(name, state);
    for (const entry of this.outbox) if (entry.room === asked) entry.room = name;
  }
  // The room or conversation of an event.
  _stateOf(event) { return this.rooms.get(event.peer !== undefined ? '@' + event.peer : String(event.room ?? '')); }
  _messageOf(event, asOf) {
    const text = String(event.text ?? ''), user = String(event.user ?? ''), name = String(event.from ?? event.name ?? '');
    const known = user !== '' && this.me.user !== '';
    const own = event.tag !== undefined || (known ? user === this.me.user : name !== '' && name === this.me.name);
    const reactions = (event.reactions ?? []).map((/** @type {any} */ each) => ({ emoji: String(each.emoji), count: Number(each.count) || 0,
      users: [...(each.users ?? [])], me: each.me === true || (each.users ?? []).includes(this.me.user || '?') }));
    return { id: Number(event.id) || 0, kind: event.type === 'topic' ? 'topic' : 'said', user, name, text, own, time: Number(event.time) || Date.now(),
      me: event.me === true, mention: !own && mentions(text, this.me.name), data: event.data ?? null, edited: Number(event.edited) || 0,
      removed: event.removed === true, reactions, asOf };
  }
  // Each message has its place by its id, once.
  _insert(state, message) {
    if (message.id !== 0 && state.byId.has(message.id)) return null;
    if (message.id !== 0) state.byId.set(message.id, message);
    let at = state.messages.length;
    if (message.id !== 0) while (at > 0 && state.messages[at - 1].id > message.id) at -= 1;
    state.messages.splice(at, 0, message);
    return message;
  }
  _count(state, message) {
    const seen = this.visible === state.name && !(/** @type {any} */ (globalThis).document?.hidden);
    if (message.own || message.kind !== 'said' || message.removed) return;
    if (seen) return this.markRead(state.name);
    if (message.id !== 0 && message.id <= state.read) return;
    state.unread += 1;
    if (message.mention || state.peer) state.mentions += 1;
  }
  // An amendment may come twice, and the present state of a message may include it.
  _amend(state, event) {
    const message = state.byId.get(Number(event.target));
    const id = Number(event.id) || 0;
    if (!message || id !== 0 && id <= message.asOf) return;
    message.asOf = Math.max(message.asOf, id);
    if (event.type === 'edit') {
      Object.assign(message, { text: String(event.text ?? ''), edited: Number(event.time) || Date.now(), data: event.data ?? message.data });
      message.mention = !message.own && mentions(message.text, this.me.name);
    } else if (event.type === 'remove') Object.assign(message, { text: '', removed: true, data: null, reactions: [], mention: false });
    else this._applyReaction(message, event);
    this._tell('change', { room: state, message });
  }
  _applyReaction(message, event) {
    const emoji = String(event.emoji), user = String(event.user || event.name);
    const mine = event.user ? event.user === this.me.user : event.name === this.me.name;
    let reaction = message.reactions.find(each => each.emoji === emoji);
    if (!reaction) message.reactions.push(reaction = { emoji, count: 0, users: [], me: false });
    const listed = reaction.users.includes(user);
    if (event.on && !listed) {
      reaction.count += 1;
      if (reaction.users.length < 20) reaction.users.push(user);
    } else if (!event.on && (listed || reaction.count > reaction.users.length)) {
      reaction.count -= 1;
      reaction.users = reaction.users.filter(each => each !== user);
    }
    if (mine) reaction.me = event.on === true;
    message.reactions = message.reactions.filter(each => each.count > 0);
  }
  // A live event of the log of a room: a message, a topic or an amendment.
  _logged(event) {
    const confirmed = this._confirm(event.tag);
    const state = this._stateOf(event);
    if (!state) return;
    const id = Number(event.id) || 0;
    if (event.type === 'said' || event.type === 'topic') {
      const message = this._messageOf(event, id);
      message.own ||= confirmed !== undefined;
      if (event.type === 'topic') state.topic = message.text;
      if (this._insert(state, message)) {
        state.last = Math.max(state.last, id);
        this._trim(state);
        this._count(state, message);
        this._tell('message', { room: state, message, live: true });
      }
    } else this._amend(state, event);
    state.last = Math.max(state.last, id);
  }
  // The end of a room that nobody reads upwards keeps MOST_MESSAGES.
  _trim(state) {
    if (state.messages.length <= MOST_MESSAGES + 500) return;
    for (const old of state.messages.splice(0, 500)) state.byId.delete(old.id);
    state.more = true;
  }
}

/** @type {Record<string, (this: ChatClient, event: any) => void>} */
const HANDLERS = {
  hello(event) {
    clearTimeout(this._timers.connect);
    this.version = Number(event.version) || 0;
    this.features = new Set(event.features ?? []);
    this.limits = event.limits ?? {};
    this.may = Array.isArray(event.may) ? new Set(event.may) : null;
    this.me = { name: String(event.name ?? this.me.name), user: String(event.user ?? '') };
    const asked = [...this.rooms.values()].find(each => !each.peer)?.name;
    this._at = String(event.room ?? '');
    if (this._at && asked && asked.toLowerCase() === this._at.toLowerCase()) this._rename(asked, this._at);
    if (this._at) this._room(this._at);
    this._ready = true;
    this._filled = Date.now();
    this._tokens = (this.limits.burst || 20) * 0.8;
    this._soon('stable', STABLE_AFTER, () => { this._failures = 0; });
    this._soon('silence', SILENCE, () => this._probe());
    this._tell('hello', event);
    this._setState('connected');
    this._flush();
  },
  room(event) {
    this._at = String(event.room ?? '');
    if (event.name) this.me.name = String(event.name);
    const asked = event.tag !== undefined && [...this.rooms.keys()].find(each => each.toLowerCase() === this._at.toLowerCase());
    if (asked) this._rename(asked, this._at);
    const state = this._stateOf(event);
    if (!state) return;
    if (event.topic !== undefined) state.topic = String(event.topic);
    if (event.read !== undefined) state.read = Math.max(state.read, Number(event.read));
    if (event.unread !== undefined && this.visible !== state.name) state.unread = Number(event.unread);
    if (Array.isArray(event.may)) state.may = new Set(event.may);
    state.slow = Number(event.slow) || 0;
    this._tell('room', { room: state });
  },
  users(event) {
    const state = this._stateOf(event);
    if (!state) return;
    const people = /** @type {Person[]} */ ((event.users ?? []).map(personOf));
    state.users = new Map(people.map(each => [keyOf(each), each]));
    state.count = Number(event.count ?? people.length);
    this._tell('users', { room: state, listed: event.users !== undefined });
  },
  join(event) {
    const state = this._stateOf(event);
    if (!state) return;
    const people = /** @type {Person[]} */ ((event.users ?? [event]).map(personOf));
    for (const each of people) state.users.set(keyOf(each), { user: each.user, name: each.name, about: each.about });
    state.count = Number(event.count ?? state.users.size);
    this._tell('join', { room: state, people, time: Number(event.time) });
  },
  leave(event) {
    const state = this._stateOf(event);
    if (!state) return;
    const people = /** @type {Person[]} */ ((event.users ?? [event]).map(personOf));
    for (const each of people) state.users.delete(keyOf(each));
    state.count = Number(event.count ?? state.users.size);
    this._tell('leave', { room: state, people, time: Number(event.time) });
  },
  nick(event) {
    const mine = event.user ? event.user === this.me.user : event.old === this.me.name;
    if (mine) this.me.name = String(event.name);
    const state = this._stateOf(event);
    if (!state) return;
    const key = String(event.user || event.old), person = state.users.get(key);
    if (state.users.delete(key)) state.users.set(String(event.user || event.name), { ...person, user: String(event.user ?? ''), name: String(event.name) });
    this._tell('nick', { room: state, old: String(event.old), name: String(event.name), mine, time: Number(event.time) });
  },
  said(event) { this._logged(event); },
  topic(event) { this._logged(event); },
  edit(event) { this._logged(event); },
  remove(event) { this._logged(event); },
  react(event) { this._logged(event); },
  history(event) {
    const state = event.peer !== undefined ? this._room('@' + event.peer, event.name) : this._stateOf(event);
    if (!state) return;
    const older = event.before !== undefined, entries = Array.isArray(event.entries) ? event.entries : [];
    if (event.gap && !older) state.forget();
    const asOf = older ? state.last : Number(event.last) || 0;
    const messages = [];
    for (const each of entries) {
      this._confirm(each.tag);
      if (each.type === 'said' || each.type === 'topic') {
        const message = this._insert(state, this._messageOf(each, Math.max(asOf, Number(each.id) || 0)));
        if (message && each.type === 'topic' && !older) state.topic = message.text;
        if (message) messages.push(message);
      } else this._amend(state, each);
    }
    const resumed = state.position !== '' && !older;
    if (!older) {
      if (event.epoch) state.epoch = String(event.epoch);
      state.last = Math.max(state.last, Number(event.last) || 0);
      state.joined = true;
    }
    if (older || !resumed) state.more = event.more === true;
    if (resumed) for (const each of messages) this._count(state, each);
    else if (!older && state.read === 0) state.read = this.features.has('read') ? 0 : state.last;
    this._tell('history', { room: state, messages, gap: event.gap === true, older });
    this._flush();
  },
  private(event) {
    const author = String(event.from ?? event.user ?? event.name), own = event.tag !== undefined || author === (this.me.user || this.me.name);
    const named = own ? [...this.rooms.values()].flatMap(each => [...each.users.values()]).find(each => each.name === event.to) : undefined;
    const peer = String(event.peer ?? (own ? keyOf(named ?? { user: '', name: String(event.to) }) : author));
    this._confirm(event.tag);
    const state = this._room('@' + peer, String(own ? event.to ?? peer : event.name ?? peer));
    state.joined = true;
    const message = this._messageOf({ ...event, user: author, from: undefined }, Number(event.id) || 0);
    message.own = own;
    if (!this._insert(state, message)) return;
    state.last = Math.max(state.last, message.id);
    this._count(state, message);
    this._tell('message', { room: state, message, live: true });
  },
  read(event) {
    const state = this._stateOf(event);
    if (!state || Number(event.id) <= state.read) return;
    state.read = Number(event.id);
    const rest = state.messages.filter(each => each.id > state.read && !each.own && each.kind === 'said' && !each.removed);
    state.unread = rest.length;
    state.mentions = rest.filter(each => each.mention || state.peer).length;
    this._tell('room', { room: state });
  },
  typing(event) {
    const state = this._stateOf(event);
    const mine = event.user ? event.user === this.me.user : event.name === this.me.name;
    if (state && !mine) this._tell('typing', { room: state, name: String(event.name), stop: event.stop === true });
  },
  rooms(event) { this._tell('rooms', event); },
  help(event) { this._tell('help', event); },
  search(event) { this._tell('search', event); },
  moderation(event) { this._tell('moderation', event); },
  ack(event) { this._confirm(event.tag); },
  kicked(event) {
    this.reason = String(event.text || 'You were asked to leave.');
    this._tell('kicked', { text: this.reason, code: String(event.code ?? 'kick'), seconds: event.seconds });
  },
  error(event) {
    const code = String(event.code ?? ''), text = String(event.text ?? code);
    const flood = code === 'flood', entry = this.outbox.find(each => each.tag === event.tag || flood && event.tag === undefined && each.state === 'sent');
    if (flood) this._pausedUntil = Date.now() + 1000 * 2 ** Math.min(this._floods++, 4);
    if (entry && (flood || code === 'slow')) {
      if (code === 'slow') this._pausedUntil = Date.now() + 2000;
      entry.sends -= 1;                              // it is sent again until the server takes it
      return this._again(entry, code, text);
    }
    if (entry) this._refuse(entry, code, text);
    const asked = event.tag !== undefined && this._answer(event.tag, null, new ChatError(code, text));
    if (!asked) this._tell('error', { code, text, entry });
  },
};
