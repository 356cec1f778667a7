// A client of the chat in wschat.hpp: one ES module that loads nothing else, for browsers and for Node.
//
//   import { ChatClient } from './wschat.js';
//   const chat = new ChatClient({ url: 'ws://127.0.0.1:8888/chat', rooms: ['tea'], name: 'Anna' });
//   chat.addEventListener('message', ({ detail }) => console.log(detail.message.name, detail.message.text));
//   chat.connect();
//   chat.say('tea', 'Hello');
//
// It reconnects, gets what it missed, sends what was written offline, and keeps messages and users of each room. In
// examples/README.md are the reference and the protocol (version 3).

const FIRST_DELAY = 500, LONGEST_DELAY = 30000;   // ms; the longest delay before the first attempt to reconnect doubles each time
const CONNECT_DEADLINE = 10000, STABLE_AFTER = 5000;   // ms; a connection of this age resets the delays
const ANSWER_DEADLINE = 15000;    // the server answers each line with a tag; the option `deadline`
const SILENCE = 45000;            // after this silence, the client asks whether the server is alive
const TYPING_EVERY = 3000;
const READ_AFTER = 1000;          // a read marker waits for others, so that there is one for several messages
const MOST_MESSAGES = 10000;      // of a room in memory; older ones can be loaded again
const MOST_SENDS = 6;             // of a message without an answer; then it counts as refused
const NEED_PERMISSION = ['say', 'private', 'edit', 'react', 'kick', 'ban', 'mute', 'slow', 'access', 'readonly', 'invite',
                         'remove', 'topic'];   // else a feature is enough
const PASSED = ['rooms', 'help', 'search', 'moderation'];   // events of the server that the client passes on

/**
 * @typedef {{ emoji: string, count: number, users: string[], me: boolean }} Reaction  users: ids, 20 at most
 * @typedef {{ id: number, kind: 'said' | 'topic', user: string, name: string, text: string, time: number, own: boolean,
 *   me: boolean, mention: boolean, data: object | null, edited: number, removed: boolean, reactions: Reaction[],
 *   asOf: number }} ChatMessage  id: 0 if the server does not keep it; user: the public id of the author; name: '' if the
 *   chat itself speaks; time: Unix time in ms; me: an action, as in "/me waves"; mention: of this user; edited: when, or 0;
 *   asOf: amendments with this id, and older ones, are included
 * @typedef {{ user: string, name: string, about?: any }} Person  user: the public id
 * @typedef {{ resolve: (event: any) => void, reject: (error: ChatError) => void, timer: any }} Asked  a command without its answer
 * @typedef {{ tag: string, room: string, text: string, line: string, state: 'waiting' | 'sent' | 'refused', code: string,
 *   reason: string, sends: number, time: number }} Outgoing  a message in the outbox; code and reason: why it was refused
 * @typedef {{ url?: string, rooms?: string[], name?: string, key?: string, deadline?: number, WebSocket?: any, storage?:
 *   { getItem(name: string): string | null, setItem(name: string, value: string): void } | null }} ClientOptions
 *   url: of the lobby, without a query (default: "chat" beside the page); rooms: to enter (the room that the server selects);
 *   key: the secret of the user, 8 to 128 bytes (from the storage, or random); deadline: ms that the server has for an answer;
 *   WebSocket: a class like that of browsers (the global one); storage: where the key is kept (localStorage; null: nowhere)
 */

/** What a promise of ChatClient is rejected with. `code` is one of the protocol, or "offline", "timeout". */
export class ChatError extends Error {
  /** @param {string} code @param {string} text @param {number} [seconds] until it may be repeated */
  constructor(code, text, seconds = 0) { super(text || code); this.code = code; this.seconds = seconds; }
}

