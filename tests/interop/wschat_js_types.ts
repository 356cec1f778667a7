// An application over wschat.js, for the compiler alone: wschat_js_test.mjs lets TypeScript check it. Each line after
// "@ts-expect-error" is a mistake that the types must find.
import { ChatClient, ChatError, ChatRoomState, byteLength, mentions } from '../../examples/wschat.js';

const chat = new ChatClient({ url: 'ws://127.0.0.1:8888/chat', rooms: ['tea'], name: 'Anna', storage: null, deadline: 1000 });
new ChatClient();
// @ts-expect-error: a list of rooms
new ChatClient({ rooms: 'tea' });
// @ts-expect-error: an unknown option
new ChatClient({ room: 'tea' });

export async function use(): Promise<string> {
  chat.addEventListener('message', event => { if (event instanceof CustomEvent) console.log(event.detail.message.text); });
  chat.connect();
  const entry = chat.say('tea', 'Hello', { data: { cups: 2 } });
  if (entry.state === 'refused') chat.retry(entry);
  // @ts-expect-error: there is no such state
  if (entry.state === 'lost') chat.discard(entry);
  try {
    await chat.edit('tea', 7, 'Hello again');
    // @ts-expect-error: an id is a number
    await chat.edit('tea', '7', 'Hello again');
  } catch (error) {
    if (error instanceof ChatError) return error.code;
  }
  const room: ChatRoomState | undefined = chat.rooms.get('tea');
  const newest = room?.messages.at(-1);
  // @ts-expect-error: a time is a number
  const wrong: string | undefined = newest?.time;
  const count: number = await chat.before('tea', 50);
  const conversation = chat.converse({ user: 'xyz', name: 'Bob' });
  const names: string[] = [...conversation.users.values()].map(person => person.name);
  const allowed: boolean = chat.can('kick', 'tea') && chat.state === 'connected' && mentions('@Anna', chat.me.name);
  return `${count} ${names} ${allowed} ${byteLength('ü')} ${newest?.reactions[0]?.emoji} ${wrong}`;
}