/** A room, or a private conversation: its name is then "@" and `peer`. The client changes it; read it only. */
export class ChatRoomState {
  topic = '';
  users = /** @type {Map<string, Person>} */ (new Map());  // by user id
  count = 0;                          // of users; `users` may have less
  private = false;                    // only who is invited enters
  readOnly = false;                   // only moderators speak; see ChatClient.can()
  slow = 0;                           // seconds between two messages of a user
  slowUntil = 0;                      // until then (Unix time in ms) the next message of this user waits
  refused = /** @type {ChatError | null} */ (null);  // why the server did not let this user in
  may = /** @type {Set<string> | null} */ (null);  // what this user may do here; null: as everywhere
  messages = /** @type {ChatMessage[]} */ ([]);  // in the order of their ids
  byId = /** @type {Map<number, ChatMessage>} */ (new Map());
  more = false;                       // the server has older messages
  unread = 0; mentions = 0;           // messages of others; of those, the mentions of this user
  read = 0;                           // the id of the newest message that was read
  readKnown = false; unsent = false;  // else `read` is a guess: a newcomer has read what is there; the server does not know it yet
  epoch = ''; last = 0;               // the position of the newest entry
  /** @param {string} name @param {string} title */
  constructor(name, title = name) {
    this.name = name; this.title = title;
    this.peer = name.startsWith('@') ? name.slice(1) : '';
    this.joined = this.peer !== '';
  }
  forget() {
    Object.assign(this, { messages: [], byId: new Map(), more: false, epoch: '', last: 0, unread: 0, mentions: 0, read: 0, readKnown: false });
  }
  setOptions(event) {       // of "hello", "room" and "options"
    const slow = Number(event.slow) || 0, slowUntil = slow ? this.slowUntil : 0;
    return Object.assign(this, { private: event.private === true, readOnly: event.read_only === true, slow, slowUntil });
  }
  /** Where a later connection resumes, or ''. */
  get position() { return this.epoch ? `${this.epoch}-${this.last}` : ''; }
  /** Gives the message its place by its id. Null: it is there already. @param {ChatMessage} message */
  insert(message) {
    if (this.byId.has(message.id)) return null;
    let at = this.messages.length;
    if (message.id !== 0) {
      this.byId.set(message.id, message);
      while (at > 0 && this.messages[at - 1].id > message.id) at -= 1;
    }
    this.messages.splice(at, 0, message);
    return message;
  }
}
const page = /** @type {any} */ (globalThis);     // in Node, it has no document and no storage
function randomToken() { return btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(16)))); }

/** The size in bytes, in which the limits of the server are. @param {string} text */
export function byteLength(text) { return new TextEncoder().encode(text).length; }

/** Whether "@name" stands in the text. @param {string} text @param {string} name */
export function mentions(text, name) {
  const escaped = name.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');
  return name !== '' && new RegExp(`(?<![\\p{L}\\p{N}_])@${escaped}(?![\\p{L}\\p{N}_])`, 'iu').test(text);
}

/** A chat. See examples/README.md for its events. */
export class ChatClient extends EventTarget {
  /** @param {ClientOptions} [options] */
  constructor(options = {}) {
    super();
    this.options = options;
    this.rooms = /** @type {Map<string, ChatRoomState>} */ (new Map());  // rooms and conversations, in the order of entering
    this.outbox = /** @type {Outgoing[]} */ ([]);  // in the order of writing
    this.state = /** @type {'closed' | 'connecting' | 'connected' | 'waiting'} */ ('closed');
    this.reason = ''; this.retryAt = 0;  // why it is closed; when it connects again
    this.me = { name: options.name ?? '', user: '' };
    this.features = /** @type {Set<string>} */ (new Set());
    this.may = /** @type {Set<string>} */ (new Set());  // what this user may do
    this.limits = /** @type {Record<string, number>} */ ({});
    this.visible = '';                // the room on the screen: its messages are read
    this._socket = /** @type {any} */ (null);
    this._at = '';                    // the room in which the server understands lines
    this._failures = this._heard = this._tokens = this._filled = this._typed = this._pausedUntil = this._floods = 0;
    this._timers = /** @type {Record<string, any>} */ ({});
    this._asked = /** @type {Map<string, Asked>} */ (new Map());
    this._listeners = new AbortController();
    this._key = options.key || this._findKey();
    for (const name of options.rooms ?? []) this._room(name);
  }

  // ---- connecting --------------------------------------------------------------------------------------------------
  /** Connects, and again whenever the connection ends, until close(). */
  connect() {
    this._listeners.abort();
    this._listeners = new AbortController();
    this._watchPage(this._listeners.signal);
    Object.assign(this, { _failures: 0, reason: '' });
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
    const state = this.rooms.get(room ?? ''), may = state?.may ?? this.may;
    if (action === 'say' && state?.peer) return may.has('private');
    if (['say', 'edit'].includes(action) && state?.readOnly && !may.has('readonly')) return false;
    return NEED_PERMISSION.includes(action) ? may.has(action) : this.features.has(action);
  }

  // ---- speaking ----------------------------------------------------------------------------------------------------
  /** Says a text. Without a connection it waits in the outbox. The order is kept, and it arrives once.
   * @param {string} room @param {string} text @param {{ data?: object, me?: boolean }} [more] @returns {Outgoing} */
  say(room, text, { data, me } = {}) {
    const line = data ? `/data ${JSON.stringify(data)} ${text}` : me ? `/me ${text}` : text.replace(/^\//, '//');
    const entry = /** @type {Outgoing} */ ({ tag: randomToken(), room, text, line, sends: 0, time: Date.now() });
    this.outbox.push(entry);
    this._typed = 0;
    this.retry(entry);
    return entry;
  }
  /** Sends a refused message again. @param {Outgoing} entry */
  retry(entry) { this._change(entry, { state: 'waiting', sends: 0, code: '', reason: '' }); }
  /** Forgets a message of the outbox. @param {Outgoing} entry */
  discard(entry) {
    if (!this.outbox.includes(entry)) return;
    this._floods = 0;
    this.outbox = this.outbox.filter(each => each !== entry);
    this._tell('outbox', { entry, done: true });
    this._flush();
  }
  /** Sends any line, such as "/rooms", and resolves to the event that answers it.
   * @param {string} line @param {string} [room] @returns {Promise<any>} */
  command(line, room, tag = randomToken()) {
    if (this.state !== 'connected') return Promise.reject(new ChatError('offline', 'There is no connection.'));
    return new Promise((resolve, reject) => {
      const asked = Date.now(), timer = setTimeout(() => {
        this._answer(tag, null, new ChatError('timeout', 'The server did not answer.'));
        if (this._heard < asked) this._lost();               // the connection is dead
      }, this.options.deadline ?? ANSWER_DEADLINE);
      this._asked.set(tag, { resolve, reject, timer });
      this._write(line, room, tag);
    });
  }
  /** @param {string} room @param {number} id @param {string} text */ edit(room, id, text) { return this.command(`/edit ${id} ${text}`, room); }
  /** @param {string} room @param {number} id */ remove(room, id) { return this.command(`/delete ${id}`, room); }
  /** Reacts, or takes the reaction back. @param {string} room @param {number} id @param {string} emoji */
  react(room, id, emoji) { return this.command(`/react ${id} ${emoji}`, room); }
  /** @param {string} room @param {string} text */ topic(room, text) { return this.command(`/topic ${text}`, room); }
  /** @param {string} name */
  async nick(name) {
    if (this.state === 'connected') await this.command(`/nick ${name}`);
    else this.me.name = name;
  }
  /** Loads older messages into the room. Resolves to how many came. @param {string} room @param {number} [limit] */
  async before(room, limit = 100) {
    const state = this.rooms.get(room), first = state?.messages.find(each => each.id > 0);
    if (!state?.more || !first && !state.peer) return 0;
    const count = state.messages.length;
    await this.command(`/before ${state.peer ? room + ' ' : ''}${first?.id ?? '9'.repeat(18)} ${limit}`, room);
    return state.messages.length - count;
  }
  /** The user has seen everything in the room. @param {string} room */
  markRead(room) {
    const state = this.rooms.get(room);
    if (!state) return;
    const isNew = state.read < state.last, changed = isNew || state.unread > 0;
    Object.assign(state, { readKnown: true, unread: 0, mentions: 0, read: Math.max(state.read, state.last), unsent: state.unsent || isNew });
    if (state.unsent && this.state === 'connected') this._soon('read ' + room, READ_AFTER, () => this._sendRead(state));
    if (changed) this._set(state, {});
  }
  /** Tells the others that this user writes; call it for each change of the input. @param {string} room @param {boolean} [stop] */
  typing(room, stop = false) {
    const state = this.rooms.get(room);
    if (this.state !== 'connected' || !state?.joined || state.peer) return;
    if (stop ? this._typed === 0 : Date.now() - this._typed < TYPING_EVERY) return;
    this._typed = stop ? 0 : Date.now();
    this._write(stop ? '/typing stop' : '/typing', room);
  }

  // ---- rooms -------------------------------------------------------------------------------------------------------
  /** Enters a room, now and after each reconnection. @param {string} name */
  async join(name) {
    const known = this._find(name), state = known ?? this._room(name);
    if (state.joined || this.state !== 'connected') return state;
    const { room } = await this.command(`/join ${name}`).catch(error => {
      if (known) this._set(known, { refused: error });
      else if (!['offline', 'timeout'].includes(error.code)) this._forgetRoom(name);
      throw error;
    });
    return this.rooms.get(room) ?? state;
  }
  /** Leaves a room, or closes a conversation. @param {string} name */
  async leave(name) {
    const state = this.rooms.get(name);
    this._sendRead(state);
    this._forgetRoom(name);
    if (state?.joined && !state.peer && this.state === 'connected') await this.command(`/leave ${name}`);
  }
  /** Opens the conversation with a user. @param {Person} person */
  converse(person) {
    const name = '@' + person.user, isNew = !this.rooms.has(name), state = this._room(name, person.name);
    this._set(state, isNew ? { more: this.features.has('before') } : {});      // there may be earlier messages
    return state;
  }
  /** The rooms of the server. @returns {Promise<{ room: string, users: number, topic?: string }[]>} */
  async list() { return (await this.command('/rooms')).rooms ?? []; }

  // ---- the connection, inside --------------------------------------------------------------------------------------
  _findKey() {
    try {
      const { storage = page.localStorage } = this.options, made = storage?.getItem('wschat.key') || randomToken();
      storage?.setItem('wschat.key', made);
      return made;
    } catch { return randomToken(); }              // a browser may forbid storage
  }
  _watchPage(signal) {
    if (!page.document) return;
    const retry = () => { if (this.state === 'waiting') { this._failures = 0; this._connect(); } };
    page.addEventListener('online', retry, { signal });
    page.addEventListener('offline', () => this._lost(), { signal });
    page.addEventListener('pagehide', () => this.rooms.forEach(each => this._sendRead(each)), { signal });
    page.addEventListener('pageshow', event => { if (event.persisted && !this.reason) this._connect(); }, { signal });
    page.document.addEventListener('visibilitychange', () => {
      if (!page.document.hidden && this.state === 'connected' && Date.now() - this._heard > SILENCE / 2) this._probe();
      if (!page.document.hidden) retry();
    }, { signal });
  }
  _address() {
    const url = new URL(this.options.url ?? 'chat', page.document?.baseURI);
    url.protocol = url.protocol.replace('http', 'ws');
    const all = [...this.rooms.values()], wanted = all.filter(each => !each.peer), isPath = !/^\.\.?$/.test(wanted[0]?.name);
    const [first, ...rest] = isPath ? wanted : [new ChatRoomState('lobby'), ...wanted];      // a path cannot end in ".."
    if (first) url.pathname = url.pathname.replace(/\/$/, '') + '/' + encodeURIComponent(first.name);
    if (this.me.name) url.searchParams.set('name', this.me.name);
    if (first?.position) url.searchParams.set('last', first.position);
    for (const each of rest) url.searchParams.append('join', `${each.name} ${each.position}`.trim());
    for (const each of all) if (each.peer && each.position) url.searchParams.append('peer', `${each.peer} ${each.position}`);
    return url.href;
  }
  _connect() {
    this._drop();
    this._setState('connecting');
    const base64 = btoa(String.fromCharCode(...new TextEncoder().encode(this._key)));
    const key = base64.replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');
    const socket = new (this.options.WebSocket ?? page.WebSocket)(this._address(), ['wschat', 'wschat.key.' + key]);
    this._socket = socket;
    socket.onmessage = ({ data }) => { if (this._socket === socket) this._received(data); };
    socket.onerror = () => {};                     // a close follows
    socket.onclose = ({ reason }) => { if (this._socket === socket) this._lost(reason); };
    this._soon('connect', CONNECT_DEADLINE, () => this._lost());
  }
  // Ends the connection, without an event.
  _drop(code) {
    const socket = this._socket;
    this._socket = null;
    this._at = '';
    for (const timer of Object.values(this._timers)) clearTimeout(timer);
    for (const state of this.rooms.values()) state.joined = state.peer !== '';
    for (const tag of [...this._asked.keys()]) this._answer(tag, null, new ChatError('offline', 'The connection was lost.'));
    try { socket?.close(...(code ? [code] : [])); } catch { /* it was not open yet */ }
  }
  _lost(reason = '') {
    if (this.state === 'closed' || !this._socket && this.state === 'waiting') return;
    this._drop();
    if (this.reason) return this._setState('closed');       // the user was asked to leave
    // The delay doubles, and is random, so the clients of a restarted server do not all connect at once.
    const longest = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** Math.min(this._failures, 10));
    const delay = longest * (this._failures === 0 ? Math.random() : 0.5 + Math.random() / 2);
    this._failures += 1;
    this.retryAt = Date.now() + delay;
    this._setState('waiting', reason);
    this._soon('retry', delay, () => this._connect());
  }
  _setState(state, reason = this.reason) {
    this.state = state;
    this._tell('state', { state, retryAt: this.retryAt, reason });
  }
  _soon(name, ms, action) {
    clearTimeout(this._timers[name]);
    this._timers[name] = setTimeout(action, ms);
  }
  _sendRead(state) {
    if (!state?.unsent || this.state !== 'connected' || !this.features.has('read')) return;
    this._write(`/read ${state.peer ? state.name + ' ' : ''}${state.read}`, state.name);
    state.unsent = false;
  }
  // Asks something small whose answer also shows whether anything was missed.
  _probe() {
    const state = [...this.rooms.values()].find(each => each.joined && each.position && !each.peer);
    this.command(state ? `/since ${state.position}` : '/rooms', state?.name).catch(() => {});
  }
  _write(line, room, tag) {
    const spoken = room && !this.rooms.get(room)?.peer && room !== this._at ? `/in ${encodeURIComponent(room)} ${line}` : line;
    this._tokens -= 1;
    this._socket.send(tag ? `/tag ${tag} ${spoken}` : spoken);
  }

  // ---- the outbox, inside ------------------------------------------------------------------------------------------
  _change(entry, changes) {
    this._tell('outbox', { entry: Object.assign(entry, changes) });
    this._flush();
  }
  // One message is on its way at a time. So the order is kept even if the server refuses one for a while.
  _flush() {
    if (this.state !== 'connected' || this._socket.readyState !== 1 || this.outbox.some(each => each.state === 'sent')) return;
    const untilSlow = each => (this.rooms.get(each.room)?.slowUntil ?? 0) - Date.now();
    const ready = this.outbox.filter(each => each.state === 'waiting' && this.rooms.get(each.room)?.joined);
    const entry = ready.find(each => untilSlow(each) <= 0) ?? ready[0];
    if (!entry) return;
    const wait = Math.max(this._pausedUntil - Date.now(), this._untilToken(), Math.min(...ready.map(untilSlow)));
    if (wait > 0) return this._soon('flush', wait, () => this._flush());
    this._change(entry, { state: 'sent', sends: entry.sends + 1 });
    this._speak(entry).then(() => this.discard(entry), error => this._failed(entry, error));
  }
  // A private message goes through a room in which the other one is; else to the user's id, where the server keeps it.
  _speak({ line, room: name, tag, text }) {
    const peer = this.rooms.get(name)?.peer;
    if (!peer) return this.command(line, name, tag);
    const room = [...this.rooms.values()].find(each => each.joined && each.users.has(peer));
    return this.command(`/msg ${room?.users.get(peer)?.name ?? '@' + peer} ${text}`, room?.name, tag);
  }
  // What came too early, or has no answer, is sent again. So is a private message to a user who has just left the room.
  _failed(entry, { code, message, seconds }) {
    const room = this.rooms.get(entry.room);
    if (!room || !this.outbox.includes(entry)) return;
    if (code === 'slow') this._set(room, { slowUntil: Date.now() + 1000 * (seconds || 2) });
    if (['flood', 'slow', 'offline'].includes(code)) this._change(entry, { state: 'waiting', sends: entry.sends - 1 });
    else if (entry.sends < ({ timeout: MOST_SENDS, unknown_user: 2 }[code] ?? 0)) this._change(entry, { state: 'waiting' });
    else this._change(entry, { state: 'refused', code, reason: message });
  }
  // How long the pace that the server allows demands to wait, in ms.
  _untilToken() {
    const rate = (this.limits.per_second || 5) * 0.8, burst = Math.max(1, (this.limits.burst || 20) * 0.8), now = Date.now();
    this._tokens = Math.min(burst, this._tokens + (now - this._filled) / 1000 * rate);
    this._filled = now;
    return this._tokens >= 1 ? 0 : (1 - this._tokens) / rate * 1000;
  }
  _answer(tag, event, error) {
    const asked = this._asked.get(tag);
    clearTimeout(asked?.timer);
    error ? asked?.reject(error) : asked?.resolve(event);
    return this._asked.delete(tag);
  }

  // ---- rooms and messages, inside ----------------------------------------------------------------------------------
  _tell(type, detail) { this.dispatchEvent(new CustomEvent(type, { detail })); }
  _room(name, title) {
    const state = this.rooms.get(name) ?? new ChatRoomState(name, title);
    this.rooms.set(name, state);
    return state;
  }
  // Names of rooms that differ in case alone are one room.
  _find(name) {
    const fold = (/** @type {any} */ each) => String(each ?? '').normalize('NFKC').toLowerCase(), folded = fold(name);
    return this.rooms.get(name) ?? [...this.rooms.values()].find(each => !each.peer && fold(each.name) === folded);
  }
  // Changes values of a room.
  _set(state, values) { this._tell('room', { room: Object.assign(state, values) }); }
  _forgetRoom(name) {
    const state = this.rooms.get(name);
    if (!this.rooms.delete(name)) return;
    this.outbox = this.outbox.filter(each => each.room !== name || each.state === 'refused');
    this._tell('left', { room: state });
  }
  // The server understands lines in this room now. It decides how the name is written.
  _enter(name) {
    this._at = String(name ?? '');
    const asked = this._find(this._at);
    if (!asked || asked.name === this._at) return;
    this.rooms.delete(asked.name);
    for (const entry of this.outbox) if (entry.room === asked.name) entry.room = this._at;
    this.rooms.set(this._at, Object.assign(asked, { name: this._at, title: this._at }));
  }
  _people(values) {
    return /** @type {Person[]} */ (values).filter(each => each?.user).map(({ user, name = '', about }) => ({ user: String(user), name: String(name), about }));
  }
  _messageOf(event, asOf) {
    const text = String(event.text ?? ''), user = String(event.user ?? '');
    const own = event.tag !== undefined || user !== '' && user === this.me.user;
    const reactions = (event.reactions ?? []).map(({ emoji, count, users = [], me }) =>
      ({ emoji: String(emoji), count: Number(count) || 0, users: [...users], me: me === true || users.includes(this.me.user) }));
    return /** @type {ChatMessage} */ ({
      id: Number(event.id) || 0, kind: event.type === 'topic' ? 'topic' : 'said', user, name: String(event.name ?? ''), text,
      time: Number(event.time) || Date.now(), own, me: event.me === true, mention: !own && this._isMentioned(event, text),
      data: event.data ?? null, edited: Number(event.edited) || 0, removed: event.removed === true, reactions, asOf });
  }
  // By the ids of users who were there. A message of a history may have none: then by the name, as this user may have been away.
  _isMentioned(event, text) { return Array.isArray(event.mentions) ? event.mentions.includes(this.me.user) : mentions(text, this.me.name); }
  _isSeen(state) { return this.visible === state.name && !page.document?.hidden; }
  _count(state, message) {
    if (message.own || message.kind !== 'said' || message.removed) return;
    if (this._isSeen(state)) return this.markRead(state.name);
    if (message.id !== 0 && message.id <= state.read) return;
    state.unread += 1;
    if (message.mention || state.peer) state.mentions += 1;
  }
  // What is in the log of a room: a message, a topic or an amendment. Returns the message if it is new.
  _log(state, event, asOf) {
    if (event.type === 'topic' && !(event.id < state.last)) state.topic = String(event.text ?? '');
    if (['edit', 'remove', 'react'].includes(event.type)) return this._amend(state, event);
    return state.insert(this._messageOf(event, asOf));
  }
  // An amendment may come twice, and the present state of a message may include it.
  _amend(state, event) {
    const message = state.byId.get(Number(event.target)), id = Number(event.id) || 0;
    if (!message || id !== 0 && id <= message.asOf) return null;
    message.asOf = Math.max(message.asOf, id);
    if (event.type === 'remove') Object.assign(message, { text: '', removed: true, data: null, reactions: [], mention: false });
    else if (event.type === 'react') this._react(message, event);
    else {
      const { text = '', time = Date.now(), data = message.data } = event;
      Object.assign(message, { text: String(text), edited: Number(time), data, mention: !message.own && this._isMentioned(event, String(text)) });
    }
    this._tell('change', { room: state, message });
    return null;
  }
  _react(message, { emoji, user, on }) {
    let reaction = message.reactions.find(each => each.emoji === emoji);
    if (!reaction) message.reactions.push(reaction = { emoji: String(emoji), count: 0, users: [], me: false });
    reaction.count += on ? 1 : -1;
    reaction.users = reaction.users.filter(each => each !== user);
    if (on && reaction.users.length < 20) reaction.users.push(user);
    if (user === this.me.user) reaction.me = on === true;
    message.reactions = message.reactions.filter(each => each.count > 0);
  }
  // What is in the log of a room, live.
  _logged(state, event) {
    event.mentions ??= [];
    const id = Number(event.id) || 0, message = this._log(state, event, id);
    state.last = Math.max(state.last, id);
    if (!message) return;
    if (message.own && state.slow && !this.can('slow', state.name)) this._set(state, { slowUntil: Date.now() + 1000 * state.slow });
    for (; state.messages.length > MOST_MESSAGES; state.more = true) state.byId.delete(state.messages.shift().id);
    this._count(state, message);
    this._tell('message', { room: state, message });
  }
  _came(state, event) {
    const people = this._people(event.users ?? [event]), before = state.users.size;
    for (const each of people) event.type === 'join' ? state.users.set(each.user, each) : state.users.delete(each.user);
    state.count = Number(event.count ?? state.count + state.users.size - before);
    this._tell(event.type, { room: state, people, time: Number(event.time) });
  }
  _received(data) {
    let event;
    try { event = JSON.parse(data); } catch { return; }
    if (typeof event?.type !== 'string') return;
    const { type, tag } = event;
    this._heard = Date.now();
    if (EVENTS[type]) EVENTS[type].call(this, event);
    else if (ROOM_EVENTS[type]) {
      const state = this.rooms.get(event.peer === undefined ? String(event.room ?? '') : '@' + event.peer);
      if (state) ROOM_EVENTS[type].call(this, state, event);
    } else if (type !== 'ack') this._tell(PASSED.includes(type) ? type : 'event', event);
    if (type !== 'error') this._answer(tag, event);
    if (this.state === 'connected') this._soon('silence', SILENCE, () => this._probe());
  }
}

// ---- events of the server --------------------------------------------------------------------------------------------
const { _logged: logged, _came: came } = ChatClient.prototype;
/** @type {Record<string, (this: ChatClient, state: ChatRoomState, event: any) => void>} in a room that the client knows */
const ROOM_EVENTS = {
  users(state, { users = [], count }) {
    const known = new Map(this._people(users).map(each => [each.user, each]));
    this._tell('users', { room: Object.assign(state, { users: known, count: Number(count ?? known.size) }) });
  },
  join: came, leave: came,
  nick(state, event) {
    const name = String(event.name), person = state.users.get(event.user), mine = event.user === this.me.user;
    for (const each of [person, mine ? this.me : null]) if (each) each.name = name;
    this._tell('nick', { room: state, old: String(event.old), name, mine, time: Number(event.time) });
  },
  options(state, event) { this._set(state.setOptions(event), {}); this._flush(); },
  said: logged, topic: logged, edit: logged, remove: logged, react: logged,
  read(state, { id }) {
    if (state.readKnown && !(Number(id) > state.read)) return;
    this._set(state, { read: Number(id) || 0, readKnown: true, unread: 0, mentions: 0 });
    for (const each of state.messages) this._count(state, each);
    this._set(state, {});
  },
  typing(state, { user, name, stop }) {
    if (user !== this.me.user) this._tell('typing', { room: state, name: String(name), stop: stop === true });
  },
};

/** @type {Record<string, (this: ChatClient, event: any) => void>} */
const EVENTS = {
  hello(event) {
    clearTimeout(this._timers.connect);
    Object.assign(this, { features: new Set(event.features ?? []), limits: event.limits ?? {}, may: new Set(event.may ?? []) });
    this.me = { name: String(event.name ?? this.me.name), user: String(event.user ?? '') };
    this._enter(event.room);
    for (const each of this.rooms.values()) Object.assign(each, { may: null, refused: null });
    if (this._at) this._room(this._at).setOptions(event);
    this._tokens = (this.limits.burst || 20) * 0.8;
    this._soon('stable', STABLE_AFTER, () => { this._failures = 0; });
    this.state = 'connected';
    this._tell('hello', event);
    this._setState('connected');
    this._flush();
  },
  room(event) {
    this._enter(event.room);
    const state = this.rooms.get(this._at);
    if (event.name) this.me.name = String(event.name);
    if (!state) return;
    if (event.unread !== undefined && this.visible !== state.name) state.unread = Number(event.unread);
    this._set(state.setOptions(event), { topic: String(event.topic ?? state.topic), may: Array.isArray(event.may) ? new Set(event.may) : null,
      read: Math.max(state.read, Number(event.read) || 0) });
  },
  history(event) {
    const state = event.peer !== undefined ? this._room('@' + event.peer, event.name) : this.rooms.get(event.room);
    if (!state) return;
    const older = event.before !== undefined, last = Number(event.last) || 0, messages = [];
    if (event.gap && !older) state.forget();
    const resumed = !older && state.position !== '';
    for (const each of Array.isArray(event.entries) ? event.entries : []) {
      for (const sent of this.outbox.filter(entry => entry.tag === each.tag)) this.discard(sent);    // its answer was lost
      const message = this._log(state, each, Math.max(older ? state.last : last, Number(each.id) || 0));
      if (message) messages.push(message);
    }
    const epoch = String(event.epoch ?? state.epoch), topic = String(event.topic ?? state.topic);
    if (!older) Object.assign(state, { epoch, topic, joined: true, refused: null, last: Math.max(state.last, last) });
    if (older || !resumed) state.more = event.more === true || !older && state.peer !== '';
    if (resumed || state.peer) for (const each of messages) this._count(state, each);
    else if (!older && !state.readKnown) state.read = state.last;
    this._tell('history', { room: state, messages, gap: event.gap === true, older });
    this._flush();
  },
  private(event) {
    const title = String(event.user === this.me.user ? event.to : event.name);
    const known = [...this.rooms.values()].find(each => each.peer && each.title === title);
    const state = event.peer ? this._room('@' + event.peer, title) : known;    // without an id, the other one has just left
    if (state) logged.call(this, state, event);
  },
  peers({ peers = [] }) {                          // conversations without anything new
    for (const { user, name, read } of peers.filter(each => each?.user)) {
      const state = this._room('@' + user, String(name)), more = state.more || state.messages.length === 0;
      this._set(state, { read: Math.max(state.read, Number(read) || 0), readKnown: true, more });
    }
  },
  invited({ room, user, by }) {
    if (user === this.me.user && !this._find(room)?.joined) this._tell('invited', { room: String(room), by: String(by) });
  },
  kicked(event) {
    this.reason = String(event.text || 'You were asked to leave.');
    this._tell('kicked', { text: this.reason, code: String(event.code ?? 'kick'), seconds: event.seconds });
  },
  error(event) {
    const code = String(event.code ?? ''), text = String(event.text ?? code);
    if (code === 'flood') this._pausedUntil = Date.now() + 1000 * 2 ** Math.min(this._floods++, 4);
    const error = new ChatError(code, text, Number(event.seconds) || 0), room = this._find(event.room);
    if (this._answer(event.tag, null, error)) return;
    // Users of other servers may have got the last places of a room that this one had entered.
    if (room && (!room.joined || code === 'room_full')) this._set(room, { joined: false, refused: error });
    else this._tell('error', { code, text });
  },
};
